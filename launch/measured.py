"""The steps that were timed, and what they say of the predictions for a card. Pure."""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import Final, NamedTuple

from job.contract.fast_path import Keep
from launch.cards import CARDS, Card
from launch.fast_path import Kept, seconds_of_fast_batch
from launch.roofline import OURS, Batch, Stack, batch_of, seconds_around, seconds_of_batch
from launch.shape import LLAMA_8B, LLAMA_70B, Shape


class Measured(NamedTuple):
    """A timed row: whole steps of full micro-batches, NF4 base, LoRA r16 on all linears, every token trained.

    Args:
        what: stack and shape, for people.
        card: SkyPilot's name.
        micro_batches: in a step.
        stack: None for the fast path.
        paged: whether the optimizer was paged_adamw_8bit.
        gib: highest memory in use; on the fast path as reserved by torch's allocator; NaN where nobody looked.
        source: machine, date and versions.
        kept: on the fast path.
        fp8: likewise.
        within_gib: memory that it was allowed; None for all of the card's.
        whole: whether these are steps of the job, and not forward and backward alone.
    """

    what: str
    card: str
    shape: Shape
    batch: Batch
    micro_batches: int
    stack: Stack | None
    paged: bool
    tokens_per_second: float
    gib: float
    source: str
    kept: Kept = Kept(())
    fp8: bool = False
    within_gib: float | None = None
    whole: bool = True


def predicted(row: Measured) -> float:
    """Tokens a second that the roofline says of a measured row (NF4, no DoRA), before any calibration."""
    card = CARDS[row.card]
    if row.stack is None:
        seconds = seconds_of_fast_batch(row.shape, card, row.batch, row.kept, nf4=True, fp8=row.fp8)
    else:
        seconds = seconds_of_batch(row.shape, card, row.batch, nf4=True, stack=row.stack)
    around = seconds_around(row.shape, paged=row.paged) if row.whole else 0.0
    return row.batch.tokens * row.micro_batches / (seconds * row.micro_batches + around)


_FP32: Final = Stack(stream_bytes=4)
_LIGER: Final = Stack(stream_bytes=4, fused=0.75)
_SOURCE: Final = (
    "one H200, 2026-11-22: torch 2.11.0, transformers 5.17.0, peft 0.21.2, bitsandbytes 0.50.2, trl 1.16; random Llama "
    "shapes, NF4 double quantisation, LoRA r16 on all linears, 2048 tokens"
)

ANCHORS: Final = (
    Measured("TRL 8B 1x8", "H200", LLAMA_8B, batch_of(1, 2048, packing=False), 8, _FP32, True, 5082, 9.4, _SOURCE),
    Measured("TRL 8B 8x1", "H200", LLAMA_8B, batch_of(8, 2048, packing=False), 1, _FP32, True, 6579, 22.1, _SOURCE),
    Measured(
        "TRL + Liger 8B", "H200", LLAMA_8B, batch_of(8, 2048, packing=False), 1, _LIGER, True, 7520, 20.8, _SOURCE
    ),
    Measured(
        *("TRL 8B, no recompute", "H200", LLAMA_8B, batch_of(4, 2048, packing=False), 1),
        *(Stack(recompute=False, stream_bytes=4), True, 8570, 80.6, _SOURCE),
    ),
    Measured("TRL 70B 1x4", "H200", LLAMA_70B, batch_of(1, 2048, packing=False), 4, _FP32, True, 833, 48.5, _SOURCE),
    Measured(
        "TRL + Liger 70B", "H200", LLAMA_70B, batch_of(4, 2048, packing=False), 1, _LIGER, True, 1028, 66.6, _SOURCE
    ),
)
"""The nearest to our own job that was timed: TRL on the same libraries, with fp32 between the layers."""

_OWN_SOURCE: Final = (
    "one H200, 2026-11-23: bench/steps.py with torch 2.11.0, transformers 5.17.0, peft 0.21.2, bitsandbytes 0.50.2, "
    "trl 1.16.0; packed: five rows of 409 tokens to a sequence"
)


_FAST_SOURCE: Final = _OWN_SOURCE.replace("steps.py", "speed.py")
_KERNELS_SOURCE: Final = (
    "one H200, 2026-11-23, torch 2.11.0: forward and backward of job/fast/ alone, without the trainer"
)


def _own(shape: Shape, size: int, micro_batches: int, speed: float, gib: float, *, packed: bool = False) -> Measured:
    name = f"{_name(shape, size, micro_batches, packed=packed)}, plain"
    return Measured(
        *(name, "H200", shape, _batch(size, packed=packed), micro_batches, OURS, False, speed, gib, _OWN_SOURCE)
    )


