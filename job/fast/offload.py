"""Inputs of layers in the host's memory, between the forward pass and the backward pass.

They travel on a stream of their own: out while the layer itself is run, and back while the layer after it is in its
backward pass. 70B, 2048 tokens: 33 MB a layer, 0.7 ms at the 50 GB/s of PCIe 5.0, beside 30 ms of work.

No tensor is needed by one stream while the other could overwrite it, whatever the allocator does: the layers' stream
waits for a copy out before it goes on to the next layer, which may get the memory of what was copied; a copy back waits
for all that the layers' stream had to do when the memory was taken. So nothing is freed late (`record_stream` would: a
process that is far ahead of its GPU would pile inputs up), and two inputs at most are on the GPU.

Without a GPU the same copies are made at once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from job.contract.errors import TrainingFailed
from job.machine import free_memory

_PORTABLE: Final = 1
"""cudaHostRegisterPortable."""


class HostMemory:
    """Room for the inputs of one batch. It grows only when a batch is larger than all before."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        """On which inputs travel; None without a GPU."""
        self._memory: Tensor | None = None
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._batch = 0

    @property
    def arriving(self) -> frozenset[int]:
        """Layers whose input is on its way back, or there and not yet taken."""
        return frozenset(self._arriving)

    @property
    def numbers(self) -> int:
        """That there is room for."""
        return 0 if self._memory is None else self._memory.numel()

    def reserve(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for so many `numbers` of one type, for all batches that are no larger.

        Args:
            device: where the layers are.

        Raises:
            TrainingFailed: the host does not have it.
        """
        if device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if self._memory is not None and self._memory.dtype == dtype and self.numbers >= numbers:
            return
        if self.stream is not None:
            self.stream.synchronize()
        self._memory = None  # before there is more of it
        # To ask for more than there is ends in SIGKILL, not in an error.
        size, free = numbers * dtype.itemsize, free_memory()
        if free is not None and size > free:
            raise _too_little(size, f"{free / 2**30:.1f} GiB are free")
        memory = torch.empty(numbers, dtype=dtype)
        if self.stream is not None:
            _pin(memory)
        self._memory = memory

    def for_batch(self, layers: Sequence[int], x: Tensor) -> Inputs:
        """What the layers of one batch put here and get back. What earlier batches left is lost.

        Args:
            layers: those that will, by number.
            x: of the shape, type and device of their inputs.
        """
        if layers:
            self.reserve(len(layers) * x.numel(), x.dtype, x.device)
            self._batch += 1
            if self.stream is not None:  # a backward pass that never ended may have asked for one
                torch.cuda.current_stream(x.device).wait_stream(self.stream)
            self._arriving.clear()
        return Inputs(self, self._batch, layers, x)

    def is_for(self, batch: int) -> bool:
        """Whether what is here is still that batch's."""
        return batch == self._batch

    def place(self, at: int, shape: torch.Size) -> Tensor:
        """The `at`th of a batch whose inputs have this shape."""
        if self._memory is None:
            raise AssertionError("reserve comes first")
        size = shape.numel()
        return self._memory[at * size : (at + 1) * size].view(shape)

    def fetch(self, layer: int, place: Tensor, device: torch.device) -> None:
        """Begin to copy back."""
        x = torch.empty(place.shape, dtype=place.dtype, device=device)
        with self.travelling(device):
            x.copy_(place, non_blocking=True)
        self._arriving[layer] = x, self.stream.record_event() if self.stream is not None else None

    def take(self, layer: int) -> Tensor:
        """What `fetch` has begun, for the layers' stream."""
        x, arrived = self._arriving.pop(layer)
        if arrived is not None:
            torch.cuda.current_stream(x.device).wait_event(arrived)
        return x

    @contextlib.contextmanager
    def travelling(self, device: torch.device) -> Iterator[None]:
        """Inside, what is begun happens on the stream for that, after all that the layers' has to do by now."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield


class Inputs:
    """Of one batch. A layer calls `send`, is run, and calls `sent`; backwards it calls `take` and `fetch`."""

    def __init__(self, memory: HostMemory, batch: int, layers: Sequence[int], x: Tensor) -> None:
        self._memory, self._batch = memory, batch
        self._places = {layer: at for at, layer in enumerate(layers)}
        self._shape, self._device = x.shape, x.device
        self._there: set[int] = set()

    def __contains__(self, layer: int) -> bool:
        """Whether a layer's input belongs here."""
        return layer in self._places

    def send(self, layer: int, x: Tensor) -> None:
        """Begin to copy a layer's input to the host. It must not change before `sent`."""
        with self._memory.travelling(self._device):
            self._place(layer).copy_(x, non_blocking=True)
        self._there.add(layer)

    def sent(self) -> None:
        """What the layers' stream gets to do from now on may overwrite what was sent."""
        if self._memory.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._memory.stream)

    def fetch(self, layer: int) -> None:
        """Begin to copy a layer's input back, if it is on the host: one layer before it is needed."""
        if layer in self._there and layer not in self._memory.arriving:
            self._memory.fetch(layer, self._place(layer), self._device)

    def take(self, layer: int) -> Tensor:
        """A layer's input, for the layers' stream. It is not kept here."""
        self.fetch(layer)
        return self._memory.take(layer)

    def _place(self, layer: int) -> Tensor:
        if not self._memory.is_for(self._batch):
            raise AssertionError("another batch has been through the layers: the inputs of this one are lost")
        return self._memory.place(self._places[layer], self._shape)


def _pin(memory: Tensor) -> None:
    """Let the GPU copy from and to it by itself, as torch/cuda/_pin_memory_utils.py does.

    torch's own allocator of such memory takes the next power of two (ATen/core/CachingHostAllocator.h), and this is
    gigabytes. Processes that are forked later see these pages too: harmless while nobody but the GPU writes there.
    """
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if failed := int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)):
        raise _too_little(memory.nbytes, f"it cannot be pinned, CUDA error {failed}")
    weakref.finalize(memory, cuda.cudaHostUnregister, memory.data_ptr())


def _too_little(size: int, why: str) -> TrainingFailed:
    return TrainingFailed(
        f"the inputs of the layers need {size / 2**30:.1f} GiB of this machine's memory, beside the GPU's: {why}",
        hint="a machine or a GPU with more memory, or a smaller training.batch_size or training.max_length",
    )
