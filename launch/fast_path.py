"""The hand-written way of job/fast/: which recipes go it, what it keeps in memory, and how long it takes. Pure.

The roofline is that of launch/roofline.py with other constants, fitted to OWN and TRIALS of launch/measured.py, which
it predicts within 4 %. Per token and frozen parameter 4 FLOP, and those of the forward pass again for what a layer does
not keep. With fp8 all gradients of frozen layers, and gate, up and down forward, are multiplied in e4m3.

Not in it: rows of several lengths in a batch go through FlashAttention, which is slower on Hopper than what was timed;
and that Qwen 3 reads q and k once more, to norm each head: 1 % of its traffic at 8B.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from job.contract.fast_path import (
    ADAPTER_COPY,
    ARCHITECTURES,
    NORMED_HEADS,
    RUN_AGAIN,
    Keep,
    holds_dequantised,
    room_of,
    what_to_keep,
)
from job.contract.fast_path import Shape as LayerShape
from job.contract.fast_path import why_plain as why_modules
from job.contract.recipe import Lora, Recipe
from launch.cards import CONTEXT_GIB, MATMUL_SHARE, Card
from launch.roofline import CAUSAL_SHARE, UNHIDDEN, Batch, attention_flop
from launch.shape import Shape

FP8_SHARE: Final = 0.645
"""Of the datasheet's e4m3 peak, twice that of bf16: 1272 to 1283 TFLOP/s of 1979 (H200, 2026-11-23, bench/speed.py)."""
POINTWISE_BYTES: Final = 57.0
"""Traffic of norms, SwiGLU, rotations and the adapter's small matmuls for each token, layer and unit of hidden +
feed-forward, forward and backward together. Fitted."""
FP8_BYTES: Final = 8.0
"""More with fp8: making e4m3 of activations and gradients. Fitted."""
FORWARD: Final = 1 / 3
"""Of that traffic, the forward pass's. Assumed; what is kept of a layer moves it by 2 % at most."""
DEQUANTISE_BYTES: Final = 4.6
"""For each parameter and pass, where NF4 is turned into what multiplies: half a byte read and two written, at about
half the memory's speed. Fitted."""
HOST_SECONDS: Final = 4.6e-3
"""A layer and micro-batch, of the process that launches its kernels. From one row at a time, 8B: 0.16 s."""
STATES: Final = {"adamw": 12, "adamw_8bit": 6, "paged_adamw_8bit": 4}
"""Bytes of an adapter's weight that are not there yet when the job looks at what is free: gradient, moments."""
_MLP: Final = ("gate_proj", "up_proj", "down_proj")


class Kept(NamedTuple):
    """What the layers of a training keep. `held`: a quantised base's weights also as they multiply."""

    layers: tuple[tuple[Keep, int], ...]
    held: bool = False

    @property
    def each(self) -> list[Keep]:
        """Layer by layer, the first first."""
        return [keep for keep, count in self.layers for _ in range(count)]

    @property
    def words(self) -> str:
        """For people."""
        said = {
            "all": "everything that the backward pass needs",
            "no gate and up": "everything but gate and up",
            "input": "nothing but their input",
            "input on the host": "nothing but their input, and that on the host",
        }
        total = sum(count for _, count in self.layers)
        parts = [
            f"{'all' if count == total else count} {'layer keeps' if count == 1 else 'layers keep'} {said[keep]}"
            for keep, count in self.layers
        ]
        return ", ".join([*parts, *(["weights are held dequantised"] if self.held else [])])


def why_plain(shape: Shape, recipe: Recipe, longest: int | None = None) -> str | None:
    """Why the job will train through the modules on a GPU; None where it goes the fast path.

    Args:
        longest: tokens of the longest row, where that is known.
    """
    return why_plain_of(
        shape.kind,
        recipe,
        activation=shape.activation,
        window=shape.window,
        attention_dropout=shape.attention_dropout,
        longest=longest,
    )


def why_plain_of(
    kind: str,
    recipe: Recipe,
    *,
    activation: str = "silu",
    window: int | None = None,
    attention_dropout: float = 0.0,
    longest: int | None = None,
) -> str | None:
    """The same of a model of which no more is known than its `model_type`."""
    length, lora = recipe.training.max_length, recipe.lora
    named = () if lora.target_modules == "all-linear" else lora.target_modules
    return why_modules(
        architecture=ARCHITECTURES.get(kind, f"the model type {kind!r}"),
        activation=activation,
        window=window,
        longest=length if longest is None else min(longest, length),
        attention_dropout=attention_dropout,
        dora=lora.dora,
        adapted={name.rpartition(".")[2] for name in named},
    )


