"""Whether a training goes the fast path, and what of it fits into the GPU's memory, as job.contract.fast_path says."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from job.contract.errors import ModelInvalid, TrainingFailed
from job.contract.fast_path import ADAPTER_COPY, FP8_CAPABILITY, Shape, holds_dequantised, room_of, what_to_keep
from job.contract.recipe import Recipe
from job.fast.kernels import in_triton
from job.fast.model import FastModel, why_not
from job.logs import get_logger
from job.shortage import STATE_BYTES


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
    reason = why_not(model, dora=recipe.lora.dora, longest=longest)
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
    shape = shape_of(fast)
    room = _room(recipe, model, shape, tokens)
    keeps = what_to_keep(shape, tokens, room)
    fast.keep(keeps, tokens=tokens)
    held = recipe.method == "qlora" and holds_dequantised(shape, tokens, room, fp8=fp8)
    if held:
        fast.keep_dequantised()
    get_logger().info(
        "speed.fast",
        precision=recipe.training.precision,
        keeps=", ".join(f"{keep}: {len(list(group))}" for keep, group in groupby(keeps)),
        weights="held dequantised" if held else "dequantised each time" if recipe.method == "qlora" else "as they are",
        tokens=tokens,
        room_bytes=room,
        host_bytes=shape.on_host(keeps) * tokens,
    )
    return fast


def shape_of(fast: FastModel) -> Shape:
    """What decides how much its layers keep."""
    first = fast.layers[0]
    return Shape(
        layers=len(fast.layers),
        hidden=first.qkv.inputs,
        heads=first.qkv.outputs,
        attended=first.o.inputs,
        feed_forward=first.down.inputs,
        rank=sum(group.rank for group in first.groups),
        weights=sum(group.inputs * group.outputs for group in first.groups),
        normed_heads=(first.heads + first.kv_heads) * first.head_dim if first.head_norms is not None else 0,
    )


def _room(recipe: Recipe, model: Any, shape: Shape, tokens: int) -> int:
    """Bytes that layers may keep."""
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - reserved
    held = reserved - torch.cuda.memory_allocated()
    adapter: int = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    states = adapter * (4 + STATE_BYTES[recipe.training.optimizer] + ADAPTER_COPY)
    return room_of(shape, tokens, free=min(free, allowed) + held, states=states)


def set_reproducible(recipe: Recipe) -> None:
    """On a GPU, where the recipe asks for it: every sum in the same order in every process, on GPUs of one model.

    cuBLAS needs CUBLAS_WORKSPACE_CONFIG in the environment before it starts; the attempt sets it.
    """
    if recipe.training.reproducible and torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
