"""How long a step takes: a roofline fitted to measured steps, and the table of those. Pure.

    seconds of a micro-batch = the longer of GPU and host, and a tenth of the shorter one
                       GPU   = matmuls / rate                        bf16, from the datasheet times a measured share
                             + attention / its rate                  quadratic in what attends to what
                             + bytes / bandwidth                     pointwise work, and turning NF4 into bf16
                       host  = layers x seconds                      launching kernels, which the GPU waits for
    seconds of a step        = micro-batches + optimizer

Floor per token and linear parameter: forward 2 FLOP, gradient of the input 2; frozen weights have no gradient of their
own. Recomputing the forward pass in the backward pass (gradient checkpointing) adds 2.

Not in it: cuDNN plans its attention anew for each length of micro-batch that a process has not met, 0.2 s where it is
causal and 0.8 s where rows are masked (H200, torch 2.11, 2026-11-23). bench/steps.py times one length.
"""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import Final, NamedTuple

from job.contract.recipe import Lora, Recipe
from launch.cards import CARDS, MATMUL_SHARE, Card
from launch.shape import TINY_SHAPE, Shape

POINTWISE_BYTES: Final = {2: 115.0, 4: 190.0}
"""Traffic of norms, SwiGLU, rotations, casts and the adapter's small matmuls, for each token, layer, pass and unit of
hidden + feed-forward, by the bytes of a number between layers. Fitted to OWN and to ANCHORS; 2: 0.69 s of a step of
8 x 2048 tokens in the profile of our own 8B steps (one H200, 2026-11-23)."""
DEQUANTISE_BYTES: Final = 9.3
"""Traffic that no token moves, for each parameter and pass: NF4 into bf16, 27 ms for two passes over 7.0e9 parameters
at 4.8 TB/s (profile of one H200, 2026-11-22), and the adapter's casts."""
HOST_SECONDS: Final = 12e-3
"""A layer and micro-batch with recompute, of a process that launches some 400 kernels for it. Fitted to the steps of
one sequence at a time (8B 1x8: 3.3 to 3.9 s, of which the GPU works 2.2 s): so slow on a rented machine's cores."""
UNHIDDEN: Final = 0.1
"""Of the shorter one of GPU and host, what the longer one does not hide. Fitted to OWN."""
STEP_SECONDS: Final = 0.04
"""Clipping, logging, the optimizer's fp32 states: 30-50 ms between the GPU's work and whole steps of OWN."""
PAGED_SECONDS: Final = 1e-4
"""More for each of the adapter's tensors with an 8-bit optimizer: 44 ms for 448 of them (profile of 2026-11-22), 57 ms
in our own steps (8B 2x4, 2026-11-23)."""
CAUSAL_SHARE: Final = 0.40
"""Of the datasheet's peak in cuDNN's causal attention: 39.6 TFLOP in 99 ms (profile of our own 8B 8x1)."""
MASKED_SHARE: Final = 0.27
"""The same with a mask of several packed rows: 606 TFLOP in 2.37 s (8B 8x1 packed, same day)."""
DORA_BYTES: Final = 205.0
"""With DoRA more pointwise traffic, in the unit of POINTWISE_BYTES; and DORA_WEIGHT_BYTES, in that of DEQUANTISE_BYTES,
for the norm of the merged weight, which no token moves. Fitted to 8B 2x4 (4.79 s) and 8x1 (3.59 s), PEFT 0.21, one
H200, 2026-11-23. With dropout beside it PEFT multiplies with the base weight a second time: 6.2 s and 4.87 s were
measured, and 5.9 s and 4.6 s are predicted."""
DORA_WEIGHT_BYTES: Final = 85.0

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


PLAIN: Final = Lora()
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


