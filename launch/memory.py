"""How much GPU memory a training needs, term by term, and what would make it fit. Pure.

On the fast path (launch/fast_path.py) a training takes what is free, and needs much less: whether it fits is told by
the least that its layers can keep, which is in the host's memory all but a little.
"""

from __future__ import annotations

from typing import Final, Literal

from job.contract.fast_path import ADAPTER_COPY
from job.contract.recipe import Recipe
from job.contract.records import Part
from launch.cards import CONTEXT_GIB, Card
from launch.fast_path import Kept, kept_by, layer_shape, least_of, why_plain
from launch.roofline import OURS, Batch, Stack, full_batch
from launch.shape import NF4_BYTES, Shape

ADAPTER_BYTES: Final = {"adamw": 16, "adamw_8bit": 10, "paged_adamw_8bit": 10}
"""A parameter: fp32 weight and gradient, and two moments in fp32 or 8 bits."""
HIDDEN_BYTES: Final = {2: 11.5, 4: 24.0}
"""What one layer keeps between its forward and its backward pass, a token and hidden unit; and a feed-forward unit
(FEED_FORWARD_BYTES); by the bytes of a number between layers. 2: fitted to five peaks of our own (launch/measured.py:
OWN); 4: together 0.285 MiB a token and layer of Llama 8B, 80.6 GiB measured without recompute."""
FEED_FORWARD_BYTES: Final = {2: 11.5, 4: 14.0}
HEAD_TILE_TOKENS: Final = 4096
"""TRL 1.16 computes the loss in tiles of so many tokens (trl/kernels/chunked_logprob.py), without all logits."""
HEAD_TILE_BYTES: Final = 8192 * 4
"""A token of such a tile; the vocabulary's part of it is assumed."""
MASK_BYTES: Final = 3
"""A pair of tokens in the mask that keeps packed rows apart: one of bool, two of bf16."""
FRAGMENTATION: Final = 0.25
"""Of activations, which come and go: what the allocator holds beyond what is in use. 0.21 to 0.43 of them in our own
steps with micro-batches of one length; more with many lengths, which it gives back when the card is full."""
DORA_TOKEN_BYTES: Final = 35.0
"""With DoRA, of the layer that is recomputed: a token and unit of hidden + feed-forward; and DORA_WEIGHT_BYTES, a
parameter of the largest linear layer. Fitted to 8B 2x4 (11.5 GiB) and 8x1 (24.5 GiB), PEFT 0.21, 2026-11-23."""
DORA_WEIGHT_BYTES: Final = 18.0
TIGHT: Final = 0.90
"""From this share on of the card's memory an estimate that is right within 10 % may be wrong about fitting."""

_COUNTED: Final = "counted from the model's shape; the count fits sixteen peaks of this job on H200 within 5 %"

HOST_BASE_GIB: Final = 8.0
"""Of the machine's own memory: the system, the job's process with its libraries, and what the loader holds. Assumed."""

Verdict = Literal["fits", "tight", "does not fit", "unknown"]


class Term(Part):
    """One use of memory."""

    name: str
    gib: float


class Memory(Part):
    """What a training needs on one GPU, and takes."""

    verdict: Verdict
    gib: float | None = None
    """What it takes; where that is all there is, what it needs."""
    least_gib: float | None = None
    """What it needs, where it takes more because there is more."""
    of_gib: float | None = None
    host_gib: float | None = None
    """Of the machine's own memory, for what layers keep there."""
    host_of_gib: float | None = None
    """What the machine has; None where nobody says."""
    largest: tuple[Term, ...] = ()
    """The three largest, largest first."""
    fixes: tuple[str, ...] = ()
    """What would make it fit, gentlest first; empty where it fits."""
    basis: str = ""

    @property
    def is_short_of_gpu(self) -> bool:
        """Whether the card has less than is needed at least."""
        needed = self.gib if self.least_gib is None else self.least_gib
        return needed is not None and self.of_gib is not None and needed > self.of_gib


