"""What this process takes of its GPU's memory, or without one of this machine's; and when that is not enough."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from job.contract.errors import FtjobError, TrainingFailed
from job.contract.recipe import Recipe
from job.contract.records import Hardware
from job.model import hardware
from job.shortage import Footprint, does_not_fit

_SIGNS: Final = ("out of memory", "can't allocate memory", "alloc_failed", "cannot allocate memory")
"""In the messages of errors that have no class of their own: torch's CPU allocator, cuBLAS, bitsandbytes."""
_REQUEST: Final = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)
_KIB: Final = 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, CUDA's libraries or Python raise when memory is short."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextlib.contextmanager
def out_of_memory_is(describe: Callable[[str], TrainingFailed]) -> Iterator[None]:
    """Inside, running out of memory raises what `describe` makes of the allocator's request ("2.00 GiB", or "").

    Raises:
        TrainingFailed
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        asked = _REQUEST.search(str(error))
        raise describe(asked[1] if asked else "") from error


@contextlib.contextmanager
def loading(recipe: Recipe, weights: int) -> Iterator[None]:
    """Inside, where a base model is loaded, running out of memory raises what says so, however it was told.

    Args:
        weights: bytes of the base model's files.

    Raises:
        TrainingFailed
    """

    def describe(request: str) -> TrainingFailed:
        here = hardware()
        return does_not_fit(request, recipe, _device(here), here.memory_bytes, weights)

    with out_of_memory_is(describe):
        try:
            yield
        except FtjobError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None
            raise


def footprint(model: Any, *, model_bytes: int) -> Footprint:
    """What a training takes now.

    Args:
        model_bytes: what `taken` said before the first batch.
    """
    found = hardware()
    cuda = found.device == "cuda"
    return Footprint(
        device=_device(found),
        total=found.memory_bytes,
        # On a CPU of the whole process, the libraries included: nothing finer is on record.
        peak=torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB,
        model=model_bytes,
        adapter_weights=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    )


def taken(model: Any) -> int:
    """Bytes of the GPU's memory in use; without one those of the model's weights."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return sum(weight.nbytes for weight in model.parameters())


def take_peak() -> int | None:
    """Bytes at the peak since this was last asked; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _device(found: Hardware) -> str:
    return found.name if found.device == "cuda" else "this machine"
