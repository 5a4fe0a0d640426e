"""job/fast/pointwise.py as Triton kernels, a row (a token) to a program.

Why not torch.compile: packed batches have another number of tokens each time, which these do not notice; they are
ready in seconds on a fresh machine, where inductor takes eleven; and they write over what is not needed any more.
Sums are in fp32. A row's e4m3 scale is known when it has been read once; the second look at it hits the cache.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.fast.pointwise import FP8, FP8_LARGEST, Small

COLUMNS: Final = 2048
"""Of a row that is read in pieces."""
WARPS: Final = 8


@triton.jit
def _quantise_row(row, values, small, scale, largest, width, LARGEST: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of `values`, (., width), into `small`, and its scale."""
    tl.store(scale + row, largest / LARGEST)
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < width
        value = tl.load(values + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(small + row * width + at, (value * (LARGEST / largest)).to(small.dtype.element_ty), mask=inside)


@triton.jit
def _to_fp8(x, small, scale, width, LARGEST: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = 1e-12
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value)))
    _quantise_row(row, x, small, scale, largest, width, LARGEST, COLUMNS)


@triton.jit
def _rms_norm(
    x,
    weight,
    out,
    unit_scale,
    small,
    scale,
    width,
    epsilon,
    KNOWN: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if KNOWN:
        factor = tl.load(unit_scale + row)
    else:
        factor = tl.rsqrt(tl.sum(value * value) / width + epsilon)
        tl.store(unit_scale + row, factor)
    unit = (value * factor).to(x.dtype.element_ty).to(tl.float32)
    found = (unit * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * width + at, found, mask=inside)
    if QUANTISE:
        wide = found.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide)), 1e-12)
        tl.store(scale + row, largest / LARGEST)
        tl.store(small + row * width + at, (wide * (LARGEST / largest)).to(small.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_gradient(
    gradient,
    x,
    weight,
    unit_scale,
    beside,
    out,
    small,
    scale,
    width,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    factor = tl.load(unit_scale + row)
    unit = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * factor
    inner = tl.load(gradient + row * width + at, mask=inside, other=0.0).to(tl.float32)
    inner *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    own = factor * (inner - unit * (tl.sum(inner * unit) / width))
    own += tl.load(beside + row * width + at, mask=inside, other=0.0).to(tl.float32)
    found = own.to(out.dtype.element_ty)
    tl.store(out + row * width + at, found, mask=inside)
    if QUANTISE:
        wide = found.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide)), 1e-12)
        tl.store(scale + row, largest / LARGEST)
        tl.store(small + row * width + at, (wide * (LARGEST / largest)).to(small.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    states,
    out,
    cos,
    sin,
    token_stride,
    head_stride,
    out_stride,
    heads,
    SIGN: tl.constexpr,  # 1, -1 back, 0 a copy
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,  # the next power of two
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    known = at < HALF
    inside = (head < heads)[:, None] & known[None, :]
    there = states + row * token_stride + head[:, None] * head_stride + at[None, :]
    first = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(there + HALF, mask=inside, other=0.0).to(tl.float32)
    if SIGN != 0:
        c = tl.load(cos + row * HALF + at, mask=known, other=0.0)[None, :]
        s = tl.load(sin + row * HALF + at, mask=known, other=0.0)[None, :] * SIGN
        first, second = first * c - second * s, second * c + first * s
    target = out + row * out_stride + head[:, None] * (2 * HALF) + at[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy(logits, targets, losses, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    largest, total = float("-inf"), 0.0
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(largest, tl.max(value))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(value - highest))
        largest = highest
    log_sum = largest + tl.log(total)
    hit = tl.load(logits + row * width + target).to(tl.float32)
    tl.store(losses + row, log_sum - hit)
    tl.debug_barrier()  # the target's logit is read before it is written over
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = at < width
        value = tl.load(logits + row * width + at, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(value - log_sum) - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + row * width + at, gradient.to(logits.dtype.element_ty), mask=inside)


def _room(rows: int, width: int, like: Tensor, *, quantise: bool) -> tuple[Tensor, Tensor]:
    if not quantise:
        return like, like  # handed over and never written to
    return (
        torch.empty(rows, width, dtype=FP8, device=like.device),
        torch.empty(rows, 1, dtype=torch.float32, device=like.device),
    )


def to_fp8(x: Tensor) -> Small:
    """As job.fast.pointwise.to_fp8."""
    x = x.contiguous()
    rows, width = x.shape
    small, scale = _room(rows, width, x, quantise=True)
    _to_fp8[(rows,)](x, small, scale, width, FP8_LARGEST, COLUMNS, num_warps=WARPS)
    return small, scale


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, quantise: bool) -> tuple[Tensor, Tensor, Small | None]:
    """As job.fast.pointwise.rms_norm."""
    return _normed(x, weight, epsilon, None, quantise=quantise)


def normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As job.fast.pointwise.normed."""
    return _normed(x, weight, 0.0, scale, quantise=False)[0]


def _normed(
    x: Tensor, weight: Tensor, epsilon: float, known: Tensor | None, *, quantise: bool
) -> tuple[Tensor, Tensor, Small | None]:
    rows, width = x.shape
    out = torch.empty_like(x)
    factor = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if known is None else known
    small, scale = _room(rows, width, out, quantise=quantise)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x,
        weight,
        out,
        factor,
        small,
        scale,
        width,
        epsilon,
        KNOWN=known is not None,
        QUANTISE=quantise,
        LARGEST=FP8_LARGEST,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out, factor, (small, scale) if quantise else None


def rms_norm_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor, *, quantise: bool
) -> tuple[Tensor, Small | None]:
    """As job.fast.pointwise.rms_norm_gradient, over its first argument."""
    rows, width = x.shape
    small, factor = _room(rows, width, gradient, quantise=quantise)
    _rms_norm_gradient[(rows,)](
        gradient,
        x,
        weight,
        scale,
        beside,
        gradient,
        small,
        factor,
        width,
        QUANTISE=quantise,
        LARGEST=FP8_LARGEST,
        BLOCK=triton.next_power_of_2(width),
        num_warps=WARPS,
    )
    return gradient, (small, factor) if quantise else None


def rotate(states: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """As job.fast.pointwise.rotate, over its first argument."""
    _turn(states[:, :heads], states, cos, sin, sign=1)
    return states


def rotate_gradient(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As job.fast.pointwise.rotate_gradient."""
    tokens, heads, size = query.shape
    kv = key.shape[1]
    out = torch.empty(tokens, heads + 2 * kv, size, dtype=query.dtype, device=query.device)
    _turn(query, out, cos, sin, sign=-1)
    _turn(key, out[:, heads:], cos, sin, sign=-1)
    _turn(value, out[:, heads + kv :], cos, sin, sign=0)
    return out


def _turn(states: Tensor, out: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> None:
    tokens, heads, size = states.shape
    if states.stride(2) != 1:
        states = states.contiguous()
    together = min(8, triton.next_power_of_2(heads))
    grid: Any = (tokens, triton.cdiv(heads, together))
    _rotate[grid](
        states,
        out,
        cos,
        sin,
        states.stride(0),
        states.stride(1),
        out.stride(0),
        heads,
        SIGN=sign,
        HEADS=together,
        HALF=size // 2,
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=4,
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As job.fast.pointwise.cross_entropy, over its first argument."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](logits, targets, losses, width, 4096, num_warps=WARPS)
    return losses.sum(), logits
