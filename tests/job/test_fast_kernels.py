"""Promise: without a GPU it is known that the Triton kernels compute what they should, and that GPUs can have them."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from triton import JITFunction
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import job.fast
from job.fast import nf4, triton_heads, triton_narrow, triton_pointwise, triton_swiglu
from job.fast.dropout import Dropout
from job.fast.pointwise import FP8, HeadNorms
from tests.job.no_gpu import GPUS, Gpu, NoGpu

ROOT = Path(__file__).parents[2]
A100, A10, L4, H100, B200 = GPUS
SLOW = ((A10, True), (H100, True), (L4, False), (B200, False))
"""The tightest in memory and the one most used with all that can be asked for, the others with the usual."""
ROWS = 300
HIDDEN = (4096, 8192)
WIDTHS = (14336, 28672)
DROPOUT = Dropout(0.1, 7)
FEW = 128
"""Bytes of a thread that may be spilt. The most is 80, of SwiGLU's gradient at rank 128 for sm_100; a tile that is too
large for its warps spills thousands."""


def test_the_compiler_is_the_images() -> None:
    assert f"\ntriton=={triton.__version__} " in (ROOT / "requirements.lock").read_text(encoding="utf-8")


@pytest.mark.slow
def test_interpreted_the_kernels_compute_what_torch_computes() -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/job/test_fast_gpu.py", "tests/job/test_fast_model_gpu.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)
    assert re.search(r"^[1-9]\d* passed in ", done.stdout, re.MULTILINE), done.stdout  # and none skipped


@dataclass(frozen=True)
class Launch:
    """A call of a function that launches kernels, at a size of real models."""

    name: str
    e4m3: bool
    call: Callable[[], object]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pair(rank: int, columns: int) -> tuple[Tensor, Tensor]:
    """What an adapter adds, as PEFT has it: the second is transposed."""
    return empty(ROWS, rank), empty(columns, rank).T


def launches(*, whole: bool, usual_e4m3: bool) -> Iterator[Launch]:
    """All that models and recipes can ask for; or the usual of every kernel, in e4m3 or not."""
    fp32 = torch.float32
    yield Launch("to_fp8", True, partial(triton_pointwise.to_fp8, empty(ROWS, 4096)))
    yield from (Launch(f"dequantise {kind}", kind != "bf16", partial(dequantise, kind)) for kind in NF4_INTO)
    for width in HIDDEN if whole else HIDDEN[-1:]:
        x, weight, scale = empty(ROWS, width), empty(width), empty(ROWS, 1, dtype=fp32)
        yield Launch(f"normed {width}", False, partial(triton_pointwise.normed, x, weight, scale))
        for e4m3 in (False, True) if whole else (usual_e4m3,):
            norm = partial(triton_pointwise.rms_norm, x, weight, 1e-5, quantise=e4m3)
            back = partial(triton_pointwise.rms_norm_gradient, x, x, weight, scale, x, quantise=e4m3)
            yield Launch(f"rms_norm {width}", e4m3, norm)
            yield Launch(f"rms_norm_gradient {width}", e4m3, back)
    for width in WIDTHS if whole else WIDTHS[-1:]:
        for rank, split, e4m3 in KINDS if whole else ((16, True, usual_e4m3),):
            adapter, more = (pair(2 * rank, 2 * width), pair(rank, width)) if rank else (None, None)
            of = (empty(ROWS, 2 * width), adapter)
            how: dict[str, Any] = {"quantise": e4m3, "gate_ranks": rank if split else None}
            act = partial(triton_swiglu.swiglu, *of, **how)
            back_of_act = partial(triton_swiglu.swiglu_gradient, empty(ROWS, width), *of, more, DROPOUT, **how)
            yield Launch(f"swiglu {width}, rank {rank}", e4m3, act)
            yield Launch(f"swiglu_gradient {width}, rank {rank}", e4m3, back_of_act)
    for rank in (48, 16, 192) if whole else (48,):
        x, (inner, up) = empty(ROWS, 4096), pair(rank, 4096)
        for dropout in (None, DROPOUT) if whole else (DROPOUT,):
            kind = f"rank {rank}, {'dropped' if dropout else 'whole'}"
            yield Launch(f"narrow, {kind}", False, partial(triton_narrow.narrow, x, empty(rank, 4096), dropout))
            quantised = partial(triton_narrow.narrow_quantised, x, empty(rank, 4096), dropout, empty(ROWS, dtype=fp32))
            yield Launch(f"narrow_quantised, {kind}", True, quantised)
            yield Launch(f"narrow_gradient, {kind}", False, partial(triton_narrow.narrow_gradient, inner, x, dropout))
            yield Launch(f"widen, {kind}", False, partial(triton_narrow.widen, (inner, up), [x, x], dropout))
    for heads, kv in ((32, 8), (64, 8)):
        cos, q, k = empty(ROWS, 64, dtype=fp32), empty(ROWS, heads, 128), empty(ROWS, kv, 128)
        turned = partial(triton_pointwise.rotate, empty(ROWS, heads + 2 * kv, 128), cos, cos, heads + kv)
        yield Launch(f"rotate {heads}", False, turned)
        yield Launch(f"rotate_gradient {heads}", False, partial(triton_pointwise.rotate_gradient, q, k, k, cos, cos))
    for size in (64, 80, 128, 256) if whole else (128,):
        norms = HeadNorms(empty(size), empty(size), 1e-6)
        cos, states = empty(ROWS, size // 2, dtype=fp32), empty(ROWS, 12, size)
        parts = [empty(ROWS, heads, size) for heads in (8, 2, 2)]
        normed = partial(triton_heads.norm_and_rotate, states, norms, cos, cos, 8, 2)
        gradients = (parts[0], parts[1], parts[2])
        back_of_normed = partial(triton_heads.norm_and_rotate_gradient, *gradients, states, norms, cos, cos)
        yield Launch(f"norm_and_rotate {size}", False, normed)
        yield Launch(f"norm_and_rotate_gradient {size}", False, back_of_normed)
    for vocabulary in (32000, 128256):
        logits, targets = empty(ROWS, vocabulary), empty(ROWS, dtype=torch.int64)
        yield Launch(f"cross_entropy {vocabulary}", False, partial(triton_pointwise.cross_entropy, logits, targets))


KINDS: tuple[tuple[int, bool, bool], ...] = (
    *((0, False, e4m3) for e4m3 in (False, True)),
    *((rank, False, e4m3) for rank in (16, 64) for e4m3 in (False, True)),
    *((rank, True, e4m3) for rank in (16, 128, 64) for e4m3 in (False, True)),
)
"""An adapter's rank, whether gate and up have ranks of their own, and whether e4m3 is asked for."""
NF4_INTO = ("bf16", "e4m3 by rows", "e4m3 by columns")


