"""How long a step takes: a roofline with four terms, fitted to measured steps, and the table of those. Pure.

    seconds of a micro-batch = matmuls / rate                        bf16, from the datasheet times a measured share
                             + attention / its rate                  quadratic in what attends to what
                             + bytes / bandwidth                     pointwise work, and turning NF4 into bf16
                             + layers x host                         launching kernels
    seconds of a step        = micro-batches + optimizer

Floor per token and linear parameter: forward 2 FLOP, gradient of the input 2; frozen weights have no gradient of their
own. Recomputing the forward pass in the backward pass (gradient checkpointing) adds 2.
"""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import Final, NamedTuple

from job.contract.recipe import Recipe
from launch.cards import CARDS, MATMUL_SHARE, Card
from launch.shape import TINY_SHAPE, Shape

POINTWISE_BYTES: Final = 184.0
"""Traffic of norms, SwiGLU, rotations, casts and the adapter's small matmuls, for each token, layer, pass and unit of
hidden + feed-forward. Fitted to ANCHORS (eager TRL and PEFT)."""
DEQUANTISE_BYTES: Final = 9.3
"""Traffic of turning NF4 into bf16, for each parameter and pass: 27 ms for two passes over 7.0e9 parameters at 4.8 TB/s
(profile of one H200, 2026-11-22)."""
HOST_SECONDS: Final = 1.5e-3
"""A layer and micro-batch with recompute, of a process that launches some 400 kernels for it. Fitted to ANCHORS."""
STEP_SECONDS: Final = 0.09
"""Clipping, logging, the optimizer's fp32 states: 80-100 ms of host time in the same profile."""
PAGED_SECONDS: Final = 1e-4
"""More for each of the adapter's tensors with an 8-bit optimizer: 44 ms for 448 of them, same profile."""
CAUSAL_SHARE: Final = 0.38
"""Of the datasheet's peak in cuDNN's causal attention: 15.4 TFLOP in 41 ms, same profile."""
MASKED_SHARE: Final = 0.25
"""The same with a mask of several packed rows: other kernels, not measured; assumed."""
DORA_FACTOR: Final = 1.3
"""On matmuls and pointwise work with DoRA, and DORA_DROPOUT_FACTOR with dropout beside it, where PEFT 0.21 multiplies
with the base weight a second time. Assumed, not measured on a GPU."""
DORA_DROPOUT_FACTOR: Final = 1.6

CPU_FLOPS: Final = 38e9
"""Of one thread in fp32, and CPU_HOST_SECONDS a layer and micro-batch, CPU_STEP_SECONDS a step: fitted to five recipes
of the built-in model on a shared AMD EPYC (Zen 4), 2026-11-23."""
CPU_HOST_SECONDS: Final = 11.5e-3
CPU_STEP_SECONDS: Final = 15e-3
CPU_SPREAD: Final = 0.3
"""Other CPUs, and other work on them, which is the larger part."""


class Stack(NamedTuple):
    """How the job trains, as far as speed and memory see it.

    Args:
        recompute: gradient checkpointing.
        stream_bytes: of a number between layers, and in embedding and output layer: 2 in bf16, 4 in fp32 (what PEFT's
            prepare_model_for_kbit_training leaves).
        fused: the pointwise work that is left by kernels that do several things at once: 1 is none of them.
    """

    recompute: bool = True
    stream_bytes: int = 2
    fused: float = 1.0

    @property
    def passes(self) -> int:
        """Over the weights of a layer."""
        return 3 if self.recompute else 2


OURS: Final = Stack()
"""As job/model.py and job/train.py set it: eager, gradient checkpointing on a GPU, everything between layers in bf16.
On a CPU nothing is recomputed."""


class Batch(NamedTuple):
    """A micro-batch. `tokens` with padding; `attended`: tokens that each token is multiplied with, masked ones too."""

    tokens: float
    attended: float
    masked: bool = False


def batch_of(batch_size: int, length: float, *, packing: bool) -> Batch:
    """A full micro-batch: packed sequences are laid end to end and told apart by a mask (TRL's padding-free batches
    with torch's attention), others are causal, which skips half.

    Args:
        length: tokens of a sequence.
    """
    tokens = batch_size * length
    return Batch(tokens, tokens if packing else length / 2, masked=packing)


class Pace(NamedTuple):
    """What a step takes, in seconds. `spread` is one standard deviation, relative."""

    micro_batch: float
    evaluated_micro_batch: float
    step: float
    spread: float
    basis: str


def seconds_of_batch(shape: Shape, card: Card, batch: Batch, *, nf4: bool, stack: Stack, slower: float = 1.0) -> float:
    """Seconds of forward and backward of one micro-batch.

    Args:
        nf4: whether the base is quantised.
        slower: on matmuls and pointwise work, for DoRA.
    """
    peak, bandwidth = card.tflops * 1e12, card.gb_per_second * 1e9
    linear = batch.tokens * 2 * (shape.linear_parameters * stack.passes + shape.head_parameters * 2)
    # Backward through attention: five matmuls for the forward's two.
    attention = _attention(shape, batch) * (stack.passes - 1 + 2.5)
    share = MASKED_SHARE if batch.masked else CAUSAL_SHARE
    units = shape.layers * (shape.hidden + shape.feed_forward)
    pointwise = POINTWISE_BYTES * stack.fused * batch.tokens * units * stack.passes
    dequantised = DEQUANTISE_BYTES * shape.linear_parameters * stack.passes if nf4 else 0.0
    return (
        slower * (linear / (peak * MATMUL_SHARE) + pointwise / bandwidth)
        + attention / (peak * share)
        + dequantised / bandwidth
        + shape.layers * HOST_SECONDS * stack.passes / 3
    )


