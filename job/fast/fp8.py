"""Frozen weights in e4m3 for both passes: rows scaled for y = x W^T, columns for dx = dy W.

Activations and gradients get a scale for each token as they come. Products are summed in fp32 and come out in bf16.
Both passes use e4m3: with a scale for each row the wider range of e5m2 is not needed, and its 2 bits are missed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from job.fast.frozen import Stacked
from job.fast.pointwise import FP8, FP8_LARGEST, Small


class Fp8Weight:
    """Of (N, K): made anew each time, or kept, 2 N K bytes."""

    def __init__(self, frozen: Stacked, dtype: torch.dtype, quantise: Callable[[Tensor], Small]) -> None:
        self._frozen = frozen
        self._dtype = dtype
        self._quantise = quantise
        # The largest of bf16 numbers is one of them: in fp32 this would take 4.7 GB for gate and up of 70B.
        weight = frozen.dense(dtype).abs()
        self._of_rows = (weight.amax(1).float().clamp(min=1e-12) / FP8_LARGEST).contiguous()  # (N)
        self._of_columns = (weight.amax(0).float().clamp(min=1e-12) / FP8_LARGEST).contiguous()  # (K)
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    def keep(self, *, forward: bool) -> None:
        """Hold what the gradient of x needs, and what y needs if that is multiplied so."""
        self._columns = self._by_columns()
        self._rows = self._by_rows() if forward else None

    def forward(self, x: Tensor, small: Small | None = None) -> Tensor:
        """x W^T, (M, K) -> (M, N). `small`: x in e4m3, where it is at hand."""
        weight = self._by_rows() if self._rows is None else self._rows
        return self._multiply(small or self._quantise(x), weight, self._of_rows)

    def backward(self, dy: Tensor, small: Small | None = None) -> Tensor:
        """dy W, (M, N) -> (M, K). `small`: dy in e4m3, where it is at hand."""
        weight = self._by_columns() if self._columns is None else self._columns
        return self._multiply(small or self._quantise(dy), weight, self._of_columns)

    def _by_rows(self) -> Tensor:
        """(N, K)."""
        frozen = self._frozen
        if frozen.by_triton:
            from job.fast.nf4 import dequantise

            out = torch.empty(frozen.outputs, frozen.inputs, dtype=FP8, device=frozen.device)
            for weight, rows in frozen.members:
                dequantise(weight.stored, weight.state, out[rows], scale=self._of_rows[rows])
            return out
        return (frozen.dense(self._dtype).float() / self._of_rows[:, None]).to(FP8)

    def _by_columns(self) -> Tensor:
        """(K, N)."""
        frozen = self._frozen
        if frozen.by_triton:
            from job.fast.nf4 import dequantise

            out = torch.empty(frozen.inputs, frozen.outputs, dtype=FP8, device=frozen.device)
            for weight, rows in frozen.members:
                dequantise(weight.stored, weight.state, out[:, rows], scale=self._of_columns, by_column=True)
            return out
        return (frozen.dense(self._dtype).float() / self._of_columns).to(FP8).T.contiguous()

    def _multiply(self, x: Small, weight: Tensor, scale: Tensor) -> Tensor:
        values, of_x = x
        return torch._scaled_mm(
            values, weight.T, scale_a=of_x, scale_b=scale[None, :], out_dtype=self._dtype, use_fast_accum=True
        )
