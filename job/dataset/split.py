"""The two parts of a dataset: which rows are trained and which are held out, and one digest over both."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from job.contract.errors import DatasetInvalid

T = TypeVar("T")


def split(rows: Sequence[T], *, held_out: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held-out): the fraction `held_out` of the rows, at least one of each, chosen by the seed.

    Raises:
        DatasetInvalid: fewer than two rows.
    """
    if len(rows) < 2:
        raise DatasetInvalid(
            "one row cannot be split into train and held-out", hint="add rows, or set dataset.held_out to null"
        )
    count = min(max(1, round(len(rows) * held_out)), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


class Digested(Protocol):
    """A rendered row, or what is kept of one."""

    @property
    def digest(self) -> bytes: ...


def tokens_digest(train: Iterable[Digested], held_out: Iterable[Digested]) -> str:
    """Sha256 over every token and label of both parts, in order: what is trained and what it is judged by."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(b"part\n")
        for row in part:
            digest.update(row.digest)
    return digest.hexdigest()
