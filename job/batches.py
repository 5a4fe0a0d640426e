"""Rendered rows to batches: packing, order, collation, and the ledger of which rows each batch trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from job.dataset.render import IGNORED, RenderedRow
from job.memory import take_peak
from job.utilisation import Utilisation, pairs


@dataclass(frozen=True)
class Ledger:
    """What a batch is made of. `rows` are line numbers; `tokens` without padding; `trained` carry a loss; `pairs` of
    tokens see each other."""

    rows: tuple[int, ...]
    tokens: int
    trained: int
    pairs: int


@dataclass(frozen=True)
class Metered(Ledger):
    """What several batches are made of together, the seconds they took, and the peak of the GPU's memory meanwhile."""

    seconds: float
    memory_bytes: int | None
    """None without a GPU."""
    mfu: float | None
    """Share of the GPU's bf16 arithmetic, 0 to 1; None where the GPU or the model's cost is unknown."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class StepMeter:
    """Adds up what goes through the model, from one look to the next. It never waits for the GPU: a step's time is
    right if whoever looks has its loss already."""

    def __init__(self, utilisation: Utilisation | None = None) -> None:
        self._utilisation = utilisation
        self._ledgers: list[Ledger] = []
        self._started = time.monotonic()
        self._seen = 0
        self.usual_seconds = 0.0
        """Of a step, smoothed; 0 before the second, since the first warms everything up."""

    def add(self, ledger: Ledger) -> None:
        """One batch."""
        self._ledgers.append(ledger)

    def take(self) -> Metered:
        """Everything since the last take."""
        ledgers, self._ledgers = self._ledgers, []
        began, self._started = self._started, time.monotonic()
        seconds = self._started - began
        if ledgers:
            self._seen += 1
            if self._seen == 2:
                self.usual_seconds = seconds
            elif self._seen > 2:
                self.usual_seconds += (seconds - self.usual_seconds) / 8
        tokens, seen = sum(ledger.tokens for ledger in ledgers), sum(ledger.pairs for ledger in ledgers)
        known = self._utilisation if tokens and seconds > 0 else None
        return Metered(
            rows=tuple(row for ledger in ledgers for row in ledger.rows),
            tokens=tokens,
            trained=sum(ledger.trained for ledger in ledgers),
            pairs=seen,
            seconds=seconds,
            memory_bytes=take_peak(),
            mfu=known.of(tokens, seen, seconds) if known else None,
        )


def to_dataset(rows: Sequence[RenderedRow], *, packing: bool, max_length: int) -> Dataset:
    """The rows as the columns TRL's collator reads, plus `line`: for each token the row it comes from.

    Packing is TRL's best-fit decreasing: rows stay whole, and `seq_lengths` keeps them apart in attention.
    """
    dataset = Dataset.from_dict(
        {
            "input_ids": [list(row.ids) for row in rows],
            "labels": [list(row.labels) for row in rows],
            "line": [[row.line] * len(row.ids) for row in rows],
        }
    )
    return pack_dataset(dataset, max_length, "bfd") if packing else dataset


def example_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each example, in order."""
    # The columns' own offsets: the tokens of a million rows need not become Python's to be counted.
    chunks = dataset.data.column("input_ids").chunks
    return [length for chunk in chunks for length in chunk.value_lengths().to_pylist()]


@dataclass(frozen=True)
class Route:
    """A batch as the fast path takes it: all tokens in one line. Made on the CPU, so that no step waits for the GPU to
    learn how long its documents are.

    Args:
        documents: their lengths, padding included.
        positions: (P), int64, the tokens from which a trained one is predicted; targets: (P), which those are.
    """

    documents: tuple[int, ...]
    positions: torch.Tensor
    targets: torch.Tensor

    def pin_memory(self) -> Route:
        """From where a GPU can take it by itself. The data loader calls it."""
        return Route(self.documents, self.positions.pin_memory(), self.targets.pin_memory())


def _lengths(example: dict[str, Any]) -> Sequence[int]:
    """Of the rows in it."""
    found: Sequence[int] = example.get("seq_lengths", (len(example["input_ids"]),))
    return found


def _route(labels: torch.Tensor, examples: Sequence[dict[str, Any]]) -> Route:
    """Of labels of shape (rows, tokens): padded, or one row of packed examples."""
    if len(labels) == len(examples) and "seq_lengths" not in examples[0]:
        documents = (labels.shape[1],) * len(labels)
    else:
        documents = tuple(n for each in examples for n in _lengths(each))
    flat = labels.flatten().clone()
    starts = torch.tensor((0, *documents[:-1])).cumsum(0)
    flat[starts] = IGNORED  # nothing before it in its document
    [trained] = torch.nonzero(flat != IGNORED, as_tuple=True)
    return Route(documents, trained - 1, flat[trained])


class Collator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator, and a ledger and a route beside the tensors (ordinary objects: they stay on the CPU)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["route"] = _route(batch["labels"], examples)
        batch["ledger"] = Ledger(
            rows=tuple(sorted({line for example in examples for line in example["line"]})),
            tokens=sum(len(example["input_ids"]) for example in examples),
            trained=int((batch["labels"][:, 1:] != IGNORED).sum()),
            pairs=sum(pairs(_lengths(example)) for example in examples),
        )
        return batch


class EpochOrder(Sampler[int]):
    """A fresh order each epoch, a function of (seed, epoch) alone: the same whoever asks, and whenever."""

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is, from 0. The data loader calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._length)
        return iter(order.tolist())
