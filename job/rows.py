"""The rows of a run, as the job finds them: examined again, rendered, and held to what the launcher's check found.

All of it happens before the base model's weights are brought here: what is wrong with rows must not wait for a download
that is paid for by the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.check import Problem
from job.contract.errors import DatasetInvalid, FtjobError, IdentityMismatch, TrainingFailed
from job.contract.records import DatasetDigest, RunRecord
from job.dataset.control import control_tokens
from job.dataset.examine import Examination, examine, shared_rows
from job.dataset.reader import Row, read_rows
from job.dataset.render import RenderedRow
from job.dataset.split import split, tokens_digest
from job.logs import get_logger
from job.passport import versions
from job.tokenising import Refusal, Rendering, processes_for, render_rows

SHOWN: Final = 10
"""Problems that one message lists."""


@dataclass(frozen=True)
class Rows:
    """Rendered rows: what is trained, and what it is judged by."""

    train: list[RenderedRow]
    held_out: list[RenderedRow]


@dataclass(frozen=True)
class Files:
    """The dataset's files on this machine; `held_out` is None when a fraction is held out, or nothing."""

    train: Path
    held_out: Path | None


def prepare(record: RunRecord, files: Files, folder: Path, *, go_on: Callable[[], None]) -> Rows:
    """Examine, render and split.

    Args:
        folder: with the base model's configuration and tokenizer; no weights are read.
        go_on: called between rows; raises when this attempt has to end.

    Raises:
        DatasetInvalid: rows cannot be trained; names the first of them, and counts all.
        ModelInvalid: the tokenizer or its chat template cannot be used.
        IdentityMismatch: the tokens are not those that the launcher's check saw.
        TrainingFailed: a process that rendered was killed.
    """
    try:
        _examine(record, files, folder)
        go_on()
        rows = _render(record, files, folder, go_on)
    except BrokenProcessPool as error:
        go_on()  # whoever stops this process may stop those beside it a moment earlier
        raise TrainingFailed(
            "a process that rendered the dataset was killed", hint="the machine may be short of memory"
        ) from error
    except FtjobError:
        go_on()
        raise
    found = tokens_digest(rows.train, rows.held_out)
    if record.tokens_sha256 is not None and found != record.tokens_sha256:
        raise IdentityMismatch(
            f"the rows rendered here are not the tokens that were checked at the launch: sha256 {found[:12]}… instead "
            f"of {record.tokens_sha256[:12]}…; the launcher was ftjob {record.ftjob}, and here are {_versions()}",
            hint="the same ftjob and transformers on both sides render the same: upgrade the one that is behind, or "
            "launch again",
        )
    get_logger().info("rows.rendered", rows=len(rows.train), held_out=len(rows.held_out), tokens_sha256=found)
    return rows


def _examine(record: RunRecord, files: Files, folder: Path) -> None:
    control = control_tokens(folder)

    def look(path: Path, digest: DatasetDigest) -> Examination:
        return examine(path, name=digest.uri, control_tokens=control, shown=SHOWN, few_rows=0)

    train = look(files.train, record.train)
    found = [train]
    problems = list(train.problems)
    if files.held_out is not None and record.held_out is not None:
        held_out = look(files.held_out, record.held_out)
        found.append(held_out)
        problems += [*held_out.problems, *shared_rows(train, held_out)]
    errors = [problem for problem in problems if problem.severity == "error"]
    codes = {problem.code for problem in errors}
    counted = sum(count for one in found for code, count in one.counts.items() if code in codes)
    _refuse(errors, max(counted, len(errors)))


def _render(record: RunRecord, files: Files, folder: Path, go_on: Callable[[], None]) -> Rows:
    recipe = record.recipe
    rendering = Rendering(folder, recipe.training.max_length)
    refused: list[Problem] = []

    def rendered(path: Path, digest: DatasetDigest) -> Iterator[RenderedRow]:
        rows = _watched(read_rows(path, name=digest.uri), go_on)
        for each in render_rows(rows, rendering, processes=processes_for(path.stat().st_size)):
            if isinstance(each, Refusal):
                refused.append(_problem(each, digest.uri))
            else:
                yield each

    train = list(rendered(files.train, record.train))
    held_out = (
        list(rendered(files.held_out, record.held_out))
        if files.held_out is not None and record.held_out is not None
        else []
    )
    _refuse(refused, len(refused))
    if isinstance(recipe.dataset.held_out, float):
        train, held_out = split(train, held_out=recipe.dataset.held_out, seed=recipe.training.seed)
    return Rows(train, held_out)


def _problem(refusal: Refusal, file: str) -> Problem:
    return Problem(
        code=refusal.code,
        severity="error",
        file=file,
        line=refusal.line,
        message=refusal.message,
        hint=refusal.hint,
    )


def _watched(rows: Iterable[Row], go_on: Callable[[], None]) -> Iterator[Row]:
    for row in rows:
        go_on()
        yield row


def _refuse(errors: Sequence[Problem], count: int) -> None:
    """Raise DatasetInvalid for these, if there are any; `count` of them were found in all."""
    if not errors:
        return
    listed = "; ".join(error.text for error in errors[:SHOWN])
    more = f"; and {count - SHOWN:,} more" if count > SHOWN else ""
    hints = list(dict.fromkeys(error.hint for error in errors[:SHOWN] if error.hint))
    raise DatasetInvalid(f"dataset {listed}{more}", hint="; ".join(hints[:3]))


def _versions() -> str:
    here = versions()
    return f"ftjob {here.ftjob}, transformers {here.transformers}, tokenizers {here.tokenizers}"
