"""The check of a recipe: what is wrong with its rows, what they become, and what would be trained. It creates nothing
but entries of a cache.

All of it is one value, `Checked`, with every problem at once; `launch.resolve` makes a refusal of the first ones.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.check import Check, FileCheck, Problem, Severity, Supervision
from job.contract.errors import DatasetInvalid, FtjobError, ModelInvalid
from job.contract.recipe import TINY_MODEL, Recipe
from job.contract.supervision import MOST_EXAMPLES, Answer, Ask, ShownRow, Supervised
from job.dataset.examine import Examination, examine, shared_rows
from job.dataset.problems import FEW_ROWS
from job.dataset.render import split
from launch.base_model import pin
from launch.datasets import dataset_uri, local_copy
from launch.facts import ModelFacts, look_at
from launch.histogram import histogram
from launch.hub import Hub
from launch.isolation import leak_of
from launch.steps import Lengths, work_of
from launch.supervising import ask_once, supervise, why_not
from launch.tokens import counted, measure, take_sample
from launch.transfer import transfer_bar

SHOWN: Final = 20
"""Problems of each kind that are listed, unless told otherwise."""
_ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "notice")


@dataclass(frozen=True)
class Checked:
    """A check, and what else was learnt on the way.

    Args:
        model: None where the base model cannot be had; `failure` says why.
        lengths: of the rows of the recipe's two files, counted or estimated; None for a recipe with errors.
        shown: rows token by token, as many as were asked for.
    """

    check: Check
    train_uri: str
    held_out_uri: str | None
    model: ModelFacts | None
    failure: FtjobError | None
    lengths: tuple[Lengths, Lengths | None] | None
    shown: tuple[ShownRow, ...]


@dataclass(frozen=True)
class _File:
    """One of the recipe's two files."""

    name: str
    uri: str
    path: Path

    def examine(self, control_tokens: frozenset[str], shown: int, *, few_rows: int = FEW_ROWS) -> Examination:
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


def check_recipe(
    recipe: Recipe,
    *,
    folder: Path,
    hub: Hub,
    variables: Mapping[str, str],
    cache: Path | None,
    shown: int = SHOWN,
    show: int = 0,
    thorough: bool = True,
) -> Checked:
    """Check everything that can be checked without a GPU.

    Args:
        folder: the recipe's own, which its relative references start from.
        cache: folder of what need not be computed twice; None to keep nothing.
        shown: problems of each kind that are listed; all are counted.
        show: rows to be shown token by token, at most MOST_EXAMPLES.
        thorough: render the rows although errors were found before: only for all of them at once, which takes longer.

    Raises:
        DatasetInvalid: a dataset is missing or cannot be read at all.
        Unreachable: the store of a dataset is out of reach for now.
    """
    with ExitStack() as stack:

        def opened(reference: str) -> _File:
            uri = dataset_uri(reference, folder)
            return _File(reference, uri, stack.enter_context(local_copy(uri, reference)))

        train = opened(recipe.dataset.train)
        own = recipe.dataset.held_out
        held_out = opened(own) if isinstance(own, str) else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftjob-")))
        model, failure = _look(recipe, folder, hub, variables, cache, scratch)
        control_tokens = model.control_tokens if model is not None else frozenset()
        seen = train.examine(control_tokens, shown)
        judged = held_out.examine(control_tokens, shown, few_rows=0) if held_out is not None else None
        found = _Found([seen, *([judged] if judged is not None else [])])
        if judged is not None:
            found.add(shared_rows(seen, judged))
        found.add(_of_model(recipe, model, failure))
        told: Supervised | None = None
        why: Problem | str = ""
        if thorough or not found.has_errors:
            told, why = _render(recipe, model, train, seen, held_out, judged, cache=cache, shown=shown)
        if told is not None:
            found.add(told.problems, told.counts)
        elif isinstance(why, Problem):
            found.add([why])
        lengths, supervision, said = None, None, why if isinstance(why, str) else ""
        if failure is not None and not isinstance(failure, ModelInvalid):
            said = f"what the chat template makes of the rows was not checked: {failure.message}"
        if not found.has_errors:
            lengths = _lengths(recipe, train, seen, held_out, judged, told, said)
            supervision = _supervision(recipe, told, *lengths) if told is not None else None
        elif told is not None or not said:
            said = "they are told when there are no errors"
        rows = _show(recipe, model, train, told, show) if told is not None and show else ()
        check = Check(
            train=seen.file,
            held_out=judged.file if judged is not None else None,
            problems=found.in_order,
            counts=dict(found.counts),
            supervision=supervision,
            not_checked="" if supervision is not None else said,
        )
        return Checked(check, train.uri, held_out.uri if held_out else None, model, failure, lengths, rows)


class _Found:
    """Problems from everywhere."""

    def __init__(self, seen: Iterable[Examination]) -> None:
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        for each in seen:
            self.add(each.problems, each.counts)

    def add(self, problems: Iterable[Problem], counts: Mapping[str, int] | None = None) -> None:
        problems = list(problems)
        self.problems += problems
        self.counts.update(counts if counts is not None else Counter(problem.code for problem in problems))

    @property
    def has_errors(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)

    @property
    def in_order(self) -> tuple[Problem, ...]:
        """By severity; then as they came, file by file; the lines of a file in their order."""
        files = list(dict.fromkeys(problem.file for problem in self.problems))
        return tuple(sorted(self.problems, key=lambda p: (_ORDER.index(p.severity), files.index(p.file), p.line or 0)))


