"""How much of the GPU's arithmetic a training uses: model FLOPs utilisation (MFU).

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, in two things adapted. A frozen weight costs 4 FLOPs
a token and not 6: forward and the gradient of its input, but none of its own. And attention is counted over the pairs
of tokens that see each other, which is half of the paper's square, and only within a document.

By that definition recomputing counts as nothing, and what is spared (the head of untrained tokens) as done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch.nn import Embedding, Linear

_FROZEN: Final = 4
_TRAINED: Final = 6
"""FLOPs of a weight for each token: 2 forward, 2 for the gradient of its input, and 2 for its own."""
_PAIR: Final = 12
"""Likewise of a layer's query and key for each of their features: 4 forward (q k^T, and the sum of v), 8 backward."""

_PEAKS: Final = (
    (r"NVIDIA H100 80GB HBM3", 989e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H200", 989e12),
    (r"NVIDIA A100[- ].*", 312e12),
    (r"NVIDIA L40S", 362e12),
    (r"NVIDIA B200", 2250e12),
)
"""FLOP/s in bf16, dense, from NVIDIA's datasheets, by the name that torch.cuda.get_device_name says."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward: for each token, and for each pair of tokens of which one sees the other."""

    of_token: int
    of_pair: int

    def of(self, tokens: int, pairs: int) -> int:
        return self.of_token * tokens + self.of_pair * pairs


@dataclass(frozen=True)
class Utilisation:
    """Of a GPU that does `peak` FLOP/s, by a model."""

    cost: Cost
    peak: float

    def of(self, tokens: int, pairs: int, seconds: float) -> float:
        """The share of the peak, 0 to 1, also where it multiplies in fp8."""
        return self.cost.of(tokens, pairs) / seconds / self.peak


def utilisation(model: Any, device: str) -> Utilisation | None:
    """For a model on a GPU of that name; None where either is unknown."""
    cost, peak = cost_of(model), peak_of(device)
    return None if cost is None or peak is None else Utilisation(cost, peak)


def peak_of(device: str) -> float | None:
    """bf16 FLOP/s by the datasheet; None for a CPU, a part of a GPU (MIG) and any other GPU."""
    if "MIG" in device:
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device)), None)


def cost_of(model: Any) -> Cost | None:
    """Of a dense decoder, with an adapter or without; None where its arithmetic is not in linears and attention alone.

    Experts, convolutions and states have weights of other shapes: they are unknown, not guessed.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    known = {id(module.weight) for module in model.modules() if isinstance(module, Linear | Embedding)}
    if any(weight.ndim > 1 and id(weight) not in known for weight in model.parameters()):
        return None
    config = model.config
    if getattr(config, "is_heterogeneous", False):
        return None  # transformers refuses to say one size for layers of several
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Not the weight's own numbers: in 4 bits two share a byte.
    of_token = sum(
        (_TRAINED if module.weight.requires_grad else _FROZEN) * module.in_features * module.out_features
        for module in linears
    )
    return Cost(of_token, _PAIR * layers * heads * size)


def pairs(lengths: Sequence[int]) -> int:
    """How many pairs of tokens, each with itself too, there are of which one sees the other, in documents so long."""
    return sum(length * (length + 1) // 2 for length in lengths)
