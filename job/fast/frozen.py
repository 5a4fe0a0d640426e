"""Frozen weights, whatever they are stored in, as the matrices they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

_PLAIN: Final = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def can_be_read(linear: Any) -> bool:
    """Whether a linear's weight is what `Frozen` takes it for: bitsandbytes' 4 bits, or the numbers themselves.

    Models that were quantised before they were published have others: integers or e4m3, and scales beside them.
    """
    weight = getattr(linear, "weight", None)
    return weight is not None and (getattr(weight, "quant_state", None) is not None or weight.dtype in _PLAIN)


@dataclass(frozen=True)
class Frozen:
    """(outputs, inputs): stored in 4 bits with a quantisation state, or as it is."""

    outputs: int
    inputs: int
    stored: Tensor
    state: Any
    bias: Tensor | None
    compiled: bool
    """Whether Triton works here."""

    @classmethod
    def of(cls, linear: Any, *, compiled: bool) -> Frozen:
        """The weight of a torch or bitsandbytes linear."""
        weight, bias = linear.weight, getattr(linear, "bias", None)
        state = getattr(weight, "quant_state", None)
        return cls(linear.out_features, linear.in_features, weight.data, state, bias, compiled)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def by_triton(self) -> bool:
        """Whether job/fast/nf4.py dequantises it."""
        if self.state is None or not self.compiled:
            return False
        from job.fast.nf4 import fits

        return fits(self.stored, self.state)

    def dense(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """The matrix, in `out` where that is given."""
        if self.state is None:
            if out is None:
                return self.stored if self.stored.dtype == dtype else self.stored.to(dtype)
            return out.copy_(self.stored)
        if self.by_triton:
            from job.fast.nf4 import dequantise

            out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.device) if out is None else out
            dequantise(self.stored, self.state, out)
            return out
        dense = bnb.dequantize_4bit(self.stored, self.state).to(dtype)
        return dense if out is None else out.copy_(dense)


class Stacked:
    """Weights that read the same input, one below the other: (N, K)."""

    def __init__(self, weights: Sequence[Frozen]) -> None:
        starts = [sum(weight.outputs for weight in weights[:at]) for at in range(len(weights))]
        rows = [slice(start, start + weight.outputs) for start, weight in zip(starts, weights, strict=True)]
        self.members = list(zip(weights, rows, strict=True))
        """Each weight, and which of the N outputs are its."""
        self.outputs = sum(weight.outputs for weight in weights)
        self.inputs = weights[0].inputs
        self.device = weights[0].device
        self._kept: Tensor | None = None

    @property
    def by_triton(self) -> bool:
        """Whether job/fast/nf4.py dequantises all of it."""
        return all(weight.by_triton for weight, _ in self.members)

    def keep(self, dtype: torch.dtype) -> None:
        """Dequantise once and for all: N x K numbers of memory, and no time afterwards."""
        self._kept = self.dense(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        if self._kept is not None:
            return self._kept
        if len(self.members) == 1:
            return self.members[0][0].dense(dtype)
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.device)
        for weight, rows in self.members:
            weight.dense(dtype, out=out[rows])
        return out

    def bias(self) -> Tensor | None:
        """(N), in fp32; zero for members that have none, None where none has."""
        biases = [(weight.bias, weight.outputs) for weight, _ in self.members]
        if all(bias is None for bias, _ in biases):
            return None
        none = [torch.zeros(size, device=self.device) if bias is None else bias.detach() for bias, size in biases]
        return torch.cat([part.float() for part in none])
