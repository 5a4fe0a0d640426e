"""job/fast/narrow.py as Triton kernels.

cuBLAS takes 0.09 ms for each of these products where the memory would allow 0.03 (16 384 x 4096 by 48, H200, torch
2.11, 2026-11-23), and a pass of its own for the sum; dropout would cost one more, and a mask. Whatever the number of
tokens, nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.fast.dropout import BITS, Dropout
from job.fast.narrow import Widened
from job.fast.pointwise import FP8, FP8_LARGEST, Small

TOKENS: Final = 64
SUMMED: Final = 64
"""Features of a step of `narrow`; with 128 ranks three such steps fit into the 99 KB of a small GPU."""
FEATURES: Final = 128
"""Of a tile that is widened."""
MOST_RANKS: Final = 128
"""Of a program; with more, others take the rest and read the input again."""
RANKS_OF_TILE: Final = 64
"""That are multiplied at once where a tile is widened."""
AT_ONCE: Final = 256
"""Programs that keep every multiprocessor busy: a product with fewer is cut along what it sums over."""


@triton.jit
def mixed(word):
    """As job.fast.dropout._mixed, in uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def kept(rows, columns, seed, threshold, BITS: tl.constexpr):
    """As job.fast.dropout.Dropout.kept, of some rows and columns."""
    row = mixed(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    found = mixed(columns.to(tl.uint32)[None, :] ^ row[:, None])
    return (found >> (32 - BITS)).to(tl.int32) >= threshold


@triton.jit
def widened_tile(
    inner,
    up,
    rows,
    columns,
    n_rows,
    n_columns,
    up_rank,
    up_column,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """(TOKENS, FEATURES) of inner up in fp32, of the ranks from FIRST to LAST; a row of inner has STRIDE."""
    found = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(FIRST, LAST, RANKS):
        ranks = start + tl.arange(0, RANKS)
        held = (rows < n_rows)[:, None] & (ranks < LAST)[None, :]
        left = tl.load(inner + rows.to(tl.int64)[:, None] * STRIDE + ranks[None, :], mask=held, other=0.0)
        held = (ranks < LAST)[:, None] & (columns < n_columns)[None, :]
        right = tl.load(up + ranks[:, None] * up_rank + columns[None, :] * up_column, mask=held, other=0.0)
        found = tl.dot(left, right, found)
    return found


@triton.jit(do_not_specialize=["n_rows", "seed", "threshold"])
def _narrow(
    x,
    down,
    out,
    n_rows,
    n_columns,
    x_stride,
    down_rank,
    down_column,
    span,
    largest,
    small,
    scale,
    seed,
    threshold,
    factor,
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A part of the columns to a program: out is (parts, n_rows, RANK). On the way x is written in e4m3."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    inside = rows < n_rows
    found = tl.zeros((TOKENS, RANKS), tl.float32)
    if QUANTISE:
        most = tl.maximum(tl.load(largest + rows, mask=inside, other=1.0), 1e-12)
        tl.store(scale + rows, most / LARGEST, mask=inside)
        by = (LARGEST / most)[:, None]
    for start in range(part * span, tl.minimum(part * span + span, n_columns), FEATURES):
        columns = start + tl.arange(0, FEATURES)
        within = columns < n_columns
        held = inside[:, None] & within[None, :]
        value = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=held, other=0.0)
        if QUANTISE:
            there = small + rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
            tl.store(there, (value.to(tl.float32) * by).to(small.dtype.element_ty), mask=held)
        if DROPS:
            value = tl.where(kept(rows, columns, seed, threshold, BITS), value, 0.0).to(x.dtype.element_ty)
        held = within[:, None] & (ranks < RANK)[None, :]
        weight = tl.load(down + ranks[None, :] * down_rank + columns[:, None] * down_column, mask=held, other=0.0)
        found = tl.dot(value, weight, found)
    if DROPS:
        found *= factor
    there = out + (part.to(tl.int64) * n_rows + rows)[:, None] * RANK + ranks[None, :]
    tl.store(there, found.to(out.dtype.element_ty), mask=inside[:, None] & (ranks < RANK)[None, :])


@triton.jit(do_not_specialize=["n_rows", "span", "seed", "threshold"])
def _narrow_gradient(
    inner,
    x,
    out,
    n_rows,
    n_columns,
    x_stride,
    span,
    seed,
    threshold,
    factor,
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A part of the rows to a program: out is (parts, RANK, n_columns)."""
    columns = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    within, real = columns < n_columns, ranks < RANK
    found = tl.zeros((RANKS, FEATURES), tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, n_rows), TOKENS):
        rows = start + tl.arange(0, TOKENS)
        inside = rows < n_rows
        held = inside[:, None] & within[None, :]
        value = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=held, other=0.0)
        if DROPS:
            value = tl.where(kept(rows, columns, seed, threshold, BITS), value, 0.0).to(x.dtype.element_ty)
        held = real[:, None] & inside[None, :]
        weight = tl.load(inner + rows.to(tl.int64)[None, :] * RANK + ranks[:, None], mask=held, other=0.0)
        found = tl.dot(weight, value, found)
    if DROPS:
        found *= factor
    there = out + (part * RANK + ranks)[:, None].to(tl.int64) * n_columns + columns[None, :]
    tl.store(there, found, mask=real[:, None] & within[None, :])


@triton.jit(do_not_specialize=["n_rows", "seed", "threshold"])
def _widen(
    inner,
    up,
    first,
    second,
    out,
    n_rows,
    n_columns,
    up_rank,
    up_column,
    seed,
    threshold,
    factor,
    ONTO: tl.constexpr,  # how many of first and second are added
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    found = widened_tile(
        inner, up, rows, columns, n_rows, n_columns, up_rank, up_column, RANK, 0, RANK, RANKS, TOKENS, FEATURES
    )
    if DROPS:
        found = tl.where(kept(rows, columns, seed, threshold, BITS), found * factor, 0.0)
    held = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
    if ONTO > 0:
        found += tl.load(first + at, mask=held, other=0.0).to(tl.float32)
    if ONTO > 1:
        found += tl.load(second + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=held)


def ranks_of(rank: int, most: int) -> int:
    """A block of so many ranks or of a part of them: a power of two that tensor cores multiply."""
    return min(most, max(16, int(triton.next_power_of_2(rank))))


def drops(dropout: Dropout | None) -> tuple[int, int, float, bool, int]:
    """(seed, threshold, factor, DROPS, BITS), as the kernels take them."""
    if dropout is None:
        return 0, 0, 1.0, False, BITS
    return dropout.seed, dropout.threshold, dropout.factor, True, BITS


def _parts(blocks: int, length: int, block: int) -> tuple[int, int]:
    """(parts, length of each, whole blocks) into which a sum over `length` is cut so that enough programs run."""
    parts = max(1, min(AT_ONCE // blocks, triton.cdiv(length, 4 * block)))
    span = triton.cdiv(triton.cdiv(length, parts), block) * block
    return triton.cdiv(length, span), span


def narrow(x: Tensor, down: Tensor, dropout: Dropout | None) -> Tensor:
    """As job.fast.narrow.narrow."""
    return _narrowed(x, down, dropout, None)[0]


def narrow_quantised(x: Tensor, down: Tensor, dropout: Dropout | None, largest: Tensor) -> tuple[Tensor, Small]:
    """As job.fast.pointwise.narrow_quantised, of a contiguous x; both at once, since reading x is what costs."""
    inner, small, scale = _narrowed(x, down, dropout, largest)
    return inner, (small, scale)


def _narrowed(
    x: Tensor, down: Tensor, dropout: Dropout | None, largest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, columns), rank = x.shape, len(down)
    blocks, ranks = triton.cdiv(rows, TOKENS), ranks_of(rank, MOST_RANKS)
    parts, span = _parts(blocks, columns, SUMMED)
    out = torch.empty(parts, rows, rank, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    small, scale = x, x  # handed over and never written to
    if largest is not None:
        small = torch.empty(rows, columns, dtype=FP8, device=x.device)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _narrow[(blocks, parts, triton.cdiv(rank, ranks))](
        *(x, down, out, rows, columns, x.stride(0), *down.stride(), span),
        *(x if largest is None else largest, small, scale, *drops(dropout), largest is not None, FP8_LARGEST),
        *(rank, ranks, TOKENS, SUMMED),
        num_warps=4,
        num_stages=3,
    )
    return out[0] if parts == 1 else out.sum(0).to(x.dtype), small, scale


def narrow_gradient(inner: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
    """As job.fast.narrow.narrow_gradient, in fp32."""
    (rows, columns), rank = x.shape, inner.shape[1]
    blocks, ranks = triton.cdiv(columns, SUMMED), ranks_of(rank, MOST_RANKS)
    parts, span = _parts(blocks, rows, TOKENS)
    out = torch.empty(parts, rank, columns, dtype=torch.float32, device=x.device)
    _narrow_gradient[(blocks, parts, triton.cdiv(rank, ranks))](
        *(inner, x, out, rows, columns, x.stride(0), span, *drops(dropout)),
        *(rank, ranks, TOKENS, SUMMED),
        num_warps=4,
        num_stages=3,
    )
    return out[0] if parts == 1 else out.sum(0)


def widen(pair: Widened, onto: Sequence[Tensor], dropout: Dropout | None, *, over: bool = False) -> Tensor:
    """As job.fast.narrow.widen."""
    inner, up = pair
    rows, (rank, columns) = len(inner), up.shape
    out = onto[0] if over else torch.empty(rows, columns, dtype=inner.dtype, device=inner.device)
    first, second = (*onto, out, out)[:2]
    seed, threshold, factor, *static = drops(dropout)
    _widen[(triton.cdiv(rows, TOKENS), triton.cdiv(columns, FEATURES))](
        *(inner, up, first, second, out, rows, columns, *up.stride(), seed, threshold, factor, len(onto)),
        *(*static, rank, ranks_of(rank, RANKS_OF_TILE), TOKENS, FEATURES),
        num_warps=4,
    )
    return out
