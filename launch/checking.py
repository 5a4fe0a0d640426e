"""The check of a recipe: what is wrong with its rows, what they become, and what would be trained. It creates nothing
but entries of a cache.

All of it is one value, `Checked`, with every problem at once; `launch.resolve` makes a refusal of the first ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.check import Check, Problem
from job.contract.errors import FtjobError, ModelInvalid
from job.contract.quantised import refuse_quantised
from job.contract.recipe import Recipe
from job.contract.supervision import ShownRow, Supervised
from job.dataset.examine import shared_by_split, shared_rows
from job.dataset.problems import find, problem_of
from launch.base_model import pin
from launch.cache import keep_newest, use
from launch.datasets import dataset_uri, local_copy
from launch.facts import ModelFacts, look_at
from launch.found import Found
from launch.hub import Hub
from launch.isolation import leak_of
from launch.rendered import NOT_CHECKED, DatasetFile, Rows, supervision_of
from launch.steps import Lengths
from launch.targets import unknown_targets

SHOWN: Final = 20
"""Problems of each kind that are listed, unless told otherwise."""
THOROUGH_BYTES: Final = 4_000_000
"""Of rows that are rendered although there are errors: a few seconds. Of more, one row says what is wrong with the base
model, and the others have their turn when the errors are mended."""


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
    anyway: bool = False,
) -> Checked:
    """Check everything that can be checked without a GPU.

    Args:
        folder: the recipe's own, which its relative references start from.
        cache: folder of what need not be computed twice; None to keep nothing.
        shown: problems of each kind that are listed; all are counted.
        show: rows to be shown token by token, at most MOST_EXAMPLES.
        thorough: render the rows although errors were found before, if they are few: for all problems at once.
        anyway: that the rows could not be rendered is a warning, not an error.

    Raises:
        DatasetInvalid: a dataset is missing or cannot be read at all.
        Unreachable: the store of a dataset is out of reach for now.
    """
    with ExitStack() as stack:

        def opened(reference: str) -> DatasetFile:
            uri = dataset_uri(reference, folder)
            return DatasetFile(reference, uri, stack.enter_context(local_copy(uri, reference)))

        train = opened(recipe.dataset.train)
        own = recipe.dataset.held_out
        held_out = opened(own) if isinstance(own, str) else None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftjob-")))
        model, failure = _look(recipe, folder, hub, variables, cache, scratch)
        control_tokens = model.control_tokens if model is not None else frozenset()
        seen = train.examine(control_tokens, shown)
        judged = held_out.examine(control_tokens, shown, few_rows=0) if held_out is not None else None
        rows = Rows(recipe, train, seen, held_out, judged)
        found = Found([seen, *([judged] if judged is not None else [])])
        if judged is not None:
            found.add(shared_rows(seen, judged))
        elif isinstance(own, float) and seen.file.rows == 1 and not seen.file.bad:
            found.add([problem_of(find("one-row"), file=train.name)])
        found.add(_of_model(recipe, model, failure))
        told, said = _render(rows, model, found, cache=cache, shown=shown, thorough=thorough, anyway=anyway)
        if failure is not None and not isinstance(failure, ModelInvalid):
            said = f"{NOT_CHECKED}{failure}"
        lengths, supervision = None, None
        if not found.has_errors:
            found.add(shared_by_split(seen, rows.held_out_places()))
            lengths = rows.lengths(told, said)
            supervision = supervision_of(recipe, told, *lengths) if told is not None else None
        elif told is not None or not said:
            said = "they are told when there are no errors"
        check = Check(
            train=seen.file,
            held_out=judged.file if judged is not None else None,
            problems=found.in_order,
            counts=dict(found.counts),
            supervision=supervision,
            not_checked="" if supervision is not None else said,
        )
        examples = rows.show(model, told, show) if told is not None and show else ()
        return Checked(check, train.uri, held_out.uri if held_out else None, model, failure, lengths, examples)


def _render(
    rows: Rows,
    model: ModelFacts | None,
    found: Found,
    *,
    cache: Path | None,
    shown: int,
    thorough: bool,
    anyway: bool,
) -> tuple[Supervised | None, str]:
    """What became of the rows, or why that is not known. What is wrong with them is added to what was found."""
    if found.has_errors and (not thorough or rows.size > THOROUGH_BYTES):
        if thorough and (problem := rows.probe(model)) is not None:
            found.add([problem])
        return None, "the rows are rendered when there are no errors"
    told, why = rows.render(model, cache=cache, shown=shown, anyway=anyway)
    if told is not None:
        found.add(told.problems, told.counts)
        return told, ""
    if isinstance(why, Problem):
        found.add([why])
        return None, "" if why.severity == "error" else "the rows could not be rendered"
    return None, why


def _look(
    recipe: Recipe, folder: Path, hub: Hub, variables: Mapping[str, str], cache: Path | None, scratch: Path
) -> tuple[ModelFacts | None, FtjobError | None]:
    """What is known of the base model, or why it cannot be had: the rows are read all the same."""
    try:
        base_model = pin(recipe.base_model, folder=folder, hub=hub)
    except FtjobError as error:
        return None, error
    keep = cache / "tokenizers" if cache is not None and base_model.ref.is_on_hub else scratch
    facts = look_at(base_model, hub=hub, variables=variables, folder=keep)
    if facts.tokenizer is not None and Path(facts.tokenizer).parent == keep:
        use(Path(facts.tokenizer))
        keep_newest(keep)
    return facts, None


def _of_model(recipe: Recipe, model: ModelFacts | None, failure: FtjobError | None) -> Iterator[Problem]:
    """What is wrong with the base model, apart from what its template does to the rows."""

    def error(code: str, message: str, hint: str) -> Problem:
        return Problem(code=code, severity="error", file="", message=message, hint=hint)

    refused = failure if isinstance(failure, ModelInvalid) else model.refused if model is not None else None
    if refused is not None:
        yield error("model", refused.message, refused.hint)
    if model is None:
        return
    shape = model.shape
    if not isinstance(shape, str) and (unknown := unknown_targets(recipe.lora, shape)):
        yield error(
            "target-modules",
            f"lora.target_modules fits nothing that can be trained in {recipe.base_model.id} with "
            f"{', '.join(map(repr, unknown))}",
            'correct it, or leave lora.target_modules out for "all-linear"',
        )
    if isinstance(model.config, str):
        return
    if (quantised := refuse_quantised(model.config, recipe.method, model=recipe.base_model.id)) is not None:
        yield error("model", quantised.message, quantised.hint)
    if recipe.training.packing and (leak := leak_of(model.config)) is not None:
        yield error(
            "packing-leaks",
            f"packed rows would see each other: base model {recipe.base_model.id} has {leak}, "
            f"which carry a state from one row into the next",
            "set training.packing to false",
        )
