"""A frozen linear's weight, whatever it is stored in, as the matrix it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor


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
        """Whether job/fast/nf4.py dequantises it: NF4 in blocks of 64 with double quantisation, as QLoRA has it."""
        state = self.state
        if state is None or not (self.compiled and self.stored.is_cuda):
            return False
        return bool(state.quant_type == "nf4" and state.blocksize == 64 and state.nested)

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
