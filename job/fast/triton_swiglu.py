"""SwiGLU and its gradient as Triton kernels that also add what the adapters of gate, up and down contribute.

Added inside the multiplications, or by a pass of its own after products in e4m3, that would be another reading and
writing of the widest activations there are: 1.2 ms of a layer's 20 in e4m3 (8B, 16 384 tokens, H200, 2026-11-23). Here
the numbers are at hand. A program has a tile of tokens by features; the largest number of a token, which will scale
it in e4m3, is found by all of its programs together.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.fast.dropout import Dropout
from job.fast.narrow import Widened
from job.fast.triton_narrow import RANKS_OF_TILE, drops, kept, ranks_of, widened_tile

TOKENS: Final = 32
FEATURES: Final = 128
WARPS: Final = 4


@triton.jit(do_not_specialize=["n_rows"])
def _swiglu(
    gate_up,
    inner,
    outer,
    act,
    largest,
    n_rows,
    width,
    outer_rank,
    outer_column,
    RANK: tl.constexpr,
    OF_GATE: tl.constexpr,
    FROM_UP: tl.constexpr,
    RANKS: tl.constexpr,
    QUANTISE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    gate, up, held = _gate_and_up(
        gate_up,
        inner,
        outer,
        rows,
        columns,
        n_rows,
        width,
        outer_rank,
        outer_column,
        RANK,
        OF_GATE,
        FROM_UP,
        RANKS,
        TOKENS,
        FEATURES,
    )
    found = (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty)
    tl.store(act + rows.to(tl.int64)[:, None] * width + columns[None, :], found, mask=held)
    if QUANTISE:
        _note_largest(largest, rows, tl.abs(found.to(tl.float32)), n_rows)


@triton.jit
def _note_largest(largest, rows, found, n_rows):
    """Of numbers that are not negative, and therefore in the order of their bits. Nothing waits for the others."""
    bits = tl.max(found, axis=1).to(tl.int32, bitcast=True)
    tl.atomic_max(largest + rows, bits, mask=rows < n_rows, sem="relaxed")


@triton.jit
def _gate_and_up(
    gate_up,
    inner,
    outer,
    rows,
    columns,
    n_rows,
    width,
    outer_rank,
    outer_column,
    RANK: tl.constexpr,
    OF_GATE: tl.constexpr,
    FROM_UP: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A tile of each, with the adapter's share, and which of it is there. Gate's ranks are those before OF_GATE, up's
    those from FROM_UP on."""
    held = (rows < n_rows)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    gate = tl.load(gate_up + at, mask=held, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=held, other=0.0).to(tl.float32)
    if OF_GATE > 0:
        gate += widened_tile(
            inner,
            outer,
            rows,
            columns,
            n_rows,
            width,
            outer_rank,
            outer_column,
            RANK,
            0,
            OF_GATE,
            RANKS,
            TOKENS,
            FEATURES,
        )
    if FROM_UP < RANK:
        up += widened_tile(
            inner,
            outer + width.to(tl.int64) * outer_column,
            rows,
            columns,
            n_rows,
            width,
            outer_rank,
            outer_column,
            RANK,
            FROM_UP,
            RANK,
            RANKS,
            TOKENS,
            FEATURES,
        )
    return gate, up, held