def terms(shape: Shape, recipe: Recipe, batch: Batch, *, stack: Stack = OURS) -> tuple[Term, ...]:
    """All uses of memory at the peak, which is in the backward pass, GiB."""
    wide = stack.stream_bytes
    one_layer = HIDDEN_BYTES[wide] * shape.hidden + FEED_FORWARD_BYTES[wide] * shape.feed_forward
    inputs = shape.layers * shape.hidden * stack.stream_bytes
    found = {
        f"base weights in {'NF4' if recipe.method == 'qlora' else '16 bits'}": _linear_bytes(shape, recipe),
        "embedding and output layer": stack.stream_bytes * shape.other_parameters,
        "adapter with its optimizer": ADAPTER_BYTES[recipe.training.optimizer] * shape.adapter_parameters(recipe.lora),
        "loss": HEAD_TILE_BYTES * min(batch.tokens, HEAD_TILE_TOKENS) + 2 * 4 * shape.hidden * batch.tokens,
    }
    if stack.recompute:
        found["inputs of the layers"] = inputs * batch.tokens
        found["one layer at a time, recomputed"] = one_layer * batch.tokens
    else:
        found["what all layers keep for the backward pass"] = shape.layers * one_layer * batch.tokens
    if batch.masked:
        found["mask of the packed rows"] = MASK_BYTES * batch.tokens * batch.attended
    if recipe.lora.dora:
        found["DoRA's merged weight"] = DORA_WEIGHT_BYTES * max(i * o for i, o in shape.linears.values())
        # Without recompute every layer would keep it, as it does all else.
        kept = 1 if stack.recompute else shape.layers
        found["DoRA's activations"] = kept * DORA_TOKEN_BYTES * (shape.hidden + shape.feed_forward) * batch.tokens
    return tuple(Term(name=name, gib=value / 2**30) for name, value in found.items())


def peak_gib(shape: Shape, recipe: Recipe, batch: Batch, *, stack: Stack = OURS) -> float:
    """What torch.cuda.max_memory_allocated should see of a training through the modules, GiB."""
    return sum(term.gib for term in terms(shape, recipe, batch, stack=stack))


def fast_terms(shape: Shape, recipe: Recipe, batch: Batch, kept: Kept) -> tuple[Term, ...]:
    """All uses of memory on the fast path, GiB. torch's allocator reserves as much."""
    layer, tokens = layer_shape(shape, recipe.lora), int(batch.tokens)
    adapter = shape.adapter_parameters(recipe.lora)
    found = {
        f"base weights in {'NF4' if recipe.method == 'qlora' else '16 bits'}": _linear_bytes(shape, recipe),
        "embedding and output layer": 2 * shape.other_parameters,
        "adapter with its optimizer": (ADAPTER_BYTES[recipe.training.optimizer] + ADAPTER_COPY) * adapter,
        "what layers keep for the backward pass": tokens * layer.kept_by(kept.each),
        "one layer at a time, or the loss": layer.passing(tokens),
    }
    if kept.held:
        found["weights held dequantised"] = layer.dequantised(fp8=recipe.training.precision == "fp8")
    return tuple(Term(name=name, gib=value / 2**30) for name, value in found.items())


def memory_of(
    shape: Shape, recipe: Recipe, card: Card, *, longest: int | None = None, host_of_gib: float | None = None
) -> Memory:
    """Whether the job fits on a card, with full micro-batches of max_length: a run meets one sooner or later.

    Args:
        longest: tokens of the longest row, where that is known.
        host_of_gib: of the machine's own memory; None where nobody says.
    """
    batch = full_batch(recipe, longest)
    needed = _needed(shape, recipe, longest)
    verdict = verdict_of(needed, card.gib)
    if why_plain(shape, recipe, longest) is None:
        kept = kept_by(shape, recipe, batch.tokens, card.gib)
        found = (*fast_terms(shape, recipe, batch, kept), Term(name="CUDA", gib=CONTEXT_GIB))
        least = needed
        total = sum(term.gib for term in found)
        more = f"it takes what is free, and {needed:.1f} GiB would do, slower: " if total > 1.05 * needed else ""
        host = _host_gib(shape, recipe, batch, kept)
        basis = f"{_COUNTED}; {more}{kept.words}"
    else:
        found, least, host = (*terms(shape, recipe, batch), _overhead(shape, recipe, batch)), None, 0.0
        basis = _COUNTED
    if host:
        has = f"which is {host_of_gib:.0f}" if host_of_gib is not None else "of which nobody says how much there is"
        basis += f"; {host:.1f} GiB of inputs go to the machine's own memory, {has}"
        if _is_short(host, host_of_gib):
            verdict, basis = "does not fit", f"{basis}: too little"
    taken = sum(term.gib for term in found)
    return Memory(
        verdict=verdict,
        gib=taken,
        least_gib=least if least is not None and least < taken else None,
        of_gib=card.gib,
        host_gib=host or None,
        host_of_gib=host_of_gib if host else None,
        largest=tuple(sorted(found, key=lambda term: -term.gib)[:3]),
        fixes=fixes(shape, recipe, card, longest=longest, host_of_gib=host_of_gib)
        if verdict in ("tight", "does not fit")
        else (),
        basis=basis,
    )


def verdict_of(needed: float, available: float) -> Verdict:
    """Both in GiB."""
    if needed > available:
        return "does not fit"
    return "tight" if needed > TIGHT * available else "fits"


