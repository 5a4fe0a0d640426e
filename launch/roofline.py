"""How long a micro-batch takes through the modules: a roofline fitted to measured steps. Pure.

    seconds of a micro-batch = the longer of GPU and host, and a tenth of the shorter one
                       GPU   = matmuls / rate                        bf16, from the datasheet times a measured share
                             + attention / its rate                  quadratic in what attends to what
                             + bytes / bandwidth                     pointwise work, and turning NF4 into bf16
                       host  = layers x seconds                      launching kernels, which the GPU waits for
    seconds of a step        = micro-batches + optimizer

Floor per token and linear parameter: forward 2 FLOP, gradient of the input 2; frozen weights have no gradient of their
own. Recomputing the forward pass in the backward pass (gradient checkpointing) adds 2. launch/fast_path.py has the same
for what does not go through the modules.

Not in it: cuDNN plans its attention anew for each length of micro-batch that a process has not met, 0.2 s where it is
causal and 0.8 s where rows are masked (H200, torch 2.11, 2026-11-23). bench/steps.py times one length.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from job.contract.recipe import Lora, Recipe
from launch.cards import MATMUL_SHARE, Card
from launch.shape import Shape

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
"""As job/model.py and job/train.py set it where the job trains through the modules: eager, gradient checkpointing on a
GPU, everything between layers in bf16. On a CPU nothing is recomputed."""


class Batch(NamedTuple):
    """A micro-batch.

    Args:
        tokens: with padding.
        attended: tokens that each token is multiplied with, masked ones too.
        within: the same where only those of its own row are, as on the fast path.
    """

    tokens: float
    attended: float
    within: float
    masked: bool = False


def batch_of(batch_size: int, length: float, *, packing: bool, row: float | None = None) -> Batch:
    """A full micro-batch: packed sequences are laid end to end and told apart by a mask (TRL's padding-free batches
    with torch's attention), others are causal, which skips half.

    Args:
        length: tokens of a sequence.
        row: tokens of each of the packed rows; None where one fills a sequence.
    """
    tokens = batch_size * length
    return Batch(tokens, tokens if packing else length / 2, (row or length) / 2, masked=packing)


def full_batch(recipe: Recipe, longest: int | None = None) -> Batch:
    """The largest micro-batch that the recipe can meet.

    Args:
        longest: tokens of the longest row, where that is known.
    """
    training = recipe.training
    length = training.max_length if training.packing or longest is None else min(longest, training.max_length)
    return batch_of(training.batch_size, length, packing=training.packing)


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
    attention = attention_flop(shape, batch.tokens, batch.attended) * (passes - 1 + 2.5 if backward else 1)
    share = MASKED_SHARE if batch.masked else CAUSAL_SHARE
    units = shape.layers * (shape.hidden + shape.feed_forward)
    per_unit = POINTWISE_BYTES[stack.stream_bytes] * stack.fused + (DORA_BYTES if lora.dora else 0.0)
    per_parameter = (DEQUANTISE_BYTES if nf4 else 0.0) + (DORA_WEIGHT_BYTES if lora.dora else 0.0)
    traffic = passes * (per_unit * batch.tokens * units + per_parameter * shape.linear_parameters)
    gpu = linear / (peak * MATMUL_SHARE) + attention / (peak * share) + traffic / bandwidth
    host = shape.layers * HOST_SECONDS * passes / 3
    return max(gpu, host) + UNHIDDEN * min(gpu, host)


def attention_flop(shape: Shape, tokens: float, attended: float) -> float:
    """Of the forward pass's two matmuls: scores, and their product with the values."""
    return 4 * tokens * attended * shape.heads * shape.head_dim * shape.layers


def seconds_around(shape: Shape, *, paged: bool) -> float:
    """Of a step, what is not in its micro-batches.

    Args:
        paged: whether the optimizer is one of the 8-bit ones.
    """
    return STEP_SECONDS + (PAGED_SECONDS * 2 * len(shape.linears) * shape.layers if paged else 0.0)
