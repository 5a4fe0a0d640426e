"""Renders a dataset with the base model's own tokenizer, for the launcher: `python -P -m job.supervise`.

Reads one job.contract.supervision.Ask on stdin; prints Said lines on stdout, of which the last has the answer. A
process of its own, since the launcher never loads the training stack. What is wrong with rows or base model is part of
the answer; the exit code is 0 wherever there is one.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from job.contract.check import Problem, Severity
from job.contract.errors import ModelInvalid
from job.contract.recipe import TINY_MODEL
from job.contract.supervision import MOST_EXAMPLES, Answer, Ask, Said, ShownRow, Supervised, Token
from job.dataset.reader import LineRefused, Row, read_line
from job.dataset.refused import RowRefused
from job.dataset.render import Renderer
from job.dataset.split import split, tokens_digest
from job.tokenising import Measured, Refusal, Rendering, measure_rows, processes_for, without_torch

PROGRESS_BYTES: Final = 500_000


def answer(ask: Ask, say: Callable[[int], None]) -> Answer:
    """What is asked for.

    Args:
        say: told of bytes that were read.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        with _folder(ask.tokenizer) as folder:
            rendering = Rendering(folder, ask.max_length)
            renderer = rendering.open()
            if ask.lines:
                return Answer(shown=_show(ask, renderer))
            return Answer(supervised=_supervise(ask, rendering, renderer, say))
    except ModelInvalid as error:
        return Answer(refused=Problem(code="model", severity="error", file="", message=error.message, hint=error.hint))


@contextmanager
def _folder(tokenizer: str) -> Iterator[Path]:
    if tokenizer != TINY_MODEL:
        yield Path(tokenizer)
        return
    from job.tiny import write_tiny_model

    with tempfile.TemporaryDirectory(prefix="ftjob-") as folder:
        write_tiny_model(Path(folder))
        yield Path(folder)


@dataclass
class _Problems:
    """The first of each kind, and how many there are. Of warnings that say the same of many rows, the first alone."""

    shown: int
    found: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    warned: set[tuple[str, str]] = field(default_factory=set)

    def add(self, severity: Severity, file: str, line: int | None, code: str, message: str, hint: str) -> None:
        self.counts[code] += 1
        if self.counts[code] <= self.shown and (severity == "error" or (file, message) not in self.warned):
            self.warned.add((file, message))
            problem = Problem(code=code, severity=severity, file=file, line=line, message=message, hint=hint)
            self.found.append(problem)


@dataclass
class _Part:
    """The rows of a file, a few numbers each."""

    path: Path
    name: str
    sha256: str = ""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    """Of every row, refused ones included."""
    rows: list[Measured] = field(default_factory=list)

    def read(self, say: Callable[[int], None]) -> Iterator[Row]:
        """Those rows that can be read; the launcher has told of the others."""
        digest, size = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                digest.update(raw)
                size += len(raw)
                if size >= PROGRESS_BYTES:
                    say(size)
                    size = 0
                try:
                    row = read_line(raw, number)
                except LineRefused:
                    continue
                if row is not None:
                    yield row
        say(size)
        self.sha256 = digest.hexdigest()

    def measure(self, rendering: Rendering, problems: _Problems, say: Callable[[int], None]) -> None:
        processes = processes_for(self.path.stat().st_size)
        for each in measure_rows(self.read(say), rendering, processes=processes):
            if isinstance(each, Refusal):
                problems.add("error", self.name, each.line, each.code, each.message, each.hint)
                self.lengths.append(0)
                continue
            for code, message, hint in each.warnings:
                problems.add("warning", self.name, each.line, code, message, hint)
            self.lengths.append(each.whole)
            self.rows.append(each)


def _supervise(ask: Ask, rendering: Rendering, renderer: Renderer, say: Callable[[int], None]) -> Supervised:
    problems = _Problems(ask.shown)
    for code, message, hint in renderer.notices:
        problems.add("notice", "", None, code, message, hint)
    train = _Part(Path(ask.train), ask.train_name)
    train.measure(rendering, problems, say)
    own = None
    if ask.held_out is not None:
        own = _Part(Path(ask.held_out), ask.held_out_name)
        own.measure(rendering, problems, say)
    rows, held_out = train.rows, own.rows if own is not None else []
    if ask.share is not None and len(rows) > 1:
        rows, held_out = split(rows, held_out=ask.share, seed=ask.seed)
    return Supervised(
        train_sha256=train.sha256,
        held_out_sha256=own.sha256 if own is not None else None,
        problems=tuple(problems.found),
        counts=dict(problems.counts),
        lengths=tuple(train.lengths),
        held_out_lengths=tuple(own.lengths) if own is not None else (),
        rows=len(rows),
        held_out_rows=len(held_out),
        tokens=sum(row.kept for row in rows),
        trained_tokens=sum(row.trained for row in rows),
        cut_rows=sum(row.kept < row.whole for row in rows),
        stop_tokens=renderer.stop_texts,
        masked_by=renderer.masked_by,
        tokens_sha256=tokens_digest(rows, held_out),
        examples=examples(train.rows),
    )


def examples(rows: Sequence[Measured]) -> tuple[int, ...]:
    """Lines worth showing: the first row, the longest, the shortest, and then others, drawn the same way every time."""
    if not rows:
        return ()
    by_length = sorted(rows, key=lambda row: (row.whole, row.line))
    others = random.Random(0).sample(range(len(rows)), min(len(rows), MOST_EXAMPLES))
    lines = [rows[0].line, by_length[-1].line, by_length[0].line, *(rows[i].line for i in others)]
    return tuple(dict.fromkeys(lines))[:MOST_EXAMPLES]


def _show(ask: Ask, renderer: Renderer) -> tuple[ShownRow, ...]:
    """The lines asked for, in that order; those that cannot be rendered are left out."""
    found: dict[int, ShownRow] = {}
    last = max(ask.lines)
    for row in _Part(Path(ask.train), ask.train_name).read(lambda _: None):
        if row.line > last:
            break
        if row.line not in ask.lines:
            continue
        try:
            rendered = renderer.render(row)
        except RowRefused:
            continue
        spans = renderer.spans_of(row)
        tokens = tuple(Token(text=text, trained=trained, is_stop=is_stop) for text, trained, is_stop in spans)
        found[row.line] = ShownRow(line=row.line, tokens=tokens, of_tokens=rendered.whole)
    return tuple(found[line] for line in ask.lines if line in found)


def main() -> int:
    """Exit code 0 with an answer on stdout; 1 with a line on stderr."""
    without_torch()

    def tell(said: Said) -> None:
        sys.stdout.write(said.model_dump_json(exclude_defaults=True) + "\n")
        sys.stdout.flush()

    try:
        ask = Ask.model_validate_json(sys.stdin.read())
        tell(Said(answer=answer(ask, lambda count: tell(Said(bytes_done=count)))))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BrokenProcessPool:
        sys.stderr.write("a process that rendered rows was killed: the machine may be short of memory\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
