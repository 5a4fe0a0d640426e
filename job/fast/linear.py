"""Linears that read the same input, as one: y = x W^T + b + (drop(x) A^T) B^T, and the gradients of x, A and B.

W is frozen: dequantised when it is needed, or kept that way where memory allows. A and B are the adapter's fp32
masters; the copies that multiply are made anew for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from job.fast.dropout import Dropout
from job.fast.fp8 import Fp8Weight
from job.fast.frozen import Frozen, Stacked
from job.fast.kernels import Kernels, in_torch
from job.fast.narrow import Widened
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

    def __init__(self, members: Sequence[Any], kernels: Kernels | None = None) -> None:
        """
        Args:
            members: PEFT's LoRA layers around linears, or linears.
            kernels: torch's, if not given.
        """
        self._do = kernels or in_torch()
        bases = [getattr(member, "base_layer", member) for member in members]
        self.frozen = Stacked([Frozen.of(base, compiled=self._do.compiled) for base in bases])
        self.outputs, self.inputs = self.frozen.outputs, self.frozen.inputs
        self._adapted = [(at, m) for at, m in enumerate(members) if hasattr(m, "lora_A")]
        self.parameters: list[Tensor] = [
            parameter
            for _, member in self._adapted
            for parameter in (member.lora_A["default"].weight, member.lora_B["default"].weight)
        ]
        self._scaling = [float(member.scaling["default"]) for _, member in self._adapted]
        self._rows = [self.frozen.members[at][1] for at, _ in self._adapted]
        ranks = [parameter.shape[0] for parameter in self.parameters[::2]]
        self._ranks = [slice(sum(ranks[:at]), sum(ranks[: at + 1])) for at in range(len(ranks))]
        self.rank = sum(ranks)
        self.rank_of_first = ranks[0] if self._adapted and self._adapted[0][0] == 0 else 0
        """Of the first member's adapter: the first of the R ranks, if any."""
        self._copies: tuple[Tensor, Tensor] | None = None
        self.fp8: Fp8Weight | None = None
        """For the gradient of x; and for y, where `fp8_forward`."""
        self.fp8_forward = False
        self._bias = self.frozen.bias()

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

    def narrowed(self, x: Tensor, dropout: Dropout | None) -> Tensor | None:
        """drop(x) A^T: (M, K) -> (M, R). None without an adapter."""
        if not self.rank:
            return None
        found: Tensor = self._do.narrow(x, self.adapter[0], dropout)
        return found

    def narrowed_back(self, dy: Tensor) -> Tensor | None:
        """dy B: (M, N) -> (M, R). None without an adapter."""
        if not self.rank:
            return None
        found: Tensor = self._do.narrow(dy, self.adapter[1].T, None)
        return found

    def added(self, inner: Tensor | None) -> Widened | None:
        """What the adapter adds to y, unmultiplied; `inner` as `narrowed` has it."""
        return None if inner is None else (inner, self.adapter[1].T)

    def added_back(self, inner: Tensor | None) -> Widened | None:
        """What it adds to the gradient of x, unmultiplied; `inner` as `narrowed_back` has it."""
        return None if inner is None else (inner, self.adapter[0])

    def multiply(self, x: Tensor, small: Small | None = None) -> Tensor:
        """x W^T + b, without the adapter: (M, K) -> (M, N). `small`: x in e4m3, where it is at hand."""
        bias = self._bias.to(x.dtype) if self._bias is not None else None
        if self.fp8 is not None and self.fp8_forward:
            y = self.fp8.forward(x, small)
            return y if bias is None else y.add_(bias)
        weight = self.frozen.dense(x.dtype).T
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def multiply_back(self, dy: Tensor, small: Small | None = None) -> Tensor:
        """dy W, without the adapter: (M, N) -> (M, K). `small`: dy in e4m3, where it is at hand."""
        return dy @ self.frozen.dense(dy.dtype) if self.fp8 is None else self.fp8.backward(dy, small)

    def forward(
        self,
        x: Tensor,
        *,
        onto: Tensor | None = None,
        small: Small | None = None,
        largest: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, drop(x) A^T): (M, K) -> (M, N), (M, R).

        Args:
            onto: (M, N), added to y: the residual.
            small: x in e4m3, where it is at hand.
            largest: (M), the largest number of each row of x, where that is.
        """
        if largest is not None and self.rank:
            inner, small = self._do.narrow_quantised(x, self.adapter[0], dropout, largest)
        else:
            inner = self.narrowed(x, dropout)
        pair = self.added(inner)
        if pair is None:
            y = self.multiply(x, small)
            return y if onto is None else y.add_(onto), None
        if onto is None and self._bias is None and not self.fp8_forward:
            y = self._do.widen(pair, (), None)
            return y.addmm_(x, self.frozen.dense(x.dtype).T), inner
        # The product is rounded at its own size before it meets the residual, whose numbers are larger.
        more = () if onto is None else (onto,)
        return self._do.widen(pair, (self.multiply(x, small), *more), None, over=True), inner

    def input_gradient(
        self,
        dy: Tensor,
        *,
        small: Small | None = None,
        largest: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(gradient of x, dy B): (M, N) -> (M, K), (M, R).

        Args:
            small, largest: of dy, as `forward` has them of x.
        """
        if largest is not None and self.rank:
            inner, small = self._do.narrow_quantised(dy, self.adapter[1].T, None, largest)
        else:
            inner = self.narrowed_back(dy)
        pair = self.added_back(inner)
        if pair is None:
            return self.multiply_back(dy, small), None
        if self.fp8 is not None:
            return self._do.widen(pair, (self.fp8.backward(dy, small),), dropout, over=True), inner
        dx: Tensor = self._do.widen(pair, (), dropout)
        return dx.addmm_(dy, self.frozen.dense(dy.dtype)), inner

    def parameter_gradients(
        self,
        dy: Tensor,
        dy_inner: Tensor | None,
        x: Tensor,
        inner: Tensor | None,
        dropout: Dropout | None = None,
    ) -> list[Tensor]:
        """Of `parameters`, in their order and dtype."""
        if inner is None or dy_inner is None:
            return []
        of_down = self._do.narrow_gradient(dy_inner, x, dropout)  # (R, K)
        of_up = self._do.narrow_gradient(inner, dy, None)  # (R, N)
        found: list[Tensor] = []
        for at, (rows, ranks, scaling) in enumerate(zip(self._rows, self._ranks, self._scaling, strict=True)):
            master = self.parameters[2 * at].dtype
            found += [of_down[ranks].to(master), (of_up[ranks, rows].T.to(master) * scaling).contiguous()]
        return found