def _look(
    recipe: Recipe, folder: Path, hub: Hub, variables: Mapping[str, str], cache: Path | None, scratch: Path
) -> tuple[ModelFacts | None, FtjobError | None]:
    """What is known of the base model, or why it cannot be had: the rows are read all the same."""
    try:
        base_model = pin(recipe.base_model, folder=folder, hub=hub)
    except FtjobError as error:
        return None, error
    keep = cache / "tokenizers" if cache is not None and base_model.ref.is_on_hub else scratch
    return look_at(base_model, hub=hub, variables=variables, folder=keep), None


def _of_model(recipe: Recipe, model: ModelFacts | None, failure: FtjobError | None) -> Iterator[Problem]:
    """What is wrong with the base model, apart from what its template does to the rows."""
    refused = failure if isinstance(failure, ModelInvalid) else model.refused if model is not None else None
    if refused is not None:
        yield Problem(code="model", severity="error", file="", message=refused.message, hint=refused.hint)
    config = model.config if model is not None else ""
    leak = leak_of(config) if recipe.training.packing and not isinstance(config, str) else None
    if leak is not None:
        yield Problem(
            code="packing-leaks",
            severity="error",
            file="",
            message=f"packed rows would see each other: base model {recipe.base_model.id} has {leak}, "
            f"which carry a state from one row into the next",
            hint="set training.packing to false",
        )


def _ask(recipe: Recipe, model: ModelFacts, train: _File, held_out: _File | None, shown: int) -> Ask:
    share = recipe.dataset.held_out
    return Ask(
        tokenizer=model.tokenizer or "",
        train=str(train.path),
        train_name=train.name,
        held_out=str(held_out.path) if held_out is not None else None,
        held_out_name=held_out.name if held_out is not None else "",
        share=share if isinstance(share, float) else None,
        seed=recipe.training.seed,
        max_length=recipe.training.max_length,
        shown=shown,
    )


def _render(
    recipe: Recipe,
    model: ModelFacts | None,
    train: _File,
    seen: Examination,
    held_out: _File | None,
    judged: Examination | None,
    *,
    cache: Path | None,
    shown: int,
) -> tuple[Supervised | None, Problem | str]:
    """What the base model's tokenizer makes of all rows; or an error, or why nobody can tell.

    Raises:
        DatasetInvalid: a file was changed in the meantime.
    """
    if model is None:
        return None, ""
    if model.tokenizer is None or why_not():
        return None, f"what the chat template makes of the rows was not checked: {model.why or why_not()}"
    size = seen.file.digest.size + (judged.file.digest.size if judged is not None else 0)
    with transfer_bar("rendering the rows", size) as progress:
        answer = supervise(
            _ask(recipe, model, train, held_out, shown),
            seen.file.digest,
            judged.file.digest if judged is not None else None,
            cache=cache,
            progress=progress,
        )
    if isinstance(answer, str):
        return None, f"what the chat template makes of the rows was not checked: {answer}"
    if answer.supervised is None:
        return None, answer.refused or "the process that renders gave no answer"
    told = answer.supervised
    for file, examined, rendered in ((train, seen, told.train_sha256), (held_out, judged, told.held_out_sha256)):
        if file is not None and examined is not None and rendered != examined.file.digest.sha256:
            raise DatasetInvalid(f"dataset {file.name} was changed while it was checked", hint="check it again")
    return told, ""


def _lengths(
    recipe: Recipe,
    train: _File,
    seen: Examination,
    held_out: _File | None,
    judged: Examination | None,
    told: Supervised | None,
    why: str,
) -> tuple[Lengths, Lengths | None]:
    """How long the rows of both files are."""
    how = "the base model's tokenizer and chat template"
    if recipe.base_model.id == TINY_MODEL:
        how = "the built-in tokenizer"

    def of(file: _File, check: FileCheck, tokens: tuple[int, ...] | None) -> Lengths:
        if tokens is not None:
            return counted(tokens, check.digest.size, how=how)
        try:
            sample = take_sample(file.path, check.digest)
        except OSError as error:
            raise DatasetInvalid(f"dataset {file.name} cannot be read: {error.strerror or error}") from error
        return measure(sample, base_model=recipe.base_model.id, why=why)

    first = of(train, seen.file, told.lengths if told is not None else None)
    if held_out is None or judged is None:
        return first, None
    return first, of(held_out, judged.file, told.held_out_lengths if told is not None else None)


def _supervision(recipe: Recipe, told: Supervised, train: Lengths, held_out: Lengths | None) -> Supervision:
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


def _show(recipe: Recipe, model: ModelFacts | None, train: _File, told: Supervised, show: int) -> tuple[ShownRow, ...]:
    assert model is not None  # noqa: S101 - something was rendered with it
    lines = told.examples[: min(show, MOST_EXAMPLES)]
    if not lines:
        return ()
    ask = _ask(recipe, model, train, None, 0).model_copy(update={"lines": lines})
    answer = ask_once(ask)
    return answer.shown or () if isinstance(answer, Answer) else ()
