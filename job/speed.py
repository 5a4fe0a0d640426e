"""Whether a training goes the fast path, and what of it fits into the GPU's memory.

What is kept for the backward pass changes no bit of the result, only its price: gate and up cost a third of a layer's
multiplications to make again, everything else the other two thirds. So as much is kept as memory allows, layer by
layer; what is left over holds weights dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import torch

from job.contract.errors import ModelInvalid, TrainingFailed
from job.contract.recipe import Recipe
from job.fast.kernels import in_triton
from job.fast.layer import Keep
from job.fast.loss import CHUNK_BYTES
from job.fast.model import FastModel, why_not
from job.logs import get_logger
from job.shortage import STATE_BYTES

USABLE: Final = 0.95
"""Of what the GPU has left: the allocator cannot fill gaps that are too small for what comes next."""
WIDE: Final = 2
"""Bytes of a number between the layers: bf16."""
FP8_CAPABILITY: Final = (8, 9)
"""The first GPUs that multiply in e4m3 (Ada; then Hopper, 9.0)."""


@dataclass(frozen=True)
class Shape:
    """What decides how much a layer keeps. `hidden`, `heads` (q, k and v together, times their size), `feed_forward`:
    features; `rank`: of all adapters of a layer together; `weights`: parameters of a layer."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    rank: int
    weights: int

    def kept(self, keep: Keep) -> int:
        """Bytes of a token in a layer, from one pass to the other."""
        if keep == "input":
            return WIDE * self.hidden
        small = WIDE * (3 * self.hidden + self.heads + self.rank) + 16  # and the norms' scales, attention's sums
        return small + (2 * WIDE * self.feed_forward if keep == "all" else 0)

    def passing(self, tokens: int) -> int:
        """Bytes that one layer's backward pass, or the loss, holds for a while: dequantised weights, the gradients of
        what it has in memory, and logits."""
        weights = WIDE * 2 * self.feed_forward * self.hidden
        layer = weights + WIDE * tokens * (4 * self.feed_forward + 6 * self.hidden)
        return max(layer, 2 * CHUNK_BYTES + WIDE * tokens * 4 * self.hidden)


def what_to_keep(shape: Shape, tokens: int, room: int) -> list[Keep]:
    """Of each layer, the most that fits.

    Args:
        tokens: of the largest micro-batch.
        room: bytes for what layers keep. Less than the least is not an error: the rehearsal will tell.
    """
    pairs: tuple[tuple[Keep, Keep], ...] = (("all", "no gate and up"), ("no gate and up", "input"))
    for more, less in pairs:
        rich, poor = shape.kept(more) * tokens, shape.kept(less) * tokens
        count = min(shape.layers, (room - poor * shape.layers) // (rich - poor))
        if count > 0:
            return [less] * (shape.layers - count) + [more] * count
    return ["input"] * shape.layers


def speed_up(recipe: Recipe, model: Any, *, tokens: int, longest: int) -> FastModel | None:
    """The fast path for a model on this machine's GPU, or None, and why not in the log.

    Args:
        tokens: of the largest micro-batch, padding included.
        longest: of the longest row.

    Raises:
        ModelInvalid: fp8 is asked for, and the model cannot have it.
        TrainingFailed: fp8 is asked for, and the GPU cannot.
    """
    fp8 = recipe.training.precision == "fp8"
    reason = why_not(model, dropout=recipe.lora.dropout, dora=recipe.lora.dora, longest=longest)
    if not torch.cuda.is_available():
        reason = "no GPU"
    if fp8 and reason is not None:
        raise ModelInvalid(
            f'training.precision "fp8" cannot be had here: {reason}', hint='leave it out, or set it to "bf16"'
        )
    if reason is not None:
        get_logger().info("speed.plain", why=reason)
        return None
    if fp8 and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise TrainingFailed(
            f'{torch.cuda.get_device_name()} does not multiply in fp8, and training.precision is "fp8"',
            hint='choose an H100 or H200, or set it to "bf16"',
        )
    fast = FastModel(model, kernels=in_triton())
    if fp8:
        fast.use_fp8()
    shape = _shape_of(fast)
    room = _room(recipe, model, shape, tokens)
    keeps = what_to_keep(shape, tokens, room)
    for layer, keep in zip(fast.layers, keeps, strict=True):
        layer.keep = keep
    left = room - sum(shape.kept(keep) for keep in keeps) * tokens
    held = recipe.method == "qlora" and left > WIDE * shape.weights * shape.layers
    if held:
        fast.keep_dequantised()
    get_logger().info(
        "speed.fast",
        precision=recipe.training.precision,
        keeps=", ".join(f"{keep}: {len(list(group))}" for keep, group in groupby(keeps)),
        weights="held dequantised" if held else "dequantised each time" if recipe.method == "qlora" else "as they are",
        tokens=tokens,
        room_bytes=room,
    )
    return fast


def _shape_of(fast: FastModel) -> Shape:
    first = fast.layers[0]
    return Shape(
        layers=len(fast.layers),
        hidden=first.qkv.inputs,
        heads=first.qkv.outputs,
        feed_forward=first.down.inputs,
        rank=sum(group.rank for group in first.groups),
        weights=sum(group.inputs * group.outputs for group in first.groups),
    )


def _room(recipe: Recipe, model: Any, shape: Shape, tokens: int) -> int:
    """Bytes that layers may keep: what is free, less the adapter's gradients and states, less what passes."""
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - reserved
    held = reserved - torch.cuda.memory_allocated()
    adapter: int = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    states = adapter * (4 + STATE_BYTES[recipe.training.optimizer])
    room: float = USABLE * (min(free, allowed) + held)
    return int(room) - states - shape.passing(tokens)


def set_reproducible(recipe: Recipe) -> None:
    """On a GPU, where the recipe asks for it: every sum in the same order in every process, on GPUs of one model.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG in the environment before it starts; the attempt sets it.
    """
    if recipe.training.reproducible and torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
