"""The rehearsal: the costliest batch that a run can draw goes through the model before its first step.

Running out of memory then happens in the first minute, and not where the longest rows happen to meet. It goes the very
way of a step, with room taken for what the optimizer will hold, and leaves nothing behind: gradients, random state and
mode are as they were, so that a run is the same bits with it and without.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from job.logs import get_logger
from job.memory import take_peak
from job.randomness import undisturbed


class Stage(Protocol):
    """The training, as far as it is rehearsed."""

    model: Any

    def play(self, examples: Sequence[int]) -> int:
        """Forward and backward as in a step, with these examples of the train set; its tokens, padding included."""
        ...

    def judge(self, examples: Sequence[int]) -> None:
        """Forward as in an evaluation, with these examples of the held-out set."""
        ...


@dataclass(frozen=True)
class Costliest:
    """A batch: which examples, and how many tokens go through the model with them, padding included."""

    examples: tuple[int, ...]
    tokens: int


def costliest_drawn(lengths: Sequence[int], size: int, *, packed: bool) -> Costliest:
    """The costliest of all batches that random orders can draw: the longest examples together.

    Args:
        lengths: tokens of each example, which is a row, or what packing made of several.
        size: examples in a batch.
    """
    longest = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))[:size]
    return Costliest(tuple(longest), _tokens([lengths[index] for index in longest], packed=packed))


def costliest_in_order(lengths: Sequence[int], size: int, *, packed: bool) -> Costliest:
    """The costliest of the batches that follow each other: an evaluation's."""
    batches = [range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size)]
    costs = [_tokens([lengths[index] for index in batch], packed=packed) for batch in batches]
    most = max(range(len(batches)), key=lambda number: (costs[number], -number))
    return Costliest(tuple(batches[most]), costs[most])


def _tokens(lengths: Sequence[int], *, packed: bool) -> int:
    """Packed examples are laid end to end; others are padded to the longest."""
    return sum(lengths) if packed else max(lengths) * len(lengths)


def rehearse(stage: Stage, drawn: Costliest, judged: Costliest | None, *, optimizer: Any, state_bytes: int) -> None:
    """Run the costliest batch, and the costliest evaluation's if that is larger.

    Args:
        optimizer: its weights, and which of them have their states already.
        state_bytes: what the optimizer will hold for each weight.

    Raises:
        whatever the model raises, an allocator's error above all; also then everything is put back.
    """
    began = time.monotonic()
    take_peak()
    with _as_it_was(stage.model):
        states = _room_for_states(optimizer, state_bytes)
        tokens = stage.play(drawn.examples)
        for weight in stage.model.parameters():
            weight.grad = None
        if judged is not None and judged.tokens > drawn.tokens:
            stage.judge(judged.examples)
        del states
    get_logger().info(
        "rehearsal.finished",
        seconds=round(time.monotonic() - began, 3),
        peak_bytes=take_peak(),
        tokens=tokens,
    )


def _room_for_states(optimizer: Any, state_bytes: int) -> list[torch.Tensor]:
    """As much memory as the optimizer will take at its first step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [
        torch.empty(weight.numel() * state_bytes, dtype=torch.uint8, device=weight.device)
        for weight in weights
        if not optimizer.state.get(weight)
    ]


@contextlib.contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Afterwards the model has the modes and gradients, and this process the random state, from before."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    for weight, _ in gradients:
        weight.grad = None  # else the backward pass would add to it
    try:
        with undisturbed():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, gradient in gradients:
            weight.grad = gradient
