"""What the base model's tokenizer makes of a recipe's rows, and the numbers of what would be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.check import FileCheck, Problem, Supervision
from job.contract.errors import DatasetInvalid
from job.contract.recipe import TINY_MODEL, Recipe
from job.contract.supervision import MOST_EXAMPLES, Answer, Ask, ShownRow, Supervised
from job.dataset.examine import Examination, examine
from job.dataset.problems import FEW_ROWS
from job.dataset.split import split
from launch.facts import ModelFacts
from launch.histogram import histogram
from launch.steps import Lengths, work_of
from launch.supervising import ask_once, supervise, why_not
from launch.tokens import counted, measure, take_sample
from launch.transfer import transfer_bar

NOT_CHECKED: Final = "what the chat template makes of the rows was not checked: "


@dataclass(frozen=True)
class DatasetFile:
    """One of the recipe's two files."""

    name: str
    uri: str
    path: Path

    def examine(self, control_tokens: frozenset[str], shown: int, *, few_rows: int = FEW_ROWS) -> Examination:
        """Every line of it, with a progress bar. Raises DatasetInvalid: it cannot be read."""
        with transfer_bar(f"checking {self.name}", self.path.stat().st_size) as progress:
            return examine(
                self.path,
                name=self.name,
                uri=self.uri,
                control_tokens=control_tokens,
                progress=progress,
                shown=shown,
                few_rows=few_rows,
            )


@dataclass(frozen=True)
class Rows:
    """The rows of a recipe: its two files, and what was found in them.

    Args:
        held_out, judged: of a file of its own; None where there is none.
    """

    recipe: Recipe
    train: DatasetFile
    seen: Examination
    held_out: DatasetFile | None
    judged: Examination | None

    @property
    def size(self) -> int:
        """Bytes of both."""
        return self.seen.file.digest.size + (self.judged.file.digest.size if self.judged is not None else 0)

    def render(
        self, model: ModelFacts | None, *, cache: Path | None, shown: int, anyway: bool
    ) -> tuple[Supervised | None, Problem | str]:
        """What the base model's tokenizer makes of all rows; or what is wrong with it, or why nobody can tell.

        Args:
            anyway: that the rows could not be rendered is a warning.

        Raises:
            DatasetInvalid: a file was changed in the meantime.
        """
        if model is None:
            return None, ""
        if model.tokenizer is None or why_not():
            return None, NOT_CHECKED + (model.why or why_not())
        with transfer_bar("rendering the rows", self.size) as progress:
            answer = supervise(
                self._ask(model, shown),
                self.seen.file.digest,
                self.judged.file.digest if self.judged is not None else None,
                cache=cache,
                progress=progress,
            )
        if isinstance(answer, str) or (answer.supervised is None and answer.refused is None):
            return None, _not_rendered(answer if isinstance(answer, str) else "it gave no answer", anyway=anyway)
        if answer.supervised is None:
            return None, answer.refused or ""
        told = answer.supervised
        self._hold(self.train, self.seen, told.train_sha256)
        if self.held_out is not None and self.judged is not None:
            self._hold(self.held_out, self.judged, told.held_out_sha256)
        return told, ""

    def probe(self, model: ModelFacts | None) -> Problem | None:
        """What is wrong with the base model, as one row tells; None where nothing is, or nobody can tell."""
        if model is None or model.tokenizer is None or why_not() or not self.seen.digests.lines:
            return None
        answer = ask_once(self._ask(model, 0).model_copy(update={"lines": (self.seen.digests.lines[0],)}))
        return answer.refused if isinstance(answer, Answer) else None

    def show(self, model: ModelFacts | None, told: Supervised, count: int) -> tuple[ShownRow, ...]:
        """So many rows, token by token."""
        lines = told.examples[: min(count, MOST_EXAMPLES)]
        if not lines or model is None:
            return ()
        answer = ask_once(self._ask(model, 0).model_copy(update={"lines": lines}))
        return answer.shown or () if isinstance(answer, Answer) else ()

    def lengths(self, told: Supervised | None, why: str) -> tuple[Lengths, Lengths | None]:
        """How long the rows of both files are: counted, or estimated.

        Args:
            why: they could not be counted.
        """
        first = self._lengths_of(self.train, self.seen.file, told.lengths if told is not None else None, why)
        if self.held_out is None or self.judged is None:
            return first, None
        tokens = told.held_out_lengths if told is not None else None
        return first, self._lengths_of(self.held_out, self.judged.file, tokens, why)

    def held_out_places(self) -> list[int]:
        """Places of the rows that the recipe's fraction holds out; none without a fraction."""
        share, count = self.recipe.dataset.held_out, len(self.seen.digests)
        if not isinstance(share, float) or count < 2:
            return []
        return split(range(count), held_out=share, seed=self.recipe.training.seed)[1]

    def _ask(self, model: ModelFacts, shown: int) -> Ask:
        share = self.recipe.dataset.held_out
        return Ask(
            tokenizer=model.tokenizer or "",
            train=str(self.train.path),
            train_name=self.train.name,
            held_out=str(self.held_out.path) if self.held_out is not None else None,
            held_out_name=self.held_out.name if self.held_out is not None else "",
            share=share if isinstance(share, float) else None,
            seed=self.recipe.training.seed,
            max_length=self.recipe.training.max_length,
            shown=shown,
        )

    def _hold(self, file: DatasetFile, examined: Examination, rendered: str | None) -> None:
        if rendered != examined.file.digest.sha256:
            raise DatasetInvalid(f"dataset {file.name} was changed while it was checked", hint="check it again")

    def _lengths_of(self, file: DatasetFile, check: FileCheck, tokens: tuple[int, ...] | None, why: str) -> Lengths:
        if tokens is not None:
            built_in = self.recipe.base_model.id == TINY_MODEL
            how = "the built-in tokenizer" if built_in else "the base model's tokenizer and chat template"
            return counted(tokens, check.digest.size, how=how)
        try:
            sample = take_sample(file.path, check.digest)
        except OSError as error:
            raise DatasetInvalid(f"dataset {file.name} cannot be read: {error.strerror or error}") from error
        return measure(sample, base_model=self.recipe.base_model.id, why=why)