def pace_on_cpu(shape: Shape, recipe: Recipe, batch: Batch, *, threads: int = 1) -> Pace:
    """What the job's steps take on a CPU: eager, without recompute, in fp32."""
    rate, attention, host = CPU_FLOPS * threads, _attention(shape, batch), shape.layers * CPU_HOST_SECONDS
    forward = 2 * batch.tokens * (shape.linear_parameters + shape.head_parameters) + attention
    micro = host + (2 * forward + 1.5 * attention) / rate  # backward: one matmul a linear, five for attention's two
    step = recipe.training.gradient_accumulation * micro + CPU_STEP_SECONDS
    near = shape.parameters < 100 * TINY_SHAPE.parameters
    basis = "five recipes of the built-in model, timed on one thread of an AMD EPYC (2026-11-23)"
    return Pace(micro, host / 4 + forward / rate, step, CPU_SPREAD if near else 0.5, basis)


def pace(shape: Shape, recipe: Recipe, card: Card, batch: Batch) -> Pace:
    """What the job's steps take on a GPU."""
    micro_batches = recipe.training.gradient_accumulation
    slower = 1.0
    if recipe.lora.dora:
        slower = DORA_DROPOUT_FACTOR if recipe.lora.dropout else DORA_FACTOR
    nf4 = recipe.method == "qlora"
    factor = calibration(card)
    micro = factor * seconds_of_batch(shape, card, batch, nf4=nf4, stack=OURS, slower=slower)
    # A forward pass alone: what is left of a backward pass without recompute, halved.
    bare = Stack(recompute=False, stream_bytes=OURS.stream_bytes, fused=OURS.fused)
    evaluated = factor * seconds_of_batch(shape, card, batch, nf4=nf4, stack=bare, slower=slower) / 2
    step = micro_batches * micro + STEP_SECONDS
    if recipe.training.optimizer != "adamw":
        step += PAGED_SECONDS * 2 * len(shape.linears) * shape.layers
    spread, basis = _how_sure(card)
    if recipe.lora.dora:
        spread, basis = math.hypot(spread, 0.25), f"{basis}; DoRA taken as {slower:.1f} times slower, not measured"
    if batch.masked and batch.tokens > recipe.training.max_length:
        spread = math.hypot(spread, 0.1)
    return Pace(micro, evaluated, step, spread, basis)


def tokens_per_second(shape: Shape, recipe: Recipe, card: Card) -> float:
    """Of full micro-batches of `max_length`, without evaluations and saves: what a benchmark of the job should see."""
    training = recipe.training
    batch = batch_of(training.batch_size, training.max_length, packing=training.packing)
    return batch.tokens * training.gradient_accumulation / pace(shape, recipe, card, batch).step


class Measured(NamedTuple):
    """A timed row: whole steps of full micro-batches, NF4 base, LoRA r16 on all linears, every token trained.

    Args:
        what: stack and shape, for people.
        card: SkyPilot's name.
        micro_batches: in a step.
        paged: whether the optimizer was paged_adamw_8bit.
        gib: highest memory in use.
        source: machine, date and versions.
    """

    what: str
    card: str
    shape: Shape
    batch: Batch
    micro_batches: int
    stack: Stack
    paged: bool
    tokens_per_second: float
    gib: float
    source: str


def predicted(row: Measured) -> float:
    """Tokens a second that the roofline says of a measured row (NF4, no DoRA), before any calibration."""
    seconds = seconds_of_batch(row.shape, CARDS[row.card], row.batch, nf4=True, stack=row.stack)
    paged = PAGED_SECONDS * 2 * len(row.shape.linears) * row.shape.layers if row.paged else 0.0
    return row.batch.tokens * row.micro_batches / (seconds * row.micro_batches + STEP_SECONDS + paged)


LLAMA_8B: Final = Shape(
    hidden=4096, layers=32, feed_forward=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)
LLAMA_70B: Final = Shape(
    hidden=8192, layers=80, feed_forward=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)

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

OWN: Final[tuple[Measured, ...]] = ()
"""Steps of our own job. A row here moves every prediction for its card (`calibration`)."""


def calibration(card: Card, rows: tuple[Measured, ...] = OWN) -> float:
    """By what predicted seconds are multiplied: the geometric mean of predicted over measured speed on that card; on
    another card of those that were measured; 1 without own rows."""
    here = [row for row in rows if CARDS[row.card] == card] or list(rows)
    return geometric_mean(predicted(row) / row.tokens_per_second for row in here) if here else 1.0


def _how_sure(card: Card) -> tuple[float, str]:
    if any(CARDS[row.card] == card for row in OWN):
        return 0.07, f"steps of this job, timed on {card.name}"
    if card.measured:
        return 0.12, f"TRL's steps, timed on {card.name}; this job's own are not measured yet"
    sheet = f"{card.tflops:.0f} TFLOP/s bf16, {card.gb_per_second:.0f} GB/s"
    scaled = f"scaled from steps of TRL timed on H200, by {card.name}'s datasheet ({sheet})"
    return (0.16 if card.hopper else 0.25), scaled


def _attention(shape: Shape, batch: Batch) -> float:
    """FLOP of the forward pass's two matmuls: scores, and their product with the values."""
    return 4 * batch.tokens * batch.attended * shape.heads * shape.head_dim * shape.layers
