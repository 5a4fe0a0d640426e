"""JSONL to rows. Every line is a row, blank, or an error with its number; nothing is dropped in silence."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NewType

from job.contract.errors import DatasetInvalid, FtjobError
from job.contract.records import DatasetDigest
from job.dataset.problems import find
from job.dataset.schema import MOST_LINE, parse
from job.dataset.schema import ROLES as ROLES
from job.dataset.schema import Role as Role
from job.storage import Progress

READ_BYTES: Final = 1024 * 1024
"""Of one read, and of one step of a progress bar."""
_READABLE: Final = "name a JSONL file that you may read"

LineNumber = NewType("LineNumber", int)
"""Of a row in its file, from 1: what an editor shows."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Row:
    """One conversation and the line it stands on."""

    line: LineNumber
    messages: tuple[Message, ...]


class LineRefused(FtjobError):
    """A line is not a row; the message does not say which file and line.

    Args:
        code: the kind of problem, of job.dataset.problems.KINDS.
    """

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


def read_line(raw: bytes, number: int) -> Row | None:
    """The row of a line; None for a blank one.

    Args:
        raw: the line with its end.
        number: from 1.

    Raises:
        LineRefused: it is no row; tells the first reason of perhaps several.
    """
    parsed = parse(raw, number)
    if parsed is None:
        return None
    for finding in parsed.findings:
        if finding.is_error:
            raise LineRefused(finding.code, finding.message, hint=finding.hint)
    return Row(LineNumber(number), tuple(Message(role, content) for role, content in parsed.turns))


def read_rows(path: Path, *, name: str) -> Iterator[Row]:
    """The rows of a JSONL file, in order; `name` is what errors call it.

    Blank lines are skipped; a byte order mark and CRLF line ends are accepted.

    Raises:
        DatasetInvalid: at the first line that is not a row, with its number.
    """
    try:
        with path.open("rb") as file:
            yield from _rows(file, name, lambda _: None)
    except OSError as error:
        raise unreadable(name, error) from error


def fingerprint(path: Path, *, name: str, progress: Progress | None = None) -> DatasetDigest:
    """Validate every row, and digest the file's bytes: the very bytes that were validated, in one pass.

    Raises:
        DatasetInvalid: a line is not a row, or there is none.
    """
    digest = hashlib.sha256()
    size = 0

    def seen(block: bytes) -> None:
        nonlocal size
        digest.update(block)
        size += len(block)
        if progress is not None:
            progress(len(block))

    try:
        with path.open("rb") as file:
            rows = sum(1 for _ in _rows(file, name, seen))
    except OSError as error:
        raise unreadable(name, error) from error
    if rows == 0:
        raise DatasetInvalid(f"dataset {name} has no rows", hint=find("no-rows").hint)
    return DatasetDigest(uri=name, sha256=digest.hexdigest(), size=size, rows=rows)


def whole_lines(file: BinaryIO, seen: Callable[[bytes], None], *, size: int = READ_BYTES) -> Iterator[bytes]:
    """A file in pieces that end where a line ends, but for the last, which ends where the file does.

    Of a line longer than MOST_LINE only so much is kept that it is seen to be too long.

    Args:
        seen: told of every block of bytes that was read, in order.
        size: bytes of a read, and about the size of a piece.
    """
    rest, skipping = b"", False
    while block := file.read(size):
        seen(block)
        if skipping:
            _, end, block = block.partition(b"\n")
            skipping = not end
        rest += block
        if cut := rest.rfind(b"\n") + 1:
            yield rest[:cut]
            rest = rest[cut:]
        if len(rest) > MOST_LINE:
            yield rest[:MOST_LINE] + b"\n"
            rest, skipping = b"", True
    if rest:
        yield rest


def unreadable(name: str, error: OSError) -> DatasetInvalid:
    """What an error of the file system is called."""
    return DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}", hint=_READABLE)


def _rows(file: BinaryIO, name: str, seen: Callable[[bytes], None]) -> Iterator[Row]:
    number = 0
    for piece in whole_lines(file, seen):
        for raw in io.BytesIO(piece):  # splits at line feeds alone
            number += 1
            try:
                row = read_line(raw, number)
            except LineRefused as refused:
                message = f"dataset {name} line {number}: {refused.message}"
                raise DatasetInvalid(message, hint=refused.hint) from refused
            if row is not None:
                yield row