def _not_rendered(why: str, *, anyway: bool) -> Problem:
    """Nobody knows what these rows would train: that is no reason to find out on a GPU that is paid for."""
    return Problem(
        code="not-rendered",
        severity="warning" if anyway else "error",
        file="",
        message=f"the rows could not be rendered with the base model's chat template: {why}",
        hint="check again where there is more memory; `launch --anyway` leaves it to the job, which renders them "
        "before it trains",
    )


def supervision_of(recipe: Recipe, told: Supervised, train: Lengths, held_out: Lengths | None) -> Supervision:
    """The numbers of a recipe whose rows were rendered."""
    training, share = recipe.training, recipe.dataset.held_out
    work = work_of(recipe, train, held_out)
    lengths = list(told.lengths)
    if isinstance(share, float) and len(lengths) > 1:
        lengths, _ = split(lengths, held_out=share, seed=training.seed)
    room = work.sequences * training.max_length
    if not training.packing:
        room = round(work.batch_tokens * -(-work.sequences // training.batch_size))
    return Supervision(
        rows=told.rows,
        held_out_rows=told.held_out_rows,
        tokens=told.tokens,
        trained_tokens=told.trained_tokens,
        cut_rows=told.cut_rows,
        lengths=histogram(lengths),
        sequences=work.sequences,
        fill=min(1.0, told.tokens / room),
        steps_per_epoch=work.steps_per_epoch,
        stop_tokens=told.stop_tokens,
        masked_by=told.masked_by,
        tokens_sha256=told.tokens_sha256,
    )
