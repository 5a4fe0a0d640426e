"""How long a step takes, by the path that the job takes: the fast one, or through the modules. Pure."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from job.contract.recipe import Recipe
from launch.cards import Card
from launch.fast_path import kept_by, seconds_of_fast_batch, why_plain
from launch.measured import calibration, how_sure
from launch.roofline import OURS, Batch, attention_flop, full_batch, seconds_around, seconds_of_batch
from launch.shape import TINY_SHAPE, Shape

CPU_FLOPS: Final = 38e9
"""Of one thread in fp32, and CPU_HOST_SECONDS a layer and micro-batch, CPU_STEP_SECONDS a step: fitted to five recipes
of the built-in model on a shared AMD EPYC (Zen 4), 2026-11-23."""
CPU_HOST_SECONDS: Final = 11.5e-3
CPU_STEP_SECONDS: Final = 15e-3
CPU_SPREAD: Final = 0.3
"""Other CPUs, and other work on them, which is the larger part."""


class Pace(NamedTuple):
    """What a step takes, in seconds. `spread` is one standard deviation, relative; `how`: which path, and why
    the slow one."""

    micro_batch: float
    evaluated_micro_batch: float
    step: float
    spread: float
    basis: str
    how: str = ""


def pace_on_cpu(shape: Shape, recipe: Recipe, batch: Batch, *, threads: int = 1) -> Pace:
    """What the job's steps take on a CPU: eager, without recompute, in fp32."""
    rate, attention, host = (
        CPU_FLOPS * threads,
        attention_flop(shape, batch.tokens, batch.attended),
        shape.layers * CPU_HOST_SECONDS,
    )
    forward = 2 * batch.tokens * (shape.linear_parameters + shape.head_parameters) + attention
    micro = host + (2 * forward + 1.5 * attention) / rate  # backward: one matmul a linear, five for attention's two
    step = recipe.training.gradient_accumulation * micro + CPU_STEP_SECONDS
    near = shape.parameters < 100 * TINY_SHAPE.parameters
    basis = "five recipes of the built-in model, timed on one thread of an AMD EPYC (2026-11-23)"
    return Pace(micro, host / 4 + forward / rate, step, CPU_SPREAD if near else 0.5, basis)


def pace(
    shape: Shape,
    recipe: Recipe,
    card: Card,
    batch: Batch,
    *,
    longest: int | None = None,
    within_gib: float | None = None,
) -> Pace:
    """What the job's steps take on a GPU.

    Args:
        batch: the mean micro-batch.
        longest: tokens of the longest row, where that is known.
        within_gib: memory that the job may use; None for all of the card's.
    """
    nf4, training, lora = recipe.method == "qlora", recipe.training, recipe.lora
    plain = why_plain(shape, recipe, longest)
    factor = calibration(card, fast=plain is None)
    spread, basis = how_sure(card)
    if plain is None:
        fp8 = training.precision == "fp8"
        kept = kept_by(shape, recipe, full_batch(recipe, longest).tokens, within_gib or card.gib)
        how = "on the fast path" + (", in fp8" if fp8 else "")
        seconds = [
            seconds_of_fast_batch(shape, card, batch, kept, nf4=nf4, fp8=fp8, backward=backward)
            for backward in (True, False)
        ]
    else:
        how = f"recomputing in the backward pass ({plain})"
        seconds = [
            seconds_of_batch(shape, card, batch, nf4=nf4, stack=OURS, lora=lora, backward=backward)
            for backward in (True, False)
        ]
        if lora.dora:
            spread = math.hypot(spread, 0.08)
    micro, evaluated = (factor * each for each in seconds)
    step = training.gradient_accumulation * micro + seconds_around(shape, paged=training.optimizer != "adamw")
    return Pace(micro, evaluated, step, spread, basis, how)


def tokens_per_second(shape: Shape, recipe: Recipe, card: Card, *, within_gib: float | None = None) -> float:
    """Of full micro-batches of `max_length`, without evaluations and saves: what a benchmark of the job should see."""
    batch = full_batch(recipe)
    step = pace(shape, recipe, card, batch, within_gib=within_gib).step
    return batch.tokens * recipe.training.gradient_accumulation / step
