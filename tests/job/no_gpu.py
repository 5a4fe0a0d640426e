"""A GPU that is not there: Triton compiles for it, with ptxas, loads nothing and launches nothing.

So the functions that launch kernels are called as the job calls them, with tensors of the device "meta", and what is
compiled is what a GPU of that kind would be given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from triton import knobs
from triton.backends.compiler import GPUTarget

REGISTERS: Final = 65536
"""Of a block, 32 bits each, on all of `GPUS` (CUDA C++ Programming Guide, table of compute capabilities)."""


@dataclass(frozen=True)
class Gpu:
    """`capability`: 80 is 8.0; `shared`: bytes of shared memory that one block may have (the same guide and table)."""

    capability: int
    shared: int

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"

    @property
    def has_e4m3(self) -> bool:
        return self.capability >= 89


GPUS: Final = (
    Gpu(80, 163 * 1024),  # A100
    Gpu(86, 99 * 1024),  # A10, A40, RTX 30
    Gpu(89, 99 * 1024),  # L4, L40S, RTX 40
    Gpu(90, 227 * 1024),  # H100, H200
    Gpu(100, 227 * 1024),  # B200
)


@dataclass(frozen=True)
class Loaded:
    """A compiled kernel. `registers`: of a thread; `spilt`: its bytes on the stack, which did not fit into them."""

    name: str
    registers: int
    spilt: int


class NoGpu:
    """As triton.backends.driver.GPUDriver and its utils, as far as a launch asks them.

    Triton itself then raises OutOfResources where shared memory or threads do not suffice.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = self
        self.loaded: list[Loaded] = []
        self.launched: set[str] = set()

    def get_current_device(self) -> NoGpu:
        return self  # of a device Triton wants no more than that it is another one: it keeps what it has compiled by it

    def get_current_stream(self, _device: NoGpu) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.gpu.capability, 32)

    def get_device_properties(self, _device: NoGpu) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared}

    def load_binary(self, name: str, cubin: bytes, _shared: int, _device: NoGpu) -> tuple[None, None, int, int, int]:
        """(module, function, registers, spilt words, the most threads of a block), as cuobjdump reads them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
        assert found is not None, told
        registers, stack, local = (int(number) for number in found.groups())
        self.loaded.append(Loaded(name, registers, stack + local))
        threads = REGISTERS // (-(-registers // 8) * 8) // 32 * 32
        return None, None, registers, (stack + local) // 4, min(1024, threads)

    def launcher_cls(self, _source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: self.launched.add(metadata.name)
