"""Which trainings go the hand-written way of job/fast/, and what of a batch is kept there. Launcher and job share it.

What is kept for the backward pass changes no bit of the result, only its price: gate and up cost a third of a layer's
multiplications to make again, everything else the other two thirds. So as much is kept as memory allows, layer by
layer; what is left over holds weights dequantised. Where not even all inputs fit, some wait in the host's memory: they
travel beside other work, which costs no time but needs a machine that has the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

ARCHITECTURES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
)
"""Class of transformers by `model_type`, of those whose layers are the one of job/fast/layer.py: RMSNorm, rotary q and
k, grouped attention, SwiGLU."""
NORMED_HEADS: Final = frozenset({"qwen3"})
"""Of those, whose q and k are normed before they are rotated, each head by itself."""
LINEARS: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Modules of such a layer that an adapter may be on."""
FP8_CAPABILITY: Final = (8, 9)
"""The first GPUs that multiply in e4m3 (Ada; then Hopper, 9.0)."""
USABLE: Final = 0.95
"""Of what the GPU has left: the allocator cannot fill gaps that are too small for what comes next."""
CHUNK_BYTES: Final = 1 << 30
"""Of logits. Large enough for the multiplications to be at their best, small beside the rest."""
WIDE: Final = 2
"""Bytes of a number between the layers: bf16."""
ADAPTER_COPY: Final = 2
"""Bytes of an adapter's weight more than the modules need: the copy that multiplies."""

Keep = Literal["all", "no gate and up", "input", "input on the host"]
"""What a layer remembers for its backward pass, from the fastest to the smallest."""
ON_HOST: Final = "input on the host"
RUN_AGAIN: Final[frozenset[Keep]] = frozenset({"input", ON_HOST})
"""Of which the whole layer is run again."""
TRAVELLING: Final = 2
"""Inputs on the GPU while layers get theirs back from the host: the one that is worked on, and the next."""


def why_plain(
    *,
    architecture: str,
    activation: str,
    window: int | None,
    longest: int,
    attention_dropout: float,
    dora: bool,
    adapted: Collection[str],
) -> str | None:
    """Why a training cannot go this way; None where it can.

    Args:
        architecture: transformers' class.
        window: tokens back that attention sees; None for all.
        longest: tokens of the longest row.
        adapted: names of the modules that the adapter is on, without what they are in.
    """
    if architecture not in ARCHITECTURES.values():
        return f"{architecture} has another layer than Llama"
    if dora:
        return "DoRA"
    if attention_dropout:
        return "its attention has dropout"
    if activation != "silu":
        return f"its activation is {activation}"
    if window is not None and window < longest:
        return f"its attention sees {window} tokens back"
    if other := set(adapted) - LINEARS:
        return f"it adapts {', '.join(sorted(other))}"
    return None


@dataclass(frozen=True)
class Shape:
    """What decides how much a layer keeps. `hidden`, `heads` (q, k and v together, times their size), `attended` (what
    attention gives: as many as q), `feed_forward`: features; `rank`: of all adapters of a layer together; `weights`:
    parameters of a layer; `normed_heads`: features of q and k where they are normed, which are kept before that too."""

    layers: int
    hidden: int
    heads: int
    attended: int
    feed_forward: int
    rank: int
    weights: int
    normed_heads: int = 0

    def kept(self, keep: Keep) -> int:
        """Bytes of a token in a layer, from one pass to the other, on the GPU."""
        if keep == ON_HOST:
            return 0
        if keep == "input":
            return WIDE * self.hidden
        numbers = 2 * self.hidden + self.heads + self.attended + self.normed_heads + self.rank
        small = WIDE * numbers + 16  # and the norms' scales, attention's sums
        return small + (2 * WIDE * self.feed_forward if keep == "all" else 0)

    def kept_by(self, keeps: Sequence[Keep]) -> int:
        """Bytes of a token in all layers, on the GPU, those that travel included."""
        travelling = TRAVELLING * self.kept("input") if ON_HOST in keeps else 0
        return sum(self.kept(keep) for keep in keeps) + travelling

    def on_host(self, keeps: Sequence[Keep]) -> int:
        """Bytes of a token in all layers, on the host."""
        return keeps.count(ON_HOST) * self.kept("input")

    def passing(self, tokens: int) -> int:
        """Bytes that one layer's backward pass, or the loss, holds for a while: dequantised weights, the gradients of
        what it has in memory, and logits."""
        weights = WIDE * 2 * self.feed_forward * self.hidden
        layer = weights + WIDE * tokens * (4 * self.feed_forward + 6 * self.hidden)
        return max(layer, 2 * CHUNK_BYTES + WIDE * tokens * 4 * self.hidden)

    def dequantised(self, *, fp8: bool) -> int:
        """Bytes of all weights as they multiply. In fp8 those of gate, up and down are there twice in e4m3, by rows and
        by columns; q, k, v and o are there in bf16, for the forward pass, and in e4m3."""
        attention = self.hidden * (self.heads + self.attended)
        return self.layers * (WIDE * self.weights + (attention if fp8 else 0))


def room_of(shape: Shape, tokens: int, *, free: float, states: int) -> int:
    """Bytes that layers may keep: what is free once model and adapter are there, less the adapter's gradients and
    states, less what passes."""
    return int(USABLE * free) - states - shape.passing(tokens)


def what_to_keep(shape: Shape, tokens: int, room: int) -> list[Keep]:
    """Of each layer, the most that fits.

    The first layers go to the host. Theirs are the inputs that are needed last: they leave while the forward pass is
    young, so that memory is free when it is full, and each comes back behind a layer of the backward pass. The last
    layer never does: its input would have to be back at once.

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
    fitting = room // (shape.kept("input") * tokens)
    away = min(shape.layers - fitting + TRAVELLING, shape.layers - 1)
    if fitting >= shape.layers or away <= TRAVELLING:  # fewer would save nothing
        return ["input"] * shape.layers
    keeps: list[Keep] = [ON_HOST] * away
    return keeps + ["input"] * (shape.layers - away)


def holds_dequantised(shape: Shape, tokens: int, room: int, *, fp8: bool) -> bool:
    """Whether there is also room for a quantised base's weights as they multiply, beside all that layers keep."""
    kept = shape.kept_by(what_to_keep(shape, tokens, room)) * tokens
    return room - kept > shape.dequantised(fp8=fp8)
