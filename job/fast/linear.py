"""Linears that read the same input, as one: y = x W^T + b + (x A^T) B^T, and the gradients of x, A and B.

W is frozen: dequantised when it is needed, or kept that way where memory allows. A and B are the adapter's fp32
masters; the copies that multiply are made anew for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from job.fast.fp8 import Fp8Weight
from job.fast.frozen import Frozen
from job.fast.pointwise import Small


def refresh(groups: Sequence[Group], dtype: torch.dtype) -> None:
    """Bring the copies that multiply up to their masters.

    Before every batch, whoever changed them: not every optimizer leaves a trace that could be looked for (torch's fused
    AdamW does not count a tensor's version up). All of them in a handful of kernels.
    """
    copies = [copy for group in groups for copy in group.copies(dtype)]
    torch._foreach_copy_([to for to, _, _ in copies], [master for _, master, _ in copies])
    by_factor: dict[float, list[Tensor]] = {}
    for to, _, factor in copies:
        by_factor.setdefault(factor, []).append(to)
    for factor, tensors in by_factor.items():
        if factor != 1.0:
            torch._foreach_mul_(tensors, factor)


class Group:
    """K inputs, N outputs of all members side by side, R the sum of their ranks (0 without an adapter)."""

    def __init__(self, members: Sequence[Any], *, compiled: bool = False) -> None:
        """
        Args:
            members: PEFT's LoRA layers around linears, or linears.
            compiled: whether Triton works here.
        """
        self.frozen = [Frozen.of(getattr(member, "base_layer", member), compiled=compiled) for member in members]
        self.outputs = sum(frozen.outputs for frozen in self.frozen)
        self.inputs = self.frozen[0].inputs
        self._adapted = [(at, m) for at, m in enumerate(members) if hasattr(m, "lora_A")]
        self.parameters: list[Tensor] = [
            parameter
            for _, member in self._adapted
            for parameter in (member.lora_A["default"].weight, member.lora_B["default"].weight)
        ]
        self._scaling = [float(member.scaling["default"]) for _, member in self._adapted]
        starts = [sum(frozen.outputs for frozen in self.frozen[:at]) for at in range(len(members))]
        rows = [slice(start, start + frozen.outputs) for start, frozen in zip(starts, self.frozen, strict=True)]
        self.members = list(zip(self.frozen, rows, strict=True))
        """Each weight, and which of the N outputs are its."""
        self._rows = [rows[at] for at, _ in self._adapted]
        ranks = [parameter.shape[0] for parameter in self.parameters[::2]]
        self._ranks = [slice(sum(ranks[:at]), sum(ranks[: at + 1])) for at in range(len(ranks))]
        self.rank = sum(ranks)
        self._copies: tuple[Tensor, Tensor] | None = None
        self._kept: Tensor | None = None
        self.fp8: Fp8Weight | None = None
        """For the gradient of x; and for y, where `fp8_forward`."""
        self.fp8_forward = False
        biases = [frozen.bias for frozen in self.frozen]
        self._bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                torch.zeros(frozen.outputs, device=frozen.device) if bias is None else bias.detach()
                for frozen, bias in zip(self.frozen, biases, strict=True)
            ]
            self._bias = torch.cat([part.float() for part in parts])

    def keep(self, dtype: torch.dtype) -> None:
        """Dequantise once and for all: N x K numbers of memory, and no time afterwards."""
        self._kept = self.weight(dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K), dequantised."""
        if self._kept is not None:
            return self._kept
        if len(self.frozen) == 1:
            return self.frozen[0].dense(dtype)
        out = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.frozen[0].device)
        for frozen, rows in self.members:
            frozen.dense(dtype, out=out[rows])
        return out

    def copies(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
        """(where to, master, factor) of everything that `adapter` is made of."""
        if not self.rank:
            return []
        if self._copies is None or self._copies[0].dtype != dtype:
            device = self.parameters[0].device
            down = torch.empty(self.rank, self.inputs, dtype=dtype, device=device)
            up = torch.zeros(self.outputs, self.rank, dtype=dtype, device=device)
            self._copies = down, up
        down, up = self._copies
        found = []
        for at, (rows, ranks, scaling) in enumerate(zip(self._rows, self._ranks, self._scaling, strict=True)):
            found.append((down[ranks], self.parameters[2 * at].detach(), 1.0))
            found.append((up[rows, ranks], self.parameters[2 * at + 1].detach(), scaling))
        return found

    @property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """(A, scaling * B): (R, K) and (N, R); block diagonal, since each member has a rank of its own. As `refresh`
        left them."""
        if self._copies is None:
            raise AssertionError("refresh comes first")
        return self._copies

    def forward(
        self, x: Tensor, *, onto: Tensor | None = None, small: Small | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(y, x A^T): (M, K) -> (M, N), (M, R).

        Args:
            onto: (M, N), added to y: the residual. Adding it inside the multiplications costs no pass of its own.
            small: x in e4m3, where it is at hand.
        """
        bias = self._bias.to(x.dtype) if self._bias is not None else None
        down, up = self.adapter if self.rank else (None, None)
        inner = x @ down.T if down is not None else None
        if self.fp8 is not None and self.fp8_forward:
            y = self.fp8.forward(x, small)
            if inner is not None and up is not None:
                y.addmm_(inner, up.T)
            rest: tuple[Tensor | None, ...] = (onto, bias)
        else:
            first, rest = (onto, (bias,)) if onto is not None else (bias, ())
            if inner is not None and up is not None:
                y = inner @ up.T if first is None else torch.addmm(first, inner, up.T)
                y.addmm_(x, self.weight(x.dtype).T)
            else:
                weight = self.weight(x.dtype).T
                y = x @ weight if first is None else torch.addmm(first, x, weight)
        for more in rest:
            if more is not None:
                y += more
        return y, inner

    def input_gradient(self, dy: Tensor, small: Small | None = None) -> tuple[Tensor, Tensor | None]:
        """(gradient of x, dy B): (M, N) -> (M, K), (M, R). `small`: dy in e4m3, where it is at hand."""
        down, up = self.adapter if self.rank else (None, None)
        inner = dy @ up if up is not None else None
        if self.fp8 is not None:
            dx = self.fp8.backward(dy, small)
            return (dx if inner is None or down is None else dx.addmm_(inner, down)), inner
        if inner is None or down is None:
            return dy @ self.weight(dy.dtype), None
        return (inner @ down).addmm_(dy, self.weight(dy.dtype)), inner

    def parameter_gradients(self, dy: Tensor, dy_inner: Tensor | None, x: Tensor, inner: Tensor | None) -> list[Tensor]:
        """Of `parameters`, in their order and dtype."""
        if inner is None or dy_inner is None:
            return []
        of_down, of_up = dy_inner.T @ x, dy.T @ inner
        found: list[Tensor] = []
        for at, (rows, ranks, scaling) in enumerate(zip(self._rows, self._ranks, self._scaling, strict=True)):
            master = self.parameters[2 * at].dtype
            found += [of_down[ranks].to(master), of_up[rows, ranks].to(master) * scaling]
        return found