def fixes(
    shape: Shape, recipe: Recipe, card: Card, *, longest: int | None = None, host_of_gib: float | None = None
) -> tuple[str, ...]:
    """Changes that make a recipe fit a machine with room to spare. Gentlest first: what changes no result, then others.

    Each is tried alone, but for the last one, which tries them all; and when that is not enough the memory is named
    that a card would have to have.
    """
    training = recipe.training
    together = recipe
    found: list[str] = []

    def fits(changed: Recipe) -> bool:
        if _needed(shape, changed, longest) > TIGHT * card.gib:
            return False
        return not _is_short(_host_gib_on(card, shape, changed, longest), host_of_gib)

    def try_out(changed: Recipe, words: str) -> None:
        if fits(changed):
            found.append(f"{words} ({_needed(shape, changed, longest):.1f} GiB)")

    if training.batch_size > 1:
        size = training.batch_size
        while size > 1 and not fits(_with(recipe, batch_size=size)):
            size //= 2
        accumulation = -(-training.batch_size * training.gradient_accumulation // size)
        changed = _with(recipe, batch_size=size, gradient_accumulation=accumulation)
        try_out(changed, f"training.batch_size {size} with gradient_accumulation {accumulation}")
        together = _with(together, batch_size=1)
    if recipe.method == "lora":
        try_out(recipe.model_copy(update={"method": "qlora"}), 'method "qlora"')
        together = together.model_copy(update={"method": "qlora"})
    if training.optimizer == "adamw":
        try_out(_with(recipe, optimizer="paged_adamw_8bit"), 'training.optimizer "paged_adamw_8bit"')
    length = training.max_length
    while length > 256 and not fits(_with(recipe, max_length=length)):
        length //= 2
    if length < training.max_length:
        try_out(_with(recipe, max_length=length), f"training.max_length {length} (longer rows are cut)")
    together = _with(together, max_length=min(training.max_length, 512))
    if not found:
        try_out(together, _in_words(together, recipe))
    host = _host_gib_on(card, shape, recipe, longest)
    if _is_short(host, host_of_gib):
        found.append(f"a machine with {host + HOST_BASE_GIB:.0f} GiB of memory of its own")
    if not found:
        found.append(
            f"a GPU with {_needed(shape, recipe, longest) / TIGHT:.0f} GiB or more, or with "
            f"{_needed(shape, together, longest) / TIGHT:.0f} GiB and {_in_words(together, recipe)}"
        )
    return tuple(found)


def _in_words(changed: Recipe, recipe: Recipe) -> str:
    said = [] if changed.method == recipe.method else [f'method "{changed.method}"']
    for name in ("batch_size", "max_length"):
        value = getattr(changed.training, name)
        if value != getattr(recipe.training, name):
            said.append(f"training.{name} {value}")
    return ", ".join(said) or "the recipe as it is"


def _with(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def _needed(shape: Shape, recipe: Recipe, longest: int | None = None) -> float:
    """At least, GiB."""
    batch = full_batch(recipe, longest)
    if why_plain(shape, recipe, longest) is None:
        least = fast_terms(shape, recipe, batch, least_of(shape, recipe))
        return sum(term.gib for term in least) + CONTEXT_GIB
    return peak_gib(shape, recipe, batch) + _overhead(shape, recipe, batch).gib


def _host_gib(shape: Shape, recipe: Recipe, batch: Batch, kept: Kept) -> float:
    """What a micro-batch's inputs take of the machine's own memory."""
    return int(batch.tokens) * layer_shape(shape, recipe.lora).on_host(kept.each) / 2**30


def _host_gib_on(card: Card, shape: Shape, recipe: Recipe, longest: int | None) -> float:
    if why_plain(shape, recipe, longest) is not None:
        return 0.0
    batch = full_batch(recipe, longest)
    return _host_gib(shape, recipe, batch, kept_by(shape, recipe, batch.tokens, card.gib))


def _is_short(host: float, host_of_gib: float | None) -> bool:
    return host > 0 and host_of_gib is not None and host + HOST_BASE_GIB > host_of_gib


def _linear_bytes(shape: Shape, recipe: Recipe) -> float:
    return (NF4_BYTES if recipe.method == "qlora" else 2.0) * shape.linear_parameters


def _overhead(shape: Shape, recipe: Recipe, batch: Batch) -> Term:
    nothing = batch._replace(tokens=0.0)
    moving = peak_gib(shape, recipe, batch) - peak_gib(shape, recipe, nothing)
    return Term(name="CUDA and fragmentation", gib=CONTEXT_GIB + FRAGMENTATION * moving)
