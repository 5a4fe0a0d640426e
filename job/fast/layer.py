"""A decoder layer as one function with a backward pass of its own.

Per token it keeps its input, the rotated q, k, v, the attention's result, the middle residual, and gate and up:
2 x (3 h + h + 2 kv + 2 f) bytes in bf16, 0.18 MB at h = 8192; Qwen 3's also q and k before their norms. With less
memory it drops gate and up and multiplies again, or keeps its input alone, on the GPU or on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from job.contract.fast_path import RUN_AGAIN, Keep
from job.fast.attention import Documents, attend
from job.fast.dropout import Dropout
from job.fast.kernels import Kernels
from job.fast.linear import Group
from job.fast.offload import Inputs
from job.fast.pointwise import HeadNorms, Small


@dataclass(frozen=True)
class Where:
    """What all layers share in a batch."""

    documents: Documents
    cos: Tensor
    sin: Tensor
    inputs: Inputs
    """Of layers that keep them on the host."""
    dropout: Dropout | None = None
    """Of what adapters read, where a training drops some of it."""
    differentiable: bool = True
    """Whether there will be a backward pass."""


@dataclass
class _Kept:
    """Of one layer and one batch. Names as in `_Layer.run`; None: to be made again."""

    x: Tensor
    scale_1: Tensor
    inner_qkv: Tensor | None
    attended: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    inner_o: Tensor | None
    middle: Tensor
    scale_2: Tensor
    inner_gate_up: Tensor | None
    gate_up: Tensor | None
    inner_down: Tensor | None
    unnormed: Tensor | None = None
    """q and k before they were normed, and v: (M, all heads, D), where heads are normed."""


class Layer:
    """A decoder layer of a Llama-like model, around the weights of transformers' module."""

    def __init__(self, module: Any, kernels: Kernels, *, number: int, keep: Keep = "all") -> None:
        """
        Args:
            number: its place among the layers, from 0.
        """
        attention, mlp = module.self_attn, module.mlp
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], kernels)
        self.o = Group([attention.o_proj], kernels)
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], kernels)
        self.down = Group([mlp.down_proj], kernels)
        self.number = number
        self.norm_1 = module.input_layernorm
        self.norm_2 = module.post_attention_layernorm
        self.head_dim = attention.head_dim
        self.head_norms: HeadNorms | None = None
        if (norm := getattr(attention, "q_norm", None)) is not None:
            self.head_norms = HeadNorms(norm.weight, attention.k_norm.weight, norm.variance_epsilon)
        self.kernels = kernels
        self.keep = keep
        (q, _), (k, _), _ = self.qkv.frozen.members
        self.kv_heads = k.outputs // self.head_dim
        self.heads = q.outputs // self.head_dim

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group.parameters]

    def __call__(self, x: Tensor, where: Where) -> Tensor:
        """(M, h) -> (M, h)."""
        found: Tensor = _LayerFunction.apply(x, self, where, *self.parameters)  # type: ignore[no-untyped-call]
        return found

    def _dropout(self, where: Where, group: Group) -> Dropout | None:
        """Of the group's input."""
        return where.dropout.of(len(self.groups) * self.number + self.groups.index(group)) if where.dropout else None

    def _norm(self, x: Tensor, norm: Any, group: Group) -> tuple[Tensor, Tensor, Small | None]:
        """(normed, its scale, normed in e4m3 where `group` multiplies so)."""
        found: tuple[Tensor, Tensor, Small | None] = self.kernels.rms_norm(
            x, norm.weight, norm.variance_epsilon, quantise=group.fp8_forward
        )
        return found

    def _rotated(self, states: Tensor, where: Where) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """((q, k, v), what `_Kept.unnormed` is); (M, all heads, D)."""
        do, cos, sin = self.kernels, where.cos, where.sin
        if self.head_norms is None:
            found = do.rotate(states, cos, sin, self.heads + self.kv_heads)
            return found.split([self.heads, self.kv_heads, self.kv_heads], dim=1), None
        query, key = do.norm_and_rotate(states, self.head_norms, cos, sin, self.heads, self.kv_heads)
        return (query, key, states[:, self.heads + self.kv_heads :]), states

    def _rotated_gradient(self, of_parts: tuple[Tensor, ...], kept: _Kept, where: Where) -> Tensor:
        """Gradient of what q, k and v were made of: (M, all heads x D)."""
        do, cos, sin = self.kernels, where.cos, where.sin
        if self.head_norms is None:
            found: Tensor = do.rotate_gradient(*of_parts, cos, sin)
        else:
            found = do.norm_and_rotate_gradient(*of_parts, kept.unnormed, self.head_norms, cos, sin)
        return found.flatten(1)

    def run(self, x: Tensor, where: Where, *, differentiable: bool) -> tuple[Tensor, _Kept]:
        """The layer's result, and everything that its backward pass can use."""
        do = self.kernels
        normed, scale_1, small = self._norm(x, self.norm_1, self.qkv)
        flat, inner_qkv = self.qkv.forward(normed, small=small, dropout=self._dropout(where, self.qkv))
        del normed, small
        parts, unnormed = self._rotated(flat.view(len(flat), -1, self.head_dim), where)
        del flat
        query, key, value = (part.detach().requires_grad_(differentiable) for part in parts)
        with torch.set_grad_enabled(differentiable):
            attended = attend(query, key, value, where.documents).flatten(1)
        middle, inner_o = self.o.forward(attended.detach(), onto=x, dropout=self._dropout(where, self.o))
        normed, scale_2, small = self._norm(middle, self.norm_2, self.gate_up)
        gate_up = self.gate_up.multiply(normed, small)
        inner_gate_up = self.gate_up.narrowed(normed, self._dropout(where, self.gate_up))
        del normed, small
        act, largest = do.swiglu(
            gate_up,
            self.gate_up.added(inner_gate_up),
            quantise=self.down.fp8_forward,
            gate_ranks=self.gate_up.rank_of_first,
        )
        dropout = self._dropout(where, self.down)
        y, inner_down = self.down.forward(act, onto=middle, largest=largest, dropout=dropout)
        qkv = (query, key, value)
        return y, _Kept(
            x, scale_1, inner_qkv, attended, qkv, inner_o, middle, scale_2, inner_gate_up, gate_up, inner_down, unnormed
        )

    def gradients(self, dy: Tensor, kept: _Kept, where: Where, *, of_input: bool) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of `parameters`). `kept` is used up."""
        d_middle, small, of_gate_up, of_down = self._mlp_gradients(dy, kept, where)
        do, dropout = self.kernels, self._dropout(where, self.o)
        d_attended, inner = self.o.input_gradient(d_middle, small=small, dropout=dropout)
        of_o = self.o.parameter_gradients(d_middle, inner, kept.attended.detach(), kept.inner_o, dropout)
        of_states = torch.autograd.grad(kept.attended, kept.qkv, d_attended)
        del d_attended, small
        d_flat = self._rotated_gradient(of_states, kept, where)
        normed, dropout = do.normed(kept.x, self.norm_1.weight, kept.scale_1), self._dropout(where, self.qkv)
        if not of_input:
            inner = self.qkv.narrowed_back(d_flat)
            of_qkv = self.qkv.parameter_gradients(d_flat, inner, normed, kept.inner_qkv, dropout)
            return None, [*of_qkv, *of_o, *of_gate_up, *of_down]
        d_normed, inner = self.qkv.input_gradient(d_flat, dropout=dropout)
        of_qkv = self.qkv.parameter_gradients(d_flat, inner, normed, kept.inner_qkv, dropout)
        dx, _ = do.rms_norm_gradient(d_normed, kept.x, self.norm_1.weight, kept.scale_1, d_middle, quantise=False)
        return dx, [*of_qkv, *of_o, *of_gate_up, *of_down]

    def _mlp_gradients(
        self, dy: Tensor, kept: _Kept, where: Where
    ) -> tuple[Tensor, Small | None, list[Tensor], list[Tensor]]:
        """(gradient of the middle, the same in e4m3, of gate_up's parameters, of down's)."""
        do = self.kernels
        normed = do.normed(kept.middle, self.norm_2.weight, kept.scale_2)
        gate_up, kept.gate_up = kept.gate_up, None
        if gate_up is None:
            gate_up = self.gate_up.multiply(normed)
        inner, dropout = self.down.narrowed_back(dy), self._dropout(where, self.down)
        d_gate_up, act, largest = do.swiglu_gradient(
            self.down.multiply_back(dy),
            gate_up,
            self.gate_up.added(kept.inner_gate_up),
            self.down.added_back(inner),
            dropout,
            quantise=self.gate_up.fp8 is not None,
            gate_ranks=self.gate_up.rank_of_first,
        )
        del gate_up
        of_down = self.down.parameter_gradients(dy, inner, act, kept.inner_down, dropout)
        del act
        dropout = self._dropout(where, self.gate_up)
        d_normed, inner = self.gate_up.input_gradient(d_gate_up, largest=largest, dropout=dropout)
        of_gate_up = self.gate_up.parameter_gradients(d_gate_up, inner, normed, kept.inner_gate_up, dropout)
        del d_gate_up
        d_middle, small = do.rms_norm_gradient(
            d_normed, kept.middle, self.norm_2.weight, kept.scale_2, dy, quantise=self.o.fp8 is not None
        )
        return d_middle, small, of_gate_up, of_down


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, where: Where, *parameters: Tensor) -> Tensor:
        # Grad mode is off in here, and without it inputs still say what they need.
        wanted = where.differentiable and any(ctx.needs_input_grad)
        again, on_host = layer.keep in RUN_AGAIN, wanted and layer.number in where.inputs
        if on_host:
            where.inputs.send(layer.number, x.detach())
        y, kept = layer.run(x.detach(), where, differentiable=wanted and not again)
        if on_host:
            where.inputs.sent()
        if wanted:
            if layer.keep == "no gate and up":
                kept.gate_up = None
            ctx.x = None if on_host else x.detach()
            ctx.kept = None if again else kept
            ctx.layer, ctx.where = layer, where
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, layer, inputs = ctx.kept, ctx.layer, ctx.where.inputs
        x = inputs.take(layer.number) if ctx.x is None else ctx.x
        inputs.fetch(layer.number - 1)  # whose turn is next: it travels while this layer works
        if kept is None:
            _, kept = layer.run(x, ctx.where, differentiable=True)
        ctx.kept = ctx.x = None  # whatever is used up can be overwritten by the next layer
        dx, gradients = layer.gradients(dy, kept, ctx.where, of_input=ctx.needs_input_grad[0])
        return dx, None, None, *gradients
