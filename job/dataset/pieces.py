"""A file's lines, checked piece by piece: in this process, or in several. They import job.dataset and what it needs."""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from job.dataset.duplicates import RowDigests
from job.dataset.problems import Finding
from job.dataset.reader import READ_BYTES
from job.dataset.schema import Parsed, parse
from job.dataset.style import Prefixes, tokens_in
from job.dataset.workers import cores, worker_pool

SMALL: Final = 32 * 1024 * 1024
"""Bytes of a file that is checked in this process: 2 s, and others would take 0.3 s to start."""
MOST_PROCESSES: Final = 8
PIECE_BYTES: Final = 2 * 1024 * 1024
"""That a process is sent at once."""


@dataclass
class Piece:
    """What one piece of a file holds. Built where it is read, and sent to who asked."""

    lines: int = 0
    blank: int = 0
    bad: int = 0
    crlf: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    found: list[tuple[int, Finding]] = field(default_factory=list)
    prefixes: Prefixes = field(default_factory=Prefixes)
    digests: RowDigests = field(default_factory=RowDigests)

    def add(self, after: Piece, shown: int) -> None:
        """Append what comes behind."""
        self.lines += after.lines
        self.blank += after.blank
        self.bad += after.bad
        self.crlf += after.crlf
        for line, finding in after.found:
            self.tell(line, finding, shown)
        # Those that the piece counted and did not list.
        self.counts.update(after.counts - Counter(finding.code for _, finding in after.found))
        self.shapes.update(after.shapes)
        self.prefixes.add(after.prefixes)
        self.digests.extend(after.digests)

    def tell(self, line: int, finding: Finding, shown: int) -> None:
        """Count a problem, and list it while its kind has few."""
        self.counts[finding.code] += 1
        if self.counts[finding.code] <= shown:
            self.found.append((line, finding))

    def read(self, raw: bytes, number: int, control_tokens: frozenset[str], shown: int) -> None:
        """Take one line."""
        self.lines += 1
        self.crlf += raw.endswith(b"\r\n")
        parsed = parse(raw, number)
        if parsed is None:
            self.blank += 1
            return
        if parsed.turns and control_tokens:
            parsed.findings.extend(tokens_in(parsed.turns, control_tokens, first=parsed.first))
        for finding in parsed.findings:
            self.tell(number, finding, shown)
        if parsed.findings and not parsed.is_row:
            self.bad += 1
        else:
            self._keep(parsed, number)

    def _keep(self, parsed: Parsed, number: int) -> None:
        self.shapes[parsed.shape] += 1
        self.prefixes.see(parsed.turns)
        self.digests.add(number, parsed.turns)


@dataclass
class Reading:
    """Gives pieces to who checks them, and takes back what they found, in order.

    Args:
        pool: None where this process does it.
        most: pieces that are under way: enough that nobody waits, and few enough for the memory.
        waiting: bytes that have been read and not checked.
    """

    control_tokens: frozenset[str]
    shown: int
    pool: ProcessPoolExecutor | None
    most: int
    waiting: int = 0

    @property
    def bytes_at_once(self) -> int:
        """Of a piece: few where there is nobody to send it to, for a progress bar that moves."""
        return PIECE_BYTES if self.pool else READ_BYTES

    def all(self, pieces: Iterator[bytes]) -> Iterator[Piece]:
        """What was found in each piece, in their order."""
        queue: deque[tuple[int, Future[Piece]]] = deque()
        number = 1
        for data in pieces:
            if self.pool is None:
                found = read_piece(data, number, self.control_tokens, self.shown)
                number += found.lines
                yield found
                continue
            queue.append((len(data), self.pool.submit(read_piece, data, number, self.control_tokens, self.shown)))
            self.waiting += len(data)
            number += data.count(b"\n")
            if len(queue) > self.most:
                yield self._next(queue)
        while queue:
            yield self._next(queue)

    def _next(self, queue: deque[tuple[int, Future[Piece]]]) -> Piece:
        size, future = queue.popleft()
        found = future.result()
        self.waiting -= size
        return found


@contextmanager
def readers(path: Path, processes: int | None, control_tokens: frozenset[str], shown: int) -> Iterator[Reading]:
    """Who checks a file, for as long as it takes.

    Args:
        processes: as `examine` has it.
    """
    if processes is None:
        processes = min(cores(), MOST_PROCESSES) if path.stat().st_size > SMALL else 1
    if processes <= 1:
        yield Reading(control_tokens, shown, None, 0)
        return
    pool = worker_pool(processes)
    try:
        yield Reading(control_tokens, shown, pool, 2 * processes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_piece(data: bytes, number: int, control_tokens: frozenset[str], shown: int) -> Piece:
    """What the lines of a piece hold; `number` is its first line's."""
    piece = Piece()
    for line, raw in enumerate(io.BytesIO(data), start=number):
        piece.read(raw, line, control_tokens, shown)
    return piece
