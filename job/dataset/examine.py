"""A whole file at once: every line accounted for, every problem counted, in one pass over its bytes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from job.contract.check import FileCheck, Problem
from job.contract.errors import FtjobError
from job.contract.records import DatasetDigest
from job.dataset.duplicates import RowDigests, find_alike, find_equal
from job.dataset.pieces import Piece, readers
from job.dataset.problems import FEW_ROWS, Finding, find, problem_of
from job.dataset.reader import unreadable, whole_lines
from job.dataset.style import find_repeated, find_unbalanced
from job.storage import Progress

_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Examination:
    """What was found in one file.

    Args:
        name: of the file, as the recipe has it.
        problems: at most `shown` of each kind, in order of line, those of the whole file first.
        counts: lines (or rows, or 1 for the file) that have each kind of problem, listed or not.
        digests: of the rows, for `shared_rows`.
        copies: places of a row, and of one before it that is the same or nearly, in turns: for `shared_by_split`.
    """

    name: str
    file: FileCheck
    problems: tuple[Problem, ...]
    counts: dict[str, int]
    digests: RowDigests = field(repr=False)
    copies: array[int] = field(repr=False)


def examine(
    path: Path,
    *,
    name: str,
    uri: str | None = None,
    control_tokens: frozenset[str] = frozenset(),
    progress: Progress | None = None,
    shown: int = 20,
    processes: int | None = None,
    few_rows: int = FEW_ROWS,
) -> Examination:
    """Check every line of a file, and what only the whole shows; all problems at once.

    The file is read once, from its beginning to where it then ends. Every block read goes into the digest, and the
    same bytes, not the file's name, go to whoever checks them. So a file that is replaced or grows in the meantime
    cannot be checked as one thing and digested as another: what is in the digest was checked, and a run that finds
    other bytes later is refused.

    Args:
        name: what problems call the file, as the recipe does.
        uri: of the digest, if that is not the name.
        control_tokens: texts that the base model reads as more than text.
        progress: is told of bytes that have been checked.
        shown: problems of one kind that are listed.
        processes: that check; None for as many as are worth starting, 1 for this one alone.
        few_rows: fewer rows than this are worth a warning; 0 for a held-out file.

    Raises:
        DatasetInvalid: the file cannot be read.
        FtjobError: a process that checked was killed.
    """
    digest = hashlib.sha256()
    size = 0
    begins = b""

    def seen(block: bytes) -> None:
        nonlocal size, begins
        begins = begins or block[: len(_BOM)]
        digest.update(block)
        size += len(block)

    total = Piece()
    told = 0
    try:
        with path.open("rb") as file, readers(path, processes, control_tokens, shown) as reading:
            for piece in reading.all(whole_lines(file, seen, size=reading.bytes_at_once)):
                total.add(piece, shown)
                if progress is not None and (done := size - reading.waiting) > told:
                    progress(done - told)
                    told = done
    except OSError as error:
        raise unreadable(name, error) from error
    except BrokenProcessPool as error:
        raise FtjobError(
            f"dataset {name}: a process that checked it was killed", hint="the machine may be short of memory"
        ) from error
    if progress is not None and size > told:
        progress(size - told)
    rows = len(total.digests)
    found_digest = DatasetDigest(uri=uri or name, sha256=digest.hexdigest(), size=size, rows=rows)
    file_check = FileCheck(digest=found_digest, lines=total.lines, blank=total.blank, rows=rows, bad=total.bad)
    of_file = list(_of_file(total, marked=begins == _BOM, few_rows=few_rows))
    copies = _find_copies(total, shown)
    for finding, count in of_file:
        total.counts[finding.code] += count
    lines = sorted(total.found, key=lambda each: each[0])
    problems = [problem_of(finding, file=name) for finding, _ in of_file]
    problems += [problem_of(finding, file=name, line=line) for line, finding in lines]
    return Examination(name, file_check, tuple(problems), dict(total.counts), total.digests, copies)


def shared_rows(train: Examination, held_out: Examination, *, listed: int = 5) -> list[Problem]:
    """Problems of rows that are in both files; told of the held-out one, with the lines of some.

    Args:
        listed: rows whose lines are told.
    """
    both = RowDigests()
    both.extend(train.digests)
    both.extend(held_out.digests)
    border, rows = len(train.digests), len(held_out.digests)
    train_name = train.name

    def across(pairs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted((both.lines[place], both.lines[first]) for place, first in pairs if first < border <= place)

    def told(code: str, pairs: list[tuple[int, int]]) -> Problem:
        lines = ", ".join(f"line {line} (there {other})" for line, other in pairs[:listed])
        more = ", …" if len(pairs) > listed else ""
        finding = find(code, count=len(pairs), rows=rows, other=train_name, lines=lines + more)
        return problem_of(finding, file=held_out.name)

    found = []
    equal = across(find_equal(both))
    if equal:
        found.append(told("all-shared" if len(equal) == rows else "shared", equal))
    alike = across(find_alike(both))
    if alike:
        found.append(told("shared-near", alike))
    return found


def shared_by_split(rows: Examination, held_out: Collection[int], *, listed: int = 5) -> list[Problem]:
    """Problems of copies of which some are trained and others are held out.

    Args:
        held_out: places of the rows that are held out.
        listed: rows whose lines are told.
    """
    apart, lines = frozenset(held_out), rows.digests.lines
    twins: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for place, first in zip(rows.copies[0::2], rows.copies[1::2], strict=True):
        groups.setdefault(first, [first]).append(place)
    for group in groups.values():
        trained = next((place for place in group if place not in apart), None)
        if trained is not None:
            twins.update((place, trained) for place in group if place in apart)
    if not twins:
        return []
    told = ", ".join(f"line {lines[place]} (line {lines[twins[place]]})" for place in sorted(twins)[:listed])
    more = ", …" if len(twins) > listed else ""
    finding = find("shared-split", count=len(twins), rows=len(apart), lines=told + more)
    return [problem_of(finding, file=rows.name)]


def _of_file(total: Piece, *, marked: bool, few_rows: int) -> Iterator[tuple[Finding, int]]:
    """What only the whole file shows, and how many rows or lines it is about."""
    rows = len(total.digests)
    if rows == 0 and total.bad == 0:
        yield find("no-rows"), 1
    elif 0 < rows < few_rows:
        yield find("few-rows", rows=rows), 1
    yield from total.prefixes.findings()
    yield from find_unbalanced(total.digests.sizes)
    yield from find_repeated(total.digests.answers, total.digests.lines)
    for shape in ("sharegpt", "prompt-completion"):
        if total.shapes[shape]:
            yield find(shape, count=total.shapes[shape]), total.shapes[shape]
    if marked:
        yield find("byte-order-mark"), 1
    if total.crlf:
        yield find("crlf", count=total.crlf), total.crlf


def _find_copies(total: Piece, shown: int) -> array[int]:
    lines = total.digests.lines
    copies = array("I")
    for code, pairs in (("duplicate", find_equal(total.digests)), ("near-duplicate", find_alike(total.digests))):
        for pair in pairs:
            copies.extend(pair)
            total.tell(lines[pair[0]], find(code, other=lines[pair[1]]), shown)
    return copies
