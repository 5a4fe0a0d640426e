"""A whole Llama-like model on the fast path: tokens in, loss out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from job.contract.fast_path import ARCHITECTURES, LINEARS, ON_HOST, Keep, why_plain
from job.fast.attention import Documents, to_device
from job.fast.dropout import Dropout
from job.fast.fp8 import Fp8Weight
from job.fast.frozen import can_be_read
from job.fast.kernels import Kernels, in_torch
from job.fast.layer import Layer, Where
from job.fast.linear import refresh
from job.fast.loss import HeadLoss
from job.fast.offload import HostMemory


def why_not(model: Any, *, dora: bool, longest: int) -> str | None:
    """Why a model cannot go this way; None where it can.

    Args:
        model: PEFT's, around transformers'.
        longest: tokens of the longest row.
    """
    inner = model.get_base_model()
    architecture = type(inner).__name__
    # Another architecture is reason enough, and its configuration may have none of this.
    config = inner.config if architecture in ARCHITECTURES.values() else None
    reason = why_plain(
        architecture=architecture,
        activation=getattr(config, "hidden_act", ""),
        window=getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None,
        longest=longest,
        attention_dropout=getattr(config, "attention_dropout", 0),
        dora=dora,
        # Of an embedding they are called lora_embedding_A.
        adapted={n.partition(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_" in n},
    )
    if reason is not None:
        return reason
    named = [(n.rpartition(".")[2], module) for n, module in inner.model.layers.named_modules()]
    linears = [getattr(module, "base_layer", module) for name, module in named if name in LINEARS]
    strange = {type(linear).__name__ for linear in linears if not can_be_read(linear)}
    return f"its weights are stored as {', '.join(sorted(strange))} has them" if strange else None


class FastModel:
    """The loss of a batch, and through autograd the gradients of the adapter. The modules are left as they are."""

    def __init__(self, model: Any, *, kernels: Kernels | None = None, keep: Sequence[Keep] | Keep = "all") -> None:
        inner = model.get_base_model()
        self._inner = inner
        self._kernels = kernels or in_torch()
        modules = inner.model.layers
        keeps = [keep] * len(modules) if isinstance(keep, str) else list(keep)
        self.layers = [
            Layer(module, self._kernels, number=at, keep=k)
            for at, (module, k) in enumerate(zip(modules, keeps, strict=True))
        ]
        self._dropout = float(model.peft_config["default"].lora_dropout)
        self.dtype = inner.model.embed_tokens.weight.dtype
        self.host = HostMemory()

    def keep(self, keeps: Sequence[Keep], *, tokens: int) -> None:
        """What each layer remembers from now on.

        Args:
            tokens: of the largest micro-batch: the host's memory is taken once.

        Raises:
            TrainingFailed: the host does not have it.
        """
        for layer, keep in zip(self.layers, keeps, strict=True):
            layer.keep = keep
        if on_host := self._on_host():
            weight = self._inner.model.embed_tokens.weight
            self.host.reserve(len(on_host) * tokens * weight.shape[1], self.dtype, weight.device)

    def _on_host(self) -> list[int]:
        return [layer.number for layer in self.layers if layer.keep == ON_HOST]

    def use_fp8(self) -> None:
        """Multiply in e4m3 from now on: all gradients, and gate, up and down forward.

        Not the adapter, the head and the attention; nor q, k, v and o forward, a fifth of the forward pass's work that
        causes most of the error: with them the lowest cosine of a LoRA gradient falls from 0.98 to 0.94 (four layers
        of the 8B shape, weights that keep the variance; bench/precision.py).
        """
        for layer in self.layers:
            for group in layer.groups:
                group.fp8 = Fp8Weight(group.frozen, self.dtype, self._kernels.to_fp8)
                group.fp8_forward = group in (layer.gate_up, layer.down)

    def keep_dequantised(self) -> None:
        """Hold every frozen weight as it multiplies: `Shape.dequantised` bytes."""
        for layer in self.layers:
            for group in layer.groups:
                if group.fp8 is not None:
                    group.fp8.keep(forward=group.fp8_forward)
                if not group.fp8_forward:
                    group.frozen.keep(self.dtype)

    def states(self, tokens: Tensor, documents: Documents) -> Tensor:
        """What the last norm reads, (M, h). `tokens`: (M), documents end to end."""
        refresh([group for layer in self.layers for group in layer.groups], self.dtype)
        x: Tensor = self._inner.model.embed_tokens(tokens).detach()
        cos, sin = self._rotation(documents, tokens.device)
        differentiable = torch.is_grad_enabled()
        inputs = self.host.for_batch(self._on_host() if differentiable else [], x)
        where = Where(documents, cos, sin, inputs, self._drawn(), differentiable)
        for layer in self.layers:
            x = layer(x, where)
        return x

    def loss(self, tokens: Tensor, documents: Documents, positions: Tensor, targets: Tensor, count: Any) -> Tensor:
        """Mean loss in nats.

        Args:
            tokens: (M), documents end to end.
            positions, targets: (P): from which token which one is predicted.
            count: what the sum is divided by.
        """
        x, norm, head = self.states(tokens, documents), self._inner.model.norm, self._inner.lm_head.weight
        found: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            x, norm, head, positions, targets, count, self._kernels
        )
        return found

    def _drawn(self) -> Dropout | None:
        """Of this batch, while training: torch's generator decides, whose state is in every checkpoint."""
        if not (self._dropout and self._inner.training):
            return None
        return Dropout(self._dropout, int(torch.randint(2**31, ())))

    def _rotation(self, documents: Documents, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every token, (M, D/2)."""
        positions = to_device(documents.positions, device)
        wide = torch.zeros(1, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32, device=device)
        cos, sin = self._inner.model.rotary_emb(wide, position_ids=positions.unsqueeze(0))
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
