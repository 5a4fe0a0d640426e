"""A decoder layer as one function with a backward pass of its own.

Per token it keeps its input, the rotated q, k, v, the attention's result, the middle residual, and gate and up:
2 x (3 h + h + 2 kv + 2 f) bytes in bf16, 0.18 MB at h = 8192. With less memory it drops gate and up and multiplies
again, or keeps its input alone, on the GPU or on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from job.contract.fast_path import RUN_AGAIN, Keep
from job.fast.attention import Documents, attend
from job.fast.kernels import Kernels
from job.fast.linear import Group
from job.fast.offload import Inputs
from job.fast.pointwise import Small


@dataclass(frozen=True)
class Where:
    """What all layers share in a batch."""

    documents: Documents
    cos: Tensor
    sin: Tensor
    inputs: Inputs
    """Of layers that keep them on the host."""


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


class Layer:
    """A decoder layer of a Llama-like model, around the weights of transformers' module."""

    def __init__(self, module: Any, kernels: Kernels, *, number: int, keep: Keep = "all") -> None:
        """
        Args:
            number: its place among the layers, from 0.
        """
        attention, mlp = module.self_attn, module.mlp
        compiled = kernels.compiled
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], compiled=compiled)
        self.o = Group([attention.o_proj], compiled=compiled)
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], compiled=compiled)
        self.down = Group([mlp.down_proj], compiled=compiled)
        self.norm_1 = module.input_layernorm
        self.norm_2 = module.post_attention_layernorm
        self.head_dim = attention.head_dim
        self.kernels = kernels
        self.keep = keep
        self.number = number
        self.kv_heads = self.qkv.frozen[1].outputs // self.head_dim
        self.heads = self.qkv.frozen[0].outputs // self.head_dim

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

    def _norm(self, x: Tensor, norm: Any, group: Group) -> tuple[Tensor, Tensor, Small | None]:
        """(normed, its scale, normed in e4m3 where `group` multiplies so)."""
        found: tuple[Tensor, Tensor, Small | None] = self.kernels.rms_norm(
            x, norm.weight, norm.variance_epsilon, quantise=group.fp8_forward
        )
        return found

    def run(self, x: Tensor, where: Where, *, differentiable: bool) -> tuple[Tensor, _Kept]:
        """The layer's result, and everything that its backward pass can use."""
        do = self.kernels
        normed, scale_1, small = self._norm(x, self.norm_1, self.qkv)
        flat, inner_qkv = self.qkv.forward(normed, small=small)
        del normed, small
        states = do.rotate(flat.view(len(flat), -1, self.head_dim), where.cos, where.sin, self.heads + self.kv_heads)
        del flat
        query, key, value = (
            part.detach().requires_grad_(differentiable)
            for part in states.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        )
        with torch.set_grad_enabled(differentiable):
            attended = attend(query, key, value, where.documents).flatten(1)
        middle, inner_o = self.o.forward(attended.detach(), onto=x)
        normed, scale_2, small = self._norm(middle, self.norm_2, self.gate_up)
        gate_up, inner_gate_up = self.gate_up.forward(normed, small=small)
        del normed, small
        act, small = do.swiglu(gate_up, quantise=self.down.fp8_forward)
        y, inner_down = self.down.forward(act, onto=middle, small=small)
        qkv = (query, key, value)
        return y, _Kept(
            x, scale_1, inner_qkv, attended, qkv, inner_o, middle, scale_2, inner_gate_up, gate_up, inner_down
        )

    def gradients(self, dy: Tensor, kept: _Kept, where: Where, *, of_input: bool) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of `parameters`). `kept` is used up."""
        d_middle, small, of_gate_up, of_down = self._mlp_gradients(dy, kept)
        do = self.kernels
        d_attended, inner = self.o.input_gradient(d_middle, small)
        of_o = self.o.parameter_gradients(d_middle, inner, kept.attended.detach(), kept.inner_o)
        of_states = torch.autograd.grad(kept.attended, kept.qkv, d_attended)
        del d_attended, small
        d_flat = do.rotate_gradient(*of_states, where.cos, where.sin).flatten(1)
        normed = do.normed(kept.x, self.norm_1.weight, kept.scale_1)
        if not of_input:
            inner = d_flat @ self.qkv.adapter[1] if self.qkv.rank else None
            of_qkv = self.qkv.parameter_gradients(d_flat, inner, normed, kept.inner_qkv)
            return None, [*of_qkv, *of_o, *of_gate_up, *of_down]
        d_normed, inner = self.qkv.input_gradient(d_flat)
        of_qkv = self.qkv.parameter_gradients(d_flat, inner, normed, kept.inner_qkv)
        dx, _ = do.rms_norm_gradient(d_normed, kept.x, self.norm_1.weight, kept.scale_1, d_middle, quantise=False)
        return dx, [*of_qkv, *of_o, *of_gate_up, *of_down]

    def _mlp_gradients(self, dy: Tensor, kept: _Kept) -> tuple[Tensor, Small | None, list[Tensor], list[Tensor]]:
        """(gradient of the middle, the same in e4m3, of gate_up's parameters, of down's)."""
        do = self.kernels
        normed = do.normed(kept.middle, self.norm_2.weight, kept.scale_2)
        gate_up, kept.gate_up = kept.gate_up, None
        if gate_up is None:
            gate_up, _ = self.gate_up.forward(normed)
        d_act, inner = self.down.input_gradient(dy)
        d_gate_up, act, small = do.swiglu_gradient(d_act, gate_up, quantise=self.gate_up.fp8 is not None)
        del d_act, gate_up
        of_down = self.down.parameter_gradients(dy, inner, act, kept.inner_down)
        del act
        d_normed, inner = self.gate_up.input_gradient(d_gate_up, small)
        of_gate_up = self.gate_up.parameter_gradients(d_gate_up, inner, normed, kept.inner_gate_up)
        del d_gate_up, small
        d_middle, small = do.rms_norm_gradient(
            d_normed, kept.middle, self.norm_2.weight, kept.scale_2, dy, quantise=self.o.fp8 is not None
        )
        return d_middle, small, of_gate_up, of_down


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, where: Where, *parameters: Tensor) -> Tensor:
        # Grad mode is off in here: whether there will be a backward pass is what the inputs say.
        wanted = any(ctx.needs_input_grad)
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
