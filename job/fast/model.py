"""A whole Llama-like model on the fast path: tokens in, loss out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from job.fast.attention import Documents
from job.fast.fp8 import Fp8Weight
from job.fast.kernels import Kernels, in_torch
from job.fast.layer import Keep, Layer, Where
from job.fast.linear import refresh
from job.fast.loss import HeadLoss

ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})
"""Whose layers are the one of job/fast/layer.py: RMSNorm, rotary q and k, grouped attention, SwiGLU."""


def why_not(model: Any, *, dropout: float, dora: bool, longest: int) -> str | None:
    """Why a model cannot go this way; None where it can.

    Args:
        model: PEFT's, around transformers'.
        longest: tokens of the longest row.
    """
    inner = model.get_base_model()
    config = inner.config
    name = type(inner).__name__
    if name not in ARCHITECTURES:
        return f"{name} has another layer than Llama"
    if dora:
        return "DoRA"
    if dropout:
        return "dropout"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < longest:
        return f"its attention sees {window} tokens back"
    adapted = {n.rpartition(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_A" in n}
    if other := adapted - {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}:
        return f"it adapts {', '.join(sorted(other))}"
    return None


class FastModel:
    """The loss of a batch, and through autograd the gradients of the adapter. The modules are left as they are."""

    def __init__(self, model: Any, *, kernels: Kernels | None = None, keep: Sequence[Keep] | Keep = "all") -> None:
        inner = model.get_base_model()
        self._inner = inner
        self._kernels = kernels or in_torch()
        modules = inner.model.layers
        keeps = [keep] * len(modules) if isinstance(keep, str) else list(keep)
        self.layers = [Layer(m, self._kernels, keep=k) for m, k in zip(modules, keeps, strict=True)]
        self.dtype = inner.model.embed_tokens.weight.dtype

    def use_fp8(self) -> None:
        """Multiply in e4m3 from now on: all gradients, and gate, up and down forward.

        Not the adapter, the head and the attention; nor q, k, v and o forward, a fifth of the forward pass's work that
        causes most of the error: with them the lowest cosine of a LoRA gradient falls from 0.98 to 0.94.
        """
        for layer in self.layers:
            for group in layer.groups:
                group.fp8 = Fp8Weight(group, self.dtype, self._kernels.to_fp8)
                group.fp8_forward = group in (layer.gate_up, layer.down)

    def keep_dequantised(self) -> None:
        """Hold every frozen weight as it multiplies: 2 bytes a parameter."""
        for layer in self.layers:
            for group in layer.groups:
                if group.fp8 is not None:
                    group.fp8.keep(forward=group.fp8_forward)
                if not group.fp8_forward:
                    group.keep(self.dtype)

    def loss(self, tokens: Tensor, documents: Documents, positions: Tensor, targets: Tensor, count: Any) -> Tensor:
        """Mean loss in nats.

        Args:
            tokens: (M), documents end to end.
            positions, targets: (P): from which token which one is predicted.
            count: what the sum is divided by.
        """
        refresh([group for layer in self.layers for group in layer.groups], self.dtype)
        inner = self._inner.model
        x = inner.embed_tokens(tokens).detach()
        cos, sin = self._rotation(documents, tokens.device)
        where = Where(documents, cos, sin)
        for layer in self.layers:
            x = layer(x, where)
        head = self._inner.lm_head.weight
        found: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            x, inner.norm, head, positions, targets, count, self._kernels
        )
        return found

    def _rotation(self, documents: Documents, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, (M, D/2)."""
        positions = documents.positions.to(device)
        wide = torch.zeros(1, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32, device=device)
        cos, sin = self._inner.model.rotary_emb(wide, position_ids=positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
