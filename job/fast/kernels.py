"""Which functions do what lies between the large matrix multiplications: Triton's on a GPU, torch's elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from job.fast import narrow, pointwise
from job.logs import get_logger


@dataclass(frozen=True)
class Kernels:
    """The functions of job/fast/pointwise.py and job/fast/narrow.py, by name."""

    rms_norm: Callable[..., Any]
    rms_norm_gradient: Callable[..., Any]
    normed: Callable[..., Any]
    rotate: Callable[..., Any]
    rotate_gradient: Callable[..., Any]
    norm_and_rotate: Callable[..., Any]
    norm_and_rotate_gradient: Callable[..., Any]
    swiglu: Callable[..., Any]
    swiglu_gradient: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    to_fp8: Callable[..., Any]
    narrow: Callable[..., Any]
    narrow_quantised: Callable[..., Any]
    narrow_gradient: Callable[..., Any]
    widen: Callable[..., Any]
    compiled: bool
    """Whether Triton works here, also for what is not in there: dequantising."""

    @classmethod
    def of(cls, *modules: ModuleType, compiled: bool) -> Kernels:
        names = set(cls.__dataclass_fields__) - {"compiled"}
        found = {name: getattr(module, name) for module in modules for name in names if hasattr(module, name)}
        return cls(**found, compiled=compiled)


def in_torch() -> Kernels:
    """Without Triton."""
    return Kernels.of(pointwise, narrow, compiled=False)


def of_triton() -> Kernels:
    """Triton's, whether it works here or not."""
    # Not at the top: Triton is not everywhere.
    from job.fast import triton_heads, triton_narrow, triton_pointwise, triton_swiglu

    return Kernels.of(triton_heads, triton_narrow, triton_pointwise, triton_swiglu, compiled=True)


def in_triton() -> Kernels:
    """With Triton; without, and a warning, where it cannot compile (no compiler, another GPU): slower, and the same."""
    try:
        kernels = of_triton()
        # Not those that write e4m3: before Ada there is none, and everything else works.
        row = torch.ones(1, 64, dtype=torch.bfloat16, device="cuda")
        kernels.rms_norm(row, row[0], 1e-6, quantise=False)
        kernels.narrow(row, row, None)
    except Exception as error:  # whatever a compiler can run into: no reason to lose a paid machine
        get_logger().warning("kernels.not_compiled", why=f"{type(error).__name__}: {error}"[:500])
        return in_torch()
    return kernels
