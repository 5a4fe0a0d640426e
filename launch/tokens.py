"""How many tokens the rows of a dataset become where the base model's tokenizer cannot be asked: estimated from the
text of some of them. Every number says what it is. (Where it can be asked, every row is rendered: launch/checking.py.)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from job.contract.recipe import TINY_MODEL
from job.contract.records import DatasetDigest
from job.dataset.reader import Row, read_rows
from launch.steps import Lengths

MOST_ROWS: Final = 2000
"""Rows that are looked at, spread evenly: the mean of so many is known within about 1 %."""
MOST_BYTES: Final = 64 * 1024 * 1024
"""And so many bytes of them."""
BYTES_PER_TOKEN: Final = 3.9
"""UTF-8 bytes of a token where nobody can count. Vocabularies of 100 000 to 250 000 entries make 4.3-4.7 of English
prose, 3.0-3.6 of code and JSON, 3.0-3.8 of other European languages, 2.5-3.3 of Chinese and Japanese."""
ESTIMATE_SPREAD: Final = 0.15
"""One standard deviation of the above, relative."""
TOKENS_PER_TURN: Final = 5
"""What templates put around a turn: ChatML and Llama 3 both have five tokens."""

_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Sample:
    """Some lines of a dataset, spread evenly over it; all of them where they are few.

    Args:
        lines: without their ends.
        of_rows: all rows of the dataset.
        of_bytes: of all their lines, without ends and blank lines.
    """

    lines: tuple[bytes, ...] = field(repr=False)
    of_rows: int
    of_bytes: int

    @property
    def whole(self) -> bool:
        return len(self.lines) == self.of_rows


def take_sample(path: Path, digest: DatasetDigest, *, most: int = MOST_ROWS) -> Sample:
    """Lines of a file that was read and found good.

    Args:
        digest: of the file: how many rows it has.

    Raises:
        OSError: the file cannot be read any more.
    """
    lines: list[bytes] = []
    wanted = max(1, min(most, digest.rows, MOST_BYTES * digest.rows // max(1, digest.size)))
    size = row = 0
    with path.open("rb") as file:
        for raw in file:
            line = (raw.removeprefix(_BOM) if row == 0 else raw).strip()
            if not line:
                continue
            # The middle row of each of `wanted` equal parts.
            if len(lines) < wanted and row == (2 * len(lines) + 1) * digest.rows // (2 * wanted):
                lines.append(line)
            size += len(line)
            row += 1
    return Sample(tuple(lines), row, size)


def measure(sample: Sample, *, base_model: str, why: str) -> Lengths:
    """How long the rows of a sample are.

    Args:
        base_model: id; the built-in model's tokens are its bytes, and need no tokenizer.
        why: the base model's tokenizer is not asked.
    """
    with tempfile.TemporaryDirectory(prefix="ftjob-") as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(sample.lines) + b"\n")
        rows = list(read_rows(path, name="sample"))
    if base_model == TINY_MODEL:
        return _lengths(sample, [_tiny_tokens(row) for row in rows], how="the built-in tokenizer")
    found = _lengths(sample, [estimate(row) for row in rows], how="")
    return replace(
        found,
        how="estimated",
        spread=math.hypot(found.spread, ESTIMATE_SPREAD),
        basis=f"estimated at {BYTES_PER_TOKEN} bytes of text a token, ±{ESTIMATE_SPREAD:.0%}: {why}",
    )


def counted(tokens: Sequence[int], size: int, *, how: str) -> Lengths:
    """The lengths of rows that were all rendered.

    Args:
        size: of the file, in bytes.
        how: with which tokenizer.
    """
    return Lengths(tuple(tokens), (), len(tokens), size, "counted", 0.0, f"all {len(tokens):,} rows counted with {how}")


def estimate(row: Row) -> int:
    """Tokens of a row, by the length of its text."""
    text = sum(len(message.content.encode()) for message in row.messages)
    return round(text / BYTES_PER_TOKEN) + TOKENS_PER_TURN * len(row.messages) + 1


def _tiny_tokens(row: Row) -> int:
    """One token a byte, and ChatML: <|im_start|>, the role and its line end, the text, <|im_end|>, a line end. A test
    holds it to what the job renders."""
    return sum(4 + len(message.role) + len(message.content.encode()) for message in row.messages)


def _lengths(sample: Sample, tokens: Sequence[int], *, how: str) -> Lengths:
    sizes = [len(line) for line in sample.lines]
    if sample.whole:
        basis = f"all {sample.of_rows:,} rows counted with {how}"
        return Lengths(tuple(tokens), tuple(sizes), sample.of_rows, sample.of_bytes, "counted", 0.0, basis)
    spread = ratio_error(tokens, sizes, of=sample.of_rows)
    basis = f"sampled {len(tokens):,} of {sample.of_rows:,} rows with {how} (standard error {spread:.1%})"
    return Lengths(tuple(tokens), tuple(sizes), sample.of_rows, sample.of_bytes, "sampled", spread, basis)


def ratio_error(tokens: Sequence[int], sizes: Sequence[int], *, of: int) -> float:
    """Relative standard error of tokens per byte in a sample of n among `of` rows.

    Source: Cochran, Sampling Techniques, 3rd edition 1977, chapter 6: the ratio estimator.
    """
    count, total = len(tokens), sum(tokens)
    if count < 2 or total == 0:
        return 1.0
    ratio = total / sum(sizes)
    rest = sum((t - ratio * s) ** 2 for t, s in zip(tokens, sizes, strict=True)) / (count - 1)
    return math.sqrt(count * rest * (1 - count / of)) / total
