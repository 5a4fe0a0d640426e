"""A frozen linear's weight, whatever it is stored in, as the matrix it stands for."""

from __future__ import annotations

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
