"""Dropout of what an adapter reads, without a mask in memory: whether a number is kept is computed from where it is.

The backward pass asks again and gets the same answer, on every GPU and on a CPU. The linears that share an input share
what is dropped of it; PEFT draws for each of them, which is the same for each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BITS: Final = 24
"""Of the hash that are compared: a probability is met to 2^-24."""
_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Of one input in one batch. `probability`: of being dropped; `seed`: less than 2^31."""

    probability: float
    seed: int

    @property
    def threshold(self) -> int:
        """Hashes below are dropped."""
        return round(self.probability * 2**BITS)

    @property
    def factor(self) -> float:
        """What is kept is multiplied by it."""
        return 1 / (1 - self.probability)

    def of(self, number: int) -> Dropout:
        """Another, for the input of this number."""
        return Dropout(self.probability, _mixed(self.seed ^ _mixed(number)) >> 1)

    def kept(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns), true or false."""
        row = _mixed_all(torch.arange(rows, device=device) ^ self.seed)
        found = _mixed_all(torch.arange(columns, device=device)[None, :] ^ row[:, None])
        return (found >> (32 - BITS)) >= self.threshold

    def __call__(self, x: Tensor) -> Tensor:
        """x, of which something is dropped; (M, K)."""
        rows, columns = x.shape
        return torch.where(self.kept(rows, columns, x.device), x * self.factor, 0)


def _mixed(word: int) -> int:
    """A hash of 32 bits. Source: Wellons 2018, "Prospecting for Hash Functions", lowbias32."""
    word = ((word ^ word >> 16) * 0x7FEB352D) & _WORD
    word = ((word ^ word >> 15) * 0x846CA68B) & _WORD
    return word ^ word >> 16


def _mixed_all(words: Tensor) -> Tensor:
    """The same of each, in int64, of which the upper half stays empty."""
    words = ((words ^ words >> 16) * 0x7FEB352D) & _WORD
    words = ((words ^ words >> 15) * 0x846CA68B) & _WORD
    return words ^ words >> 16
