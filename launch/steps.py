"""From the lengths of rows to what the job will compute: sequences, steps, tokens, padding. Pure.

It follows job/loading.py (cut, then split), job/batches.py (packing) and job/train.py (steps).
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from job.contract.recipe import Recipe
from job.contract.records import Part
from launch.roofline import Batch, batch_of

PACKED_AT_ONCE: Final = 1000
"""Rows that TRL packs together (`datasets.map` in batches, the default of trl.data_utils.pack_dataset)."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row of a sample, uncut.

    Args:
        tokens: of each row.
        sizes: bytes of each row's line: tokens of the whole are bytes of the whole times tokens per byte.
        spread: one standard deviation of tokens per byte, relative.
        basis: how they were found, for people.
    """

    tokens: tuple[int, ...] = field(repr=False)
    sizes: tuple[int, ...] = field(repr=False)
    of_rows: int
    of_bytes: int
    how: Literal["counted", "sampled", "estimated"]
    spread: float
    basis: str

    @property
    def whole(self) -> bool:
        """Whether every row of the dataset is among them, in its order."""
        return len(self.tokens) == self.of_rows

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row; None where not all are known."""
        return max(self.tokens, default=None) if self.whole else None


class Work(Part):
    """What a recipe trains on a dataset."""

    tokens_per_epoch: int
    """Real ones, after cutting; padding is in `batch`."""
    sequences: int
    steps_per_epoch: int
    steps: int
    evaluated_batches: int
    """Micro-batches of held-out rows in each epoch."""
    batch_tokens: float
    """Of a mean micro-batch, padding included."""
    attended: float
    within: float
    masked: bool
    longest: int
    """Tokens of the longest row, as far as it is known: else max_length."""
    cut_share: float
    """Of the rows, those longer than max_length."""
    spread: float
    """One standard deviation of the number of tokens, relative."""
    basis: str

    @property
    def batch(self) -> Batch:
        return Batch(self.batch_tokens, self.attended, self.within, masked=self.masked)


def work_of(recipe: Recipe, train: Lengths, held_out: Lengths | None) -> Work:
    """What will be computed.

    Args:
        train, held_out: of the recipe's two files; `held_out` is None where a fraction of the first is, or nothing.
    """
    training = recipe.training
    cut = [min(length, training.max_length) for length in train.tokens]
    share = recipe.dataset.held_out if isinstance(recipe.dataset.held_out, float) else 0.0
    if share and train.whole:
        cut, judged = _split(cut, share, training.seed)
        trained = _sequences(recipe, cut)
        sequences, tokens = len(trained), sum(cut)
        evaluated = len(_sequences(recipe, judged))
    else:
        trained = _sequences(recipe, cut)
        scale = _whole_over_sample(train)
        sequences, tokens = max(1, round(len(trained) * scale * (1 - share))), round(sum(cut) * scale * (1 - share))
        evaluated = round(len(trained) * scale * share)
    if held_out is not None:
        own = _sequences(recipe, [min(length, training.max_length) for length in held_out.tokens])
        evaluated = max(1, round(len(own) * _whole_over_sample(held_out)))
    batches = math.ceil(sequences / training.batch_size)
    steps = math.ceil(batches / training.gradient_accumulation)
    batch = _mean_batch(recipe, cut, trained, batches, sequences)
    return Work(
        tokens_per_epoch=tokens,
        sequences=sequences,
        steps_per_epoch=steps,
        steps=steps * training.epochs,
        evaluated_batches=math.ceil(evaluated / training.batch_size),
        batch_tokens=batch.tokens,
        attended=batch.attended,
        within=batch.within,
        masked=batch.masked,
        longest=max(cut, default=1) if train.whole else training.max_length,
        cut_share=sum(length > training.max_length for length in train.tokens) / len(train.tokens),
        spread=train.spread,
        basis=train.basis,
    )


def pack(lengths: Sequence[int], size: int) -> list[int]:
    """Lengths of the sequences that best-fit decreasing makes of rows: each goes where least room is left.

    Source: trl 1.16, `trl.data_utils.pack_dataset(strategy="bfd")`; a test packs the same rows with both.
    """
    packed: list[int] = []
    for start in range(0, len(lengths), PACKED_AT_ONCE):
        room: list[int] = []  # of open sequences, sorted
        for length in sorted(lengths[start : start + PACKED_AT_ONCE], reverse=True):
            at = bisect.bisect_left(room, length)
            left = room.pop(at) if at < len(room) else size
            if left == length:
                packed.append(size)
            else:
                bisect.insort(room, left - length)
        packed += [size - left for left in room]
    return packed


def _sequences(recipe: Recipe, cut: Sequence[int]) -> list[int]:
    return pack(cut, recipe.training.max_length) if recipe.training.packing else list(cut)


def _split(cut: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """As job.dataset.split.split chooses: a test holds it to that."""
    if len(cut) < 2:
        return cut, []
    count = min(max(1, round(len(cut) * share)), len(cut) - 1)
    chosen = set(random.Random(seed).sample(range(len(cut)), count))
    return [c for i, c in enumerate(cut) if i not in chosen], [c for i, c in enumerate(cut) if i in chosen]


def _whole_over_sample(lengths: Lengths) -> float:
    """By bytes, which are known of the whole: closer than by rows."""
    return 1.0 if lengths.whole else lengths.of_bytes / sum(lengths.sizes)


def _mean_batch(recipe: Recipe, rows: Sequence[int], sequences: Sequence[int], batches: int, count: int) -> Batch:
    """The mean micro-batch. Packed sequences are laid end to end; others are padded to the longest of their batch."""
    training = recipe.training
    size = count / batches  # the last one may be smaller
    if training.packing:
        mean = sum(sequences) / len(sequences)
        row = sum(length**2 for length in rows) / sum(rows)  # that the mean token is in
        return batch_of(1, mean * size, packing=True, row=row)
    longest = _mean_longest(sorted(sequences), training.batch_size)
    return batch_of(1, longest, packing=False)._replace(tokens=longest * size)


def _mean_longest(ordered: Sequence[int], drawn: int) -> float:
    """Mean of the longest of `drawn` rows, of these in rising order, with replacement."""
    count = len(ordered)
    return sum(length * (((i + 1) / count) ** drawn - (i / count) ** drawn) for i, length in enumerate(ordered))
