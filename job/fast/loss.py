"""The last norm, the head and the loss as one function: logits exist a chunk of tokens at a time, and their gradient is
made in the same pass, since the head is frozen and needs none of its own.

Source of the idea: Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel's fused linear cross entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from job.contract.fast_path import CHUNK_BYTES
from job.fast.kernels import Kernels


class HeadLoss(torch.autograd.Function):
    """Sum of the negative log likelihoods over `positions`, divided by `count`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Any,
        head: Tensor,
        positions: Tensor,
        targets: Tensor,
        count: Tensor | float,
        kernels: Kernels,
    ) -> Tensor:
        """
        Args:
            x: (M, h), before the last norm.
            head: (V, h).
            positions: (P), the tokens from which one is predicted, each once; targets: (P), which.
            count: what the sum is divided by: trained tokens of the whole step.
        """
        wanted = ctx.needs_input_grad[0]
        seen = x.detach().index_select(0, positions)
        normed, scale, _ = kernels.rms_norm(seen, norm.weight, norm.variance_epsilon, quantise=False)
        size = max(1, CHUNK_BYTES // (head.shape[0] * head.element_size()))
        total = torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        gradient = torch.empty_like(normed) if wanted else None
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            loss, d_logits = kernels.cross_entropy(normed[part] @ head.T, targets[part])
            total += loss
            if gradient is not None:
                gradient[part] = d_logits @ head
            del d_logits
        if gradient is not None:
            nothing = torch.zeros_like(seen)
            gradient, _ = kernels.rms_norm_gradient(gradient, seen, norm.weight, scale, nothing, quantise=False)
            gradient /= count
            ctx.gradient = torch.zeros_like(x).index_copy_(0, positions, gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise AssertionError("a loss is differentiated once: what it kept is used up")
        return gradient.mul_(upstream), None, None, None, None, None, None