def dequantise(kind: str) -> None:
    """A small weight, in memory: only which of the kernel's arguments are whole sixteens depends on its size."""
    from bitsandbytes.nn import Params4bit

    weight: Any = Params4bit(torch.ones(64, 128).bfloat16(), requires_grad=False, quant_type="nf4", blocksize=64)
    weight = weight.to("cpu")
    by_column = kind.endswith("columns")
    out = torch.empty((128, 64) if by_column else (64, 128), dtype=torch.bfloat16 if kind == "bf16" else FP8)
    scale = None if kind == "bf16" else torch.ones(128 if by_column else 64)
    nf4.dequantise(weight.data, weight.quant_state, out, scale=scale, by_column=by_column)


def run(launch: Launch, gpu: Gpu) -> None:
    try:
        launch.call()
    except Exception as error:
        error.add_note(f"{launch.name}{' in e4m3' * launch.e4m3}, {gpu.name}")
        raise


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled is not taken from what somebody has at home, nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@contextmanager
def on(gpu: Gpu) -> Iterator[NoGpu]:
    found = NoGpu(gpu)
    driver.set_active(found)
    try:
        yield found
    finally:
        driver.set_active(None)  # as at the start: found when it is needed


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("gpu", "whole"),
    [
        (A100, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else "whole" if value else "usual",
)
def test_every_kernel_compiles_and_fits(gpu: Gpu, whole: bool) -> None:
    with on(gpu) as device:
        for launch in launches(whole=whole, usual_e4m3=gpu.has_e4m3):
            if gpu.has_e4m3 or not launch.e4m3:
                run(launch, gpu)
    assert {kernel.name for kernel in device.loaded} == launchable() - (set() if gpu.has_e4m3 else {"_to_fp8"})
    assert not {kernel.name: kernel.spilt for kernel in device.loaded if kernel.spilt > FEW}


@pytest.mark.usefixtures("compiled")
def test_what_a_gpu_does_not_have_is_noticed() -> None:
    rows = empty(ROWS, 4096)
    with on(Gpu(80, 16 * 1024)), pytest.raises(OutOfResources, match="shared memory"):
        triton_narrow.narrow(rows, empty(16, 4096), None)
    with on(A100), pytest.raises(CompilationError, match="fp8e4nv"):
        triton_pointwise.to_fp8(rows)


def launchable() -> set[str]:
    """The kernels of job/fast, without those that are a part of another one."""
    modules = [importlib.import_module(f"job.fast.{found.name}") for found in pkgutil.iter_modules(job.fast.__path__)]
    found = {kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, JITFunction)}
    parts = {one for one in found for other in found - {one} if re.search(rf"\b{one.__name__}\(", other.src)}
    return {kernel.__name__ for kernel in found - parts}
