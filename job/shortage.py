"""Out of memory: the one message about it, with the numbers and the settings that would help most. Pure.

It ends the run as failed, and nothing starts it again: the same batch would not fit the next time either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from job.contract.errors import TrainingFailed
from job.contract.recipe import Recipe

_GIB: Final = 2**30
_SHOWN: Final = 3

_WEIGHT_BYTES: Final = 8
"""Of an adapter's weight: itself and its gradient, both fp32."""
STATE_BYTES: Final = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Of an adapter's weight on the GPU, by optimizer: two states, of 32 or of 8 bits; paged ones give way to the host."""
_QUANTISED: Final = 0.3
"""Of a 16-bit base, what 4 bits take: NF4 with double quantisation is 4.13 bits a weight [QLoRA, section 3], and the
embeddings and the head stay as they are."""
_SMALLEST_CUT: Final = 16
"""training.max_length's own bound."""


@dataclass(frozen=True)
class Batch:
    """One forward pass. `tokens` with padding."""

    rows: int
    tokens: int
    packed: bool

    @property
    def text(self) -> str:
        if self.packed:
            return f"{self.rows:,} packed rows, {self.tokens:,} tokens"
        return f"{self.rows:,} rows x {self.tokens // max(self.rows, 1):,} tokens = {self.tokens:,}"


@dataclass(frozen=True)
class Footprint:
    """What a training takes. Bytes, but for `adapter_weights`."""

    device: str
    total: int
    peak: int
    model: int
    """Base and adapter, before the first batch."""
    adapter_weights: int


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe, and about how many bytes it saves at the peak."""

    text: str
    saves: float


def out_of_memory(
    doing: str, request: str, recipe: Recipe, footprint: Footprint, lengths: Sequence[int]
) -> TrainingFailed:
    """The error.

    Args:
        doing: what there was not enough memory for.
        request: what the allocator said it was asked for; may be empty.
        lengths: tokens of each train row, after cutting.
    """
    asked = f" (the last request was for {request})" if request else ""
    settings = remedies(recipe, footprint, lengths)[:_SHOWN]
    best = "a new run with one of these, the most helpful first: " + "; ".join(settings) if settings else ""
    larger = "this run on a GPU with more memory"
    return TrainingFailed(
        f"out of memory {doing}{asked}: {footprint.device} has {_gib(footprint.total)}, the model alone takes "
        f"{_gib(footprint.model)}, and {_gib(footprint.peak)} were taken at the peak",
        hint=f"{best}. Or {larger}" if best else larger,
    )


def does_not_fit(request: str, recipe: Recipe, device: str, total: int, weights: int) -> TrainingFailed:
    """The error when the base model cannot even be loaded.

    Args:
        request: as above.
        device, total: its name and its memory, bytes.
        weights: bytes of the base model's files.
    """
    asked = f" (the last request was for {request})" if request else ""
    smaller = 'a new run with method "qlora" (the base model in 4 bits), or ' if recipe.method == "lora" else ""
    return TrainingFailed(
        f"out of memory while base model {recipe.base_model.id} was loaded{asked}: {device} has {_gib(total)}, and its "
        f"weights are {_gib(weights)} on the disk",
        hint=f"{smaller}this run on a GPU with more memory",
    )


def remedies(recipe: Recipe, footprint: Footprint, lengths: Sequence[int]) -> list[str]:
    """Changes of the recipe that save memory, the most helpful first."""
    weights = footprint.adapter_weights
    states = STATE_BYTES[recipe.training.optimizer] * weights
    # What is neither model nor adapter's training is the batch's: activations and logits grow with its tokens.
    batch = max(footprint.peak - footprint.model - _WEIGHT_BYTES // 2 * weights - states, 0)
    found = [
        make(recipe, footprint, batch, lengths)
        for make in (_smaller_batch, _shorter_rows, _quantised, _smaller_adapter, _smaller_states, _plain_lora)
    ]
    useful = [remedy for remedy in found if remedy is not None]
    return [remedy.text for remedy in sorted(useful, key=lambda remedy: -remedy.saves)]


_Make = Callable[[Recipe, Footprint, int, Sequence[int]], Remedy | None]


def _smaller_batch(recipe: Recipe, _: Footprint, batch: int, __: Sequence[int]) -> Remedy | None:
    how = recipe.training
    if how.batch_size == 1:
        return None
    # The largest that divides it, so that a step still trains as many rows.
    size = next(size for size in range(how.batch_size // 2, 0, -1) if how.batch_size % size == 0)
    accumulation = how.gradient_accumulation * (how.batch_size // size)
    return Remedy(
        f"training.batch_size {how.batch_size} -> {size} with training.gradient_accumulation "
        f"{how.gradient_accumulation} -> {accumulation} (the same effective batch)",
        batch * (1 - size / how.batch_size),
    )


def _shorter_rows(recipe: Recipe, _: Footprint, batch: int, lengths: Sequence[int]) -> Remedy | None:
    how = recipe.training
    longest = how.max_length if how.packing else min(how.max_length, max(lengths, default=0))
    half = longest // 2
    if half < _SMALLEST_CUT:
        return None
    cut = sum(length > half for length in lengths)
    effect = f"cuts {cut:,} of {len(lengths):,} rows" if cut else "cuts no row"
    return Remedy(f"training.max_length {how.max_length} -> {half} ({effect})", batch * (1 - half / longest))


def _quantised(recipe: Recipe, footprint: Footprint, _: int, __: Sequence[int]) -> Remedy | None:
    if recipe.method == "qlora":
        return None
    return Remedy('method "lora" -> "qlora" (the base model in 4 bits)', footprint.model * (1 - _QUANTISED))


def _smaller_adapter(recipe: Recipe, footprint: Footprint, _: int, __: Sequence[int]) -> Remedy | None:
    rank, alpha = recipe.lora.rank, recipe.lora.alpha
    if rank == 1 or alpha == 1:
        return None
    taken = footprint.adapter_weights * (_WEIGHT_BYTES + STATE_BYTES[recipe.training.optimizer])
    return Remedy(f"lora.rank {rank} -> {rank // 2} with lora.alpha {alpha} -> {alpha // 2}", taken * 0.5)


def _smaller_states(recipe: Recipe, footprint: Footprint, _: int, __: Sequence[int]) -> Remedy | None:
    optimizer = recipe.training.optimizer
    if optimizer == "paged_adamw_8bit":
        return None
    text = f'training.optimizer "{optimizer}" -> "paged_adamw_8bit"'
    return Remedy(text, footprint.adapter_weights * STATE_BYTES[optimizer])


def _plain_lora(recipe: Recipe, footprint: Footprint, batch: int, _: Sequence[int]) -> Remedy | None:
    # DoRA keeps the norm of every adapted weight, and one more product of each layer for the backward pass.
    return Remedy("lora.dora true -> false", batch * 0.25) if recipe.lora.dora else None


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
