"""The norms over each head of q and k, and the rotation, in one pass over memory: job/fast/pointwise.py as Triton
kernels, some heads of a token to a program.

The norm's scale is made again in the backward pass: it costs a sum over what is in registers anyway.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.fast.pointwise import HeadNorms

TOGETHER: Final = 8
"""Heads of a token that a program has in its registers."""


@triton.jit
def _norm_and_rotate(
    states,
    out,
    weight,
    cos,
    sin,
    token_stride,
    heads,
    epsilon,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    known = at < HALF
    inside = (head < heads)[:, None] & known[None, :]
    there = states + row * token_stride + head[:, None] * (2 * HALF) + at[None, :]
    first = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + epsilon)[:, None]
    narrow = states.dtype.element_ty
    first, second = (first * scale).to(narrow).to(tl.float32), (second * scale).to(narrow).to(tl.float32)
    first *= tl.load(weight + at, mask=known, other=0.0).to(tl.float32)
    second *= tl.load(weight + HALF + at, mask=known, other=0.0).to(tl.float32)
    first, second = first.to(narrow).to(tl.float32), second.to(narrow).to(tl.float32)
    c = tl.load(cos + row * HALF + at, mask=known, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + at, mask=known, other=0.0)[None, :]
    target = out + (row * heads + head[:, None]) * (2 * HALF) + at[None, :]
    tl.store(target, (first * c - second * s).to(narrow), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(narrow), mask=inside)


@triton.jit
def _norm_and_rotate_gradient(
    gradient,
    states,
    weight,
    cos,
    sin,
    gradient_token_stride,
    gradient_head_stride,
    token_stride,
    heads,
    epsilon,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    known = at < HALF
    inside = (head < heads)[:, None] & known[None, :]
    turned = gradient + row * gradient_token_stride + head[:, None] * gradient_head_stride + at[None, :]
    first = tl.load(turned, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(turned + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + at, mask=known, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + at, mask=known, other=0.0)[None, :]
    first, second = first * c + second * s, second * c - first * s
    first *= tl.load(weight + at, mask=known, other=0.0).to(tl.float32)
    second *= tl.load(weight + HALF + at, mask=known, other=0.0).to(tl.float32)
    there = states + row * token_stride + head[:, None] * (2 * HALF) + at[None, :]
    unit_1 = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    unit_2 = tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(unit_1 * unit_1 + unit_2 * unit_2, axis=1) / (2 * HALF) + epsilon)[:, None]
    unit_1 *= scale
    unit_2 *= scale
    along = (tl.sum(first * unit_1 + second * unit_2, axis=1) / (2 * HALF))[:, None]
    tl.store(there, (scale * (first - unit_1 * along)).to(states.dtype.element_ty), mask=inside)
    tl.store(there + HALF, (scale * (second - unit_2 * along)).to(states.dtype.element_ty), mask=inside)


def norm_and_rotate(
    states: Tensor, norms: HeadNorms, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """As job.fast.pointwise.norm_and_rotate."""
    query = _forward(states[:, :heads], norms.query, norms.epsilon, cos, sin)
    key = _forward(states[:, heads : heads + kv_heads], norms.key, norms.epsilon, cos, sin)
    return query, key


def norm_and_rotate_gradient(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, norms: HeadNorms, cos: Tensor, sin: Tensor
) -> Tensor:
    """As job.fast.pointwise.norm_and_rotate_gradient, over `states`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    _backward(query, states[:, :heads], norms.query, norms.epsilon, cos, sin)
    _backward(key, states[:, heads : heads + kv_heads], norms.key, norms.epsilon, cos, sin)
    states[:, heads + kv_heads :].copy_(value)
    return states


def _forward(states: Tensor, weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    tokens, heads, size = states.shape
    out = torch.empty(tokens, heads, size, dtype=states.dtype, device=states.device)
    grid, blocks = _blocks(states)
    _norm_and_rotate[grid](states, out, weight, cos, sin, states.stride(0), heads, epsilon, **blocks)
    return out


def _backward(gradient: Tensor, states: Tensor, weight: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> None:
    if gradient.stride(2) != 1:
        gradient = gradient.contiguous()
    grid, blocks = _blocks(states)
    _norm_and_rotate_gradient[grid](
        gradient,
        states,
        weight,
        cos,
        sin,
        gradient.stride(0),
        gradient.stride(1),
        states.stride(0),
        states.shape[1],
        epsilon,
        **blocks,
    )


def _blocks(states: Tensor) -> tuple[Any, dict[str, int]]:
    """(grid, sizes) of a launch over (M, heads, D), whose heads lie end to end."""
    tokens, heads, size = states.shape
    together = min(TOGETHER, triton.next_power_of_2(heads))
    half = size // 2
    blocks = {"HEADS": together, "HALF": half, "BLOCK": triton.next_power_of_2(half), "num_warps": 4}
    return (tokens, triton.cdiv(heads, together)), blocks