def _fast(
    shape: Shape,
    size: int,
    micro_batches: int,
    speed: float,
    gib: float,
    *,
    packed: bool = False,
    fp8: bool = False,
    keep: Keep = "all",
    held: bool = False,
    within: float | None = None,
    source: str = _FAST_SOURCE,
) -> Measured:
    said = [_name(shape, size, micro_batches, packed=packed), *(["fp8"] if fp8 else [])]
    said += [f"within {within:g} GiB"] if within else []
    return Measured(
        *(", ".join(said), "H200", shape, _batch(size, packed=packed), micro_batches, None, False, speed, gib, source),
        kept=Kept(((keep, shape.layers),), held),
        fp8=fp8,
        within_gib=within,
        whole=source is not _KERNELS_SOURCE,
    )


def _name(shape: Shape, size: int, micro_batches: int, *, packed: bool) -> str:
    return f"{'8B' if shape is LLAMA_8B else '70B'} {size}x{micro_batches}{' packed' if packed else ''}"


def _batch(size: int, *, packed: bool) -> Batch:
    return batch_of(size, 2045 if packed else 2048, packing=packed, row=409 if packed else None)


OWN: Final = (
    _own(LLAMA_8B, 1, 8, 4709, 7.2),
    _own(LLAMA_8B, 2, 4, 7425, 8.1),
    _own(LLAMA_8B, 8, 1, 8427, 13.7),
    _own(LLAMA_8B, 1, 8, 4438, 7.2, packed=True),
    _own(LLAMA_8B, 2, 4, 6200, 8.2, packed=True),
    _own(LLAMA_8B, 8, 1, 3869, 14.6, packed=True),
    _own(LLAMA_70B, 1, 8, 942, 44.6),
    _own(LLAMA_70B, 2, 4, 1068, 47.8),
    _fast(LLAMA_8B, 8, 1, 17146, 67.0, held=True),
    _fast(LLAMA_8B, 8, 1, 18485, 66.9, held=True, packed=True),
    _fast(LLAMA_8B, 8, 1, 23976, 68.4, held=True, fp8=True),
    _fast(LLAMA_8B, 8, 1, 25814, 68.3, held=True, fp8=True, packed=True),
    _fast(LLAMA_70B, 2, 2, 1983, 100.4),
    _fast(LLAMA_70B, 1, 4, 1860, 72.0, within=79),
    _fast(LLAMA_70B, 1, 4, 1289, 46.8, within=47, keep="input"),
    _fast(LLAMA_70B, 2, 2, 2900, 102.7, fp8=True),
    _fast(LLAMA_70B, 1, 4, 2580, 71.2, fp8=True, within=79),
)
"""Steps of our own job, through the modules ("plain") and on the fast path. A row here moves every prediction for its
card and path (`calibration`). 70B 2x4 packed, plain, was timed with rows of 200 to 600 tokens, cuDNN's plans included:
860 tokens a second, 48.0 GiB."""


TRIALS: Final = (
    _fast(LLAMA_8B, 1, 8, 12730, math.nan, source=_KERNELS_SOURCE),
    _fast(LLAMA_8B, 8, 1, 17308, math.nan, source=_KERNELS_SOURCE),
    _fast(LLAMA_70B, 1, 1, 1510, 52.3, keep="no gate and up", source=_KERNELS_SOURCE),
    _fast(LLAMA_70B, 4, 1, 1651, 85.7, keep="no gate and up", source=_KERNELS_SOURCE),
    _fast(LLAMA_70B, 1, 1, 1281, 44.2, keep="input", source=_KERNELS_SOURCE),
    _fast(LLAMA_70B, 4, 1, 1408, 53.1, keep="input", source=_KERNELS_SOURCE),
)
"""What else the constants of launch/fast_path.py are fitted to. Not steps of the job: they calibrate nothing."""


def calibration(card: Card, rows: tuple[Measured, ...] = OWN, *, fast: bool = False) -> float:
    """By what predicted seconds are multiplied: the geometric mean of predicted over measured speed on that card and
    path; on another card of those that were measured; 1 without own rows."""
    of_path = [row for row in rows if (row.stack is None) is fast]
    here = [row for row in of_path if CARDS[row.card].name == card.name] or of_path
    return geometric_mean(predicted(row) / row.tokens_per_second for row in here) if here else 1.0


def how_sure(card: Card) -> tuple[float, str]:
    """(relative standard deviation of a prediction for a card, what it rests on)."""
    if any(CARDS[row.card].name == card.name for row in OWN):
        return 0.07, f"steps of this job, timed on {card.name}"
    sheet = f"{card.tflops:.0f} TFLOP/s bf16, {card.gb_per_second:.0f} GB/s"
    scaled = f"scaled from steps of this job timed on H200, by {card.name}'s datasheet ({sheet})"
    return (0.16 if card.hopper else 0.25), scaled