def seconds_of_batch(
    shape: Shape,
    card: Card,
    batch: Batch,
    *,
    nf4: bool,
    stack: Stack,
    lora: Lora = PLAIN,
    backward: bool = True,
) -> float:
    """Seconds of forward and backward of one micro-batch.

    Args:
        nf4: whether the base is quantised.
        lora: whether it is a DoRA, and has dropout.
        backward: without it, the forward pass of an evaluation, which has no dropout either.
    """
    peak, bandwidth = card.tflops * 1e12, card.gb_per_second * 1e9
    passes = stack.passes if backward else 1
    linear_passes = 2 * passes if lora.dora and lora.dropout and backward else passes
    head_passes = 2 if backward else 1
    linear = batch.tokens * 2 * (shape.linear_parameters * linear_passes + shape.head_parameters * head_passes)
    # Backward through attention: five matmuls for the forward's two.
    attention = _attention(shape, batch) * (passes - 1 + 2.5 if backward else 1)
    share = MASKED_SHARE if batch.masked else CAUSAL_SHARE
    units = shape.layers * (shape.hidden + shape.feed_forward)
    per_unit = POINTWISE_BYTES[stack.stream_bytes] * stack.fused + (DORA_BYTES if lora.dora else 0.0)
    per_parameter = (DEQUANTISE_BYTES if nf4 else 0.0) + (DORA_WEIGHT_BYTES if lora.dora else 0.0)
    traffic = passes * (per_unit * batch.tokens * units + per_parameter * shape.linear_parameters)
    gpu = linear / (peak * MATMUL_SHARE) + attention / (peak * share) + traffic / bandwidth
    host = shape.layers * HOST_SECONDS * passes / 3
    return max(gpu, host) + UNHIDDEN * min(gpu, host)


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
    factor, nf4 = calibration(card), recipe.method == "qlora"
    micro, evaluated = (
        factor * seconds_of_batch(shape, card, batch, nf4=nf4, stack=OURS, lora=recipe.lora, backward=backward)
        for backward in (True, False)
    )
    step = recipe.training.gradient_accumulation * micro + STEP_SECONDS
    if recipe.training.optimizer != "adamw":
        step += PAGED_SECONDS * 2 * len(shape.linears) * shape.layers
    spread, basis = _how_sure(card)
    if recipe.lora.dora:
        spread = math.hypot(spread, 0.08)
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

_OWN_SOURCE: Final = (
    "one H200, 2026-11-23: bench/steps.py with torch 2.11.0, transformers 5.17.0, peft 0.21.2, bitsandbytes 0.50.2, "
    "trl 1.16.0; packed: five rows of 409 tokens to a sequence"
)


def _own(shape: Shape, size: int, micro_batches: int, speed: float, gib: float, *, packed: bool = False) -> Measured:
    name = f"{'8B' if shape is LLAMA_8B else '70B'} {size}x{micro_batches}{' packed' if packed else ''}"
    batch = batch_of(size, 2045 if packed else 2048, packing=packed)
    return Measured(name, "H200", shape, batch, micro_batches, OURS, False, speed, gib, _OWN_SOURCE)


OWN: Final = (
    _own(LLAMA_8B, 1, 8, 4709, 7.2),
    _own(LLAMA_8B, 2, 4, 7425, 8.1),
    _own(LLAMA_8B, 8, 1, 8427, 13.7),
    _own(LLAMA_8B, 1, 8, 4438, 7.2, packed=True),
    _own(LLAMA_8B, 2, 4, 6200, 8.2, packed=True),
    _own(LLAMA_8B, 8, 1, 3869, 14.6, packed=True),
    _own(LLAMA_70B, 1, 8, 942, 44.6),
    _own(LLAMA_70B, 2, 4, 1068, 47.8),
)
"""Steps of our own job. A row here moves every prediction for its card (`calibration`). 70B 2x4 packed was timed with
rows of 200 to 600 tokens, cuDNN's plans included: 860 tokens a second, 48.0 GiB."""


def calibration(card: Card, rows: tuple[Measured, ...] = OWN) -> float:
    """By what predicted seconds are multiplied: the geometric mean of predicted over measured speed on that card; on
    another card of those that were measured; 1 without own rows."""
    here = [row for row in rows if CARDS[row.card] == card] or list(rows)
    return geometric_mean(predicted(row) / row.tokens_per_second for row in here) if here else 1.0


def _how_sure(card: Card) -> tuple[float, str]:
    if any(CARDS[row.card] == card for row in OWN):
        return 0.07, f"steps of this job, timed on {card.name}"
    sheet = f"{card.tflops:.0f} TFLOP/s bf16, {card.gb_per_second:.0f} GB/s"
    scaled = f"scaled from steps of this job timed on H200, by {card.name}'s datasheet ({sheet})"
    return (0.16 if card.hopper else 0.25), scaled


def _attention(shape: Shape, batch: Batch) -> float:
    """FLOP of the forward pass's two matmuls: scores, and their product with the values."""
    return 4 * batch.tokens * batch.attended * shape.heads * shape.head_dim * shape.layers