@triton.jit(do_not_specialize=["n_rows", "seed", "threshold"])
def _swiglu_gradient(
    d_act,
    gate_up,
    inner,
    outer,
    d_inner,
    d_outer,
    largest,
    n_rows,
    width,
    outer_rank,
    outer_column,
    d_outer_rank,
    d_outer_column,
    seed,
    threshold,
    factor,
    DROPS: tl.constexpr,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    OF_GATE: tl.constexpr,
    FROM_UP: tl.constexpr,
    RANKS: tl.constexpr,
    D_RANK: tl.constexpr,
    D_RANKS: tl.constexpr,
    QUANTISE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    gate, up, held = _gate_and_up(
        gate_up,
        inner,
        outer,
        rows,
        columns,
        n_rows,
        width,
        outer_rank,
        outer_column,
        RANK,
        OF_GATE,
        FROM_UP,
        RANKS,
        TOKENS,
        FEATURES,
    )
    there = d_act + rows.to(tl.int64)[:, None] * width + columns[None, :]
    gradient = tl.load(there, mask=held, other=0.0).to(tl.float32)
    if D_RANK > 0:
        more = widened_tile(
            d_inner,
            d_outer,
            rows,
            columns,
            n_rows,
            width,
            d_outer_rank,
            d_outer_column,
            D_RANK,
            0,
            D_RANK,
            D_RANKS,
            TOKENS,
            FEATURES,
        )
        if DROPS:
            more = tl.where(kept(rows, columns, seed, threshold, BITS), more * factor, 0.0)
        gradient += more
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    of_gate = (gradient * up * sigmoid * (1 + gate * (1 - sigmoid))).to(gate_up.dtype.element_ty)
    of_up = (gradient * silu).to(gate_up.dtype.element_ty)
    at = rows.to(tl.int64)[:, None] * (2 * width) + columns[None, :]
    tl.store(gate_up + at, of_gate, mask=held)
    tl.store(gate_up + at + width, of_up, mask=held)
    tl.store(there, (silu * up).to(d_act.dtype.element_ty), mask=held)
    if QUANTISE:
        most = tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32)))
        _note_largest(largest, rows, most, n_rows)


def _pair(pair: Widened | None, like: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """(inner, outer, its strides, its rank)."""
    if pair is None:
        return like, like, 0, 0, 0  # handed over and never read
    inner, outer = pair
    of_rank, of_column = outer.stride()
    return inner, outer, of_rank, of_column, len(outer)


def _split(rank: int, gate_ranks: int | None) -> tuple[int, int, int, int]:
    """(RANK, OF_GATE, FROM_UP, RANKS)."""
    of_gate, from_up = (rank, 0) if gate_ranks is None else (gate_ranks, gate_ranks)
    return rank, of_gate, from_up, ranks_of(max(of_gate, rank - from_up), RANKS_OF_TILE)


def swiglu(
    gate_up: Tensor, adapter: Widened | None, *, quantise: bool, gate_ranks: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """As job.fast.pointwise.swiglu."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    largest = torch.zeros(rows if quantise else 0, dtype=torch.int32, device=gate_up.device)
    inner, outer, *strides, rank = _pair(adapter, gate_up)
    _swiglu[(triton.cdiv(rows, TOKENS), triton.cdiv(width, FEATURES))](
        *(gate_up, inner, outer, act, largest, rows, width, *strides),
        *(*_split(rank, gate_ranks), quantise, TOKENS, FEATURES),
        num_warps=WARPS,
    )
    return act, largest.view(torch.float32) if quantise else None


def swiglu_gradient(
    gradient: Tensor,
    gate_up: Tensor,
    adapter: Widened | None,
    more: Widened | None,
    dropout: Dropout | None,
    *,
    quantise: bool,
    gate_ranks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As job.fast.pointwise.swiglu_gradient, over its first two arguments."""
    rows, width = gradient.shape
    largest = torch.zeros(rows if quantise else 0, dtype=torch.int32, device=gradient.device)
    inner, outer, *strides, rank = _pair(adapter, gate_up)
    d_inner, d_outer, *d_strides, d_rank = _pair(more, gate_up)
    _swiglu_gradient[(triton.cdiv(rows, TOKENS), triton.cdiv(width, FEATURES))](
        *(gradient, gate_up, inner, outer, d_inner, d_outer, largest, rows, width, *strides, *d_strides),
        *(*drops(dropout), *_split(rank, gate_ranks), d_rank, ranks_of(d_rank, RANKS_OF_TILE)),
        *(quantise, TOKENS, FEATURES),
        num_warps=WARPS,
    )
    return gate_up, gradient, largest.view(torch.float32) if quantise else None