def layer_shape(shape: Shape, lora: Lora) -> LayerShape:
    """As job.speed sees the model."""
    adapted = set(shape.linears) if lora.target_modules == "all-linear" else set(lora.target_modules)
    return LayerShape(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=(shape.heads + 2 * shape.kv_heads) * shape.head_dim,
        attended=shape.heads * shape.head_dim,
        feed_forward=shape.feed_forward,
        rank=lora.rank * len(adapted & set(shape.linears)),
        weights=shape.linear_parameters // shape.layers,
        normed_heads=(shape.heads + shape.kv_heads) * shape.head_dim if shape.kind in NORMED_HEADS else 0,
    )


def kept_by(shape: Shape, recipe: Recipe, tokens: float, gib: float) -> Kept:
    """What the job will keep, as job.speed decides it.

    Args:
        tokens: of the largest micro-batch.
        gib: memory of the GPU.
    """
    layer, count = layer_shape(shape, recipe.lora), int(tokens)
    adapter = shape.adapter_parameters(recipe.lora)
    free = (gib - CONTEXT_GIB) * 2**30 - shape.base_bytes(recipe.method) - 4 * adapter
    states = adapter * (STATES[recipe.training.optimizer] + ADAPTER_COPY)
    room = room_of(layer, count, free=free, states=states)
    fp8 = recipe.training.precision == "fp8"
    held = recipe.method == "qlora" and holds_dequantised(layer, count, room, fp8=fp8)
    return Kept(tuple(Counter(what_to_keep(layer, count, room)).items()), held)


def least_of(shape: Shape, recipe: Recipe) -> Kept:
    """What its layers keep where memory is short."""
    return Kept(tuple(Counter(what_to_keep(layer_shape(shape, recipe.lora), tokens=1, room=0)).items()))


def seconds_of_fast_batch(
    shape: Shape, card: Card, batch: Batch, kept: Kept, *, nf4: bool, fp8: bool = False, backward: bool = True
) -> float:
    """Seconds of forward and backward of one micro-batch.

    Args:
        nf4: whether the base is quantised.
        backward: without it, the forward pass of an evaluation.
    """
    peak, bandwidth = card.tflops * 1e12, card.gb_per_second * 1e9
    mlp = shape.layers * sum(shape.linears[name][0] * shape.linears[name][1] for name in _MLP)
    gate_up, rest = mlp * 2 / 3, shape.linear_parameters - mlp
    again = {keep: count / shape.layers for keep, count in kept.layers} if backward else {}
    whole = sum(again.get(keep, 0.0) for keep in RUN_AGAIN)
    part = again.get("no gate and up", 0.0)  # shares of the layers, made once more
    forward_mlp, forward_rest = mlp * (1 + whole) + gate_up * part, rest * (1 + whole)
    back = shape.linear_parameters if backward else 0
    small = forward_mlp + back if fp8 else 0.0
    wide = forward_rest + (0.0 if fp8 else forward_mlp + back) + shape.head_parameters * (2 if backward else 1)
    multiplied = 2 * batch.tokens * (wide / (peak * MATMUL_SHARE) + small / (2 * peak * FP8_SHARE))
    # Backward through attention: five matmuls for the forward's two.
    attended = attention_flop(shape, batch.tokens, batch.within) * (3.5 + whole if backward else 1)
    units = shape.layers * (shape.hidden + shape.feed_forward)
    traffic = (POINTWISE_BYTES + (FP8_BYTES if fp8 else 0.0)) * units * batch.tokens
    traffic *= 1 + FORWARD * whole if backward else FORWARD
    if nf4 and not kept.held:
        traffic += DEQUANTISE_BYTES * (forward_mlp + forward_rest + back)
    gpu = multiplied + attended / (peak * CAUSAL_SHARE) + traffic / bandwidth
    host = shape.layers * HOST_SECONDS * (1 + FORWARD * whole if backward else FORWARD)
    return max(gpu, host) + UNHIDDEN * min(gpu, host)
