"""Promise: the Triton kernels compute what job/fast/pointwise.py and narrow.py say, within the rounding of float64.

`pytest -m gpu tests/job/test_fast_gpu.py`, on a machine with an NVIDIA GPU. Without one Triton interprets the kernels,
in numpy, where TRITON_INTERPRET=1 is set: tests/job/test_fast_kernels.py runs this file and test_fast_model_gpu.py so.
"""

from __future__ import annotations

import os
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from job.fast import narrow, pointwise
from job.fast.attention import Documents, attend
from job.fast.dropout import Dropout
from job.fast.frozen import Frozen
from job.fast.kernels import Kernels, of_triton
from job.fast.narrow import Widened

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE: Final = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs an NVIDIA GPU; tests/job/test_fast_kernels.py has Triton interpret it",
    ),
]
ROUNDING: Final = {torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float32: 2**-15}
"""Relative. In bf16 half a step, twice over: inputs are exact, outputs are rounded once or twice. Triton's interpreter
cuts off instead (3.7, runtime/interpreter.py, cast_impl), a whole step. In fp32 the error of sums and of a GPU's exp.
"""
DTYPES: Final = tuple(ROUNDING)
MULTIPLIED: Final = torch.float32 if INTERPRETED else torch.bfloat16
"""What tl.dot multiplies exactly: of fp32 a GPU's tensor cores take 10 bits, and of bf16 the interpreter (3.7,
create_dot) takes the bits for whole numbers."""
DROPOUTS: Final = (None, Dropout(0.1, 2**31 - 3))
LARGE: Final = not INTERPRETED
"""Sizes that take seconds where numpy computes."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return of_triton()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def a_pair(rows: int, rank: int, columns: int, *, seed: int) -> Widened:
    """What an adapter adds; its second matrix lies in memory as PEFT has it, transposed."""
    up = random(columns, rank, dtype=MULTIPLIED, seed=seed + 1).T / rank**0.5
    return random(rows, rank, dtype=MULTIPLIED, seed=seed), up


def double(pair: Widened | None) -> Widened | None:
    return None if pair is None else (pair[0].double(), pair[1].double())


def carried(scaled: Tensor) -> Tensor:
    """Which of these e4m3 may have rounded up to a power of two: the interpreter loses the carry (_convert_float)."""
    mantissa = torch.frexp(scaled.float()).mantissa.abs()
    return (mantissa >= 0.96) | ((mantissa > 0) & (mantissa <= 0.502))


def assert_near(found: Tensor, expected: Tensor, *, of: float | None = None) -> None:
    assert found.shape == expected.shape
    of = ROUNDING[found.dtype] if of is None else of
    wide = expected.double().abs()
    off = (found.double() - expected.double()).abs() / (wide + 0.02 * wide.amax(-1, keepdim=True) + 1e-30)
    assert off.max().item() <= of


def assert_same_fp8(found: Any, whole: Tensor) -> None:
    expected, scale = pointwise.to_fp8(whole)
    assert torch.allclose(found[1], scale, rtol=1e-6)
    ours, wanted = found[0].float(), expected.float()
    if INTERPRETED:
        ours = torch.where(carried(whole / scale), wanted, ours)
    # A value between two steps may go to either: scales differ in their last bit.
    # The interpreter rounds what lies between up, and cuts the smallest off.
    assert (ours != wanted).float().mean().item() < (0.05 if INTERPRETED else 0.01)
    assert ((ours - wanted).abs() <= wanted.abs() * 0.126 + 2**-8).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(33, 96), (1, 4096), (3, 5000), *([(33, 5120), (33, 8192)] * LARGE)])
@pytest.mark.parametrize("quantise", [False, True])
def test_rms_norm_and_its_gradient(kernels: Kernels, rows: int, width: int, quantise: bool, dtype: torch.dtype) -> None:
    x, weight = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    found, scale, small = kernels.rms_norm(x, weight, 1e-5, quantise=quantise)
    expected, scale_64, _ = pointwise.rms_norm(x.double(), weight.double(), 1e-5, quantise=False)
    assert_near(found, expected, of=2 * ROUNDING[dtype])  # rounded twice, as in transformers
    assert_near(scale, scale_64)
    assert torch.equal(kernels.normed(x, weight, scale), found)
    gradient, beside = random(rows, width, dtype=dtype, seed=2), random(rows, width, dtype=dtype, seed=3)
    rest = (x, weight, scale, beside)
    ours, small_gradient = kernels.rms_norm_gradient(gradient.clone(), *rest, quantise=quantise)
    wide, _ = pointwise.rms_norm_gradient(gradient.double(), *(t.double() for t in rest), quantise=False)
    assert_near(ours, wide)
    for quantised, whole in ((small, found), (small_gradient, ours)):
        assert (quantised is not None) == quantise
        if quantised is not None:
            assert_same_fp8(quantised, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(33, 96), (1, 2048), (3, 5001)])
def test_what_is_quantised_by_itself(kernels: Kernels, rows: int, width: int, dtype: torch.dtype) -> None:
    x = random(rows, width, dtype=dtype)
    x[0] = 0
    assert_same_fp8(kernels.to_fp8(x), x)


@pytest.mark.parametrize(("rows", "width"), [(1, 96), (33, 200), *([(17, 14336)] * LARGE)])
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize(
    ("rank", "gate_ranks", "rank_of_next", "dropout"),
    [
        (0, None, 0, None),
        (48, None, 0, None),
        (48, 20, 0, None),
        (16, 0, 0, None),
        (16, 16, 0, None),
        (144, 72, 8, DROPOUTS[1]),
        (0, None, 72, None),
    ],
)
def test_swiglu_and_its_gradient(
    kernels: Kernels,
    rows: int,
    width: int,
    quantise: bool,
    rank: int,
    gate_ranks: int | None,
    rank_of_next: int,
    dropout: Dropout | None,
) -> None:
    gate_up, gradient = random(rows, 2 * width, dtype=MULTIPLIED), random(rows, width, dtype=MULTIPLIED, seed=1)
    adapter = a_pair(rows, rank, 2 * width, seed=2) if rank else None
    if adapter and gate_ranks is not None:
        adapter[1][:gate_ranks, width:] = 0
        adapter[1][gate_ranks:, :width] = 0
    more = a_pair(rows, rank_of_next, width, seed=4) if rank_of_next else None
    act, largest = kernels.swiglu(gate_up, adapter, quantise=quantise, gate_ranks=gate_ranks)
    wide, _ = pointwise.swiglu(gate_up.double(), double(adapter), quantise=False)
    assert_near(act, wide)
    d_gate_up, again, largest_gradient = kernels.swiglu_gradient(
        gradient.clone(), gate_up.clone(), adapter, more, dropout, quantise=quantise, gate_ranks=gate_ranks
    )
    d_wide, _, _ = pointwise.swiglu_gradient(
        gradient.double(), gate_up.double(), double(adapter), double(more), dropout, quantise=False
    )
    assert_near(d_gate_up, d_wide)
    assert_near(again, wide)
    for noted, whole in ((largest, act), (largest_gradient, d_gate_up)):
        assert (noted is not None) == quantise
        assert noted is None or torch.equal(noted, whole.float().abs().amax(-1))


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(1, 96, 8), (33, 320, 144), (300, 200, 48), *([(4000, 14336, 16)] * LARGE)]
)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_products_with_a_narrow_side(
    kernels: Kernels, rows: int, width: int, rank: int, dropout: Dropout | None
) -> None:
    x, down = random(rows, width, dtype=MULTIPLIED), random(rank, width, dtype=MULTIPLIED, seed=1)
    assert_near(kernels.narrow(x, down, dropout), narrow.narrow(x.double(), down.double(), dropout))
    beside = random(rows, width + 8, dtype=MULTIPLIED, seed=2)[:, :width]  # rows that do not follow one another
    transposed = random(width, rank, dtype=MULTIPLIED, seed=3).T
    assert_near(
        kernels.narrow(beside, transposed, dropout), narrow.narrow(beside.double(), transposed.double(), dropout)
    )
    x[0] = 0
    found, small = kernels.narrow_quantised(x, down, dropout, x.float().abs().amax(-1))
    assert torch.equal(found, kernels.narrow(x, down, dropout))
    assert_same_fp8(small, x)
    inner = random(rows, rank, dtype=MULTIPLIED, seed=4)
    found = kernels.narrow_gradient(inner, x, dropout)
    assert found.dtype == torch.float32
    # Of thousands of numbers: what tensor cores cut off while they add up.
    assert_near(found, narrow.narrow_gradient(inner.double(), x.double(), dropout), of=2**-11)


@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(1, 96, 8), (33, 320, 144), (70, 200, 48), *([(4000, 14336, 16)] * LARGE)]
)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("added", [0, 1, 2])
def test_what_an_adapter_adds(
    kernels: Kernels, rows: int, width: int, rank: int, dropout: Dropout | None, added: int
) -> None:
    pair = a_pair(rows, rank, width, seed=0)
    onto = [random(rows, width, dtype=MULTIPLIED, seed=2 + number) for number in range(added)]
    wide = narrow.widen((pair[0].double(), pair[1].double()), [one.double() for one in onto], dropout)
    assert_near(kernels.widen(pair, onto, dropout), wide)
    if onto:
        found = kernels.widen(pair, onto, dropout, over=True)
        assert found.data_ptr() == onto[0].data_ptr()
        assert_near(found, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv", "size"), [(5, 1, 64), (3, 2, 80), (32, 8, 128), *([(64, 8, 128)] * LARGE)])
def test_rotation_and_its_gradient(kernels: Kernels, heads: int, kv: int, size: int, dtype: torch.dtype) -> None:
    states = random(5, heads + 2 * kv, size, dtype=dtype)
    angle = random(5, size // 2, dtype=torch.float32, seed=2)
    cos, sin = angle.cos(), angle.sin()
    found = kernels.rotate(states.clone(), cos, sin, heads + kv)
    assert_near(found, pointwise.rotate(states.double(), cos.double(), sin.double(), heads + kv))
    q, k, v = torch.split(random(5, heads + 2 * kv, size, dtype=dtype, seed=1), [heads, kv, kv], dim=1)
    back = kernels.rotate_gradient(q, k, v, cos, sin)
    wide = pointwise.rotate_gradient(q.double(), k.double(), v.double(), cos.double(), sin.double())
    assert_near(back, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv"), [(5, 1), *([(32, 8), (64, 8)] * LARGE)])
def test_norm_and_rotation_of_heads_and_their_gradient(
    kernels: Kernels, heads: int, kv: int, size: int, dtype: torch.dtype
) -> None:
    states = random(5, heads + 2 * kv, size, dtype=dtype)
    norms = pointwise.HeadNorms(random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2), 1e-6)
    wide_norms = pointwise.HeadNorms(norms.query.double(), norms.key.double(), norms.epsilon)
    angle = random(5, size // 2, dtype=torch.float32, seed=4)
    cos, sin = angle.cos(), angle.sin()
    wide = (cos.double(), sin.double())
    before = states.clone()
    found = kernels.norm_and_rotate(states, norms, cos, sin, heads, kv)
    assert torch.equal(states, before)
    expected = pointwise.norm_and_rotate(states.double(), wide_norms, *wide, heads, kv)
    for ours, exact in zip(found, expected, strict=True):
        # Rounded twice, as in transformers, then turned, and rounded again: relative to the pair, of which one may be
        # near zero.
        length = torch.unflatten(exact, -1, (2, -1)).norm(dim=-2).repeat(1, 1, 2)
        assert ((ours.double() - exact).abs() <= 3 * ROUNDING[dtype] * length).all()
    q, k, v = torch.split(random(5, heads + 2 * kv, size, dtype=dtype, seed=3), [heads, kv, kv], dim=1)
    exact = pointwise.norm_and_rotate_gradient(q.double(), k.double(), v.double(), states.double(), wide_norms, *wide)
    assert_near(kernels.norm_and_rotate_gradient(q, k, v, states, norms, cos, sin), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(23, 97), (1, 4096), (2, 32003), *([(23, 128256)] * LARGE)])
def test_cross_entropy(kernels: Kernels, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = random(rows, vocabulary, dtype=dtype) * 4
    targets = torch.arange(rows, device=DEVICE) * 7919 % vocabulary
    expected, wide = pointwise.cross_entropy(logits.double(), targets)
    loss, gradient = kernels.cross_entropy(logits.clone(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_near(gradient, wide)


@pytest.mark.parametrize(
    "shape", [(70, 192), (33, 64), (1, 512), *([(300, 192), (1024, 4096), (14336, 4096)] * LARGE)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantised_weights_are_bitsandbytes_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    from job.fast.nf4 import dequantise

    weight: Any = Params4bit(random(*shape, dtype=dtype), requires_grad=False, quant_type="nf4", blocksize=64)
    weight = weight.to(DEVICE)
    expected = dequantize_4bit(weight.data, weight.quant_state)
    dense = torch.empty(shape, dtype=dtype, device=DEVICE)
    dequantise(weight.data, weight.quant_state, dense)
    # Bit for bit in bf16 on a GPU, which is what the job has. The interpreter cuts off there; and in fp32 a GPU
    # multiplies and adds with one rounding where bitsandbytes' kernel has two.
    if (dtype == torch.bfloat16) == INTERPRETED:
        assert_near(dense, expected)
    else:
        assert torch.equal(dense, expected)
    room = torch.empty(shape[1], shape[0] + 64, dtype=pointwise.FP8, device=DEVICE)
    by_rows, by_columns = torch.empty(shape, dtype=pointwise.FP8, device=DEVICE), room[:, 64:]
    of_rows, of_columns = (expected.float().abs().amax(dim).clamp(min=1e-12) / pointwise.FP8_LARGEST for dim in (1, 0))
    dequantise(weight.data, weight.quant_state, by_rows, scale=of_rows)
    dequantise(weight.data, weight.quant_state, by_columns, scale=of_columns, by_column=True)
    for found, wanted in (
        (by_rows, expected.float() / of_rows[:, None]),
        (by_columns, (expected.float() / of_columns).T),
    ):
        off = (found.float() - wanted).abs() / (wanted.abs() + 2**-6)
        if INTERPRETED:
            off[carried(wanted)] = 0
        assert off.max().item() <= 0.0667


@pytest.mark.parametrize(
    ("shape", "how", "by_triton"),
    [
        ((70, 192), {}, True),
        ((70, 96), {}, False),  # rows end within a block
        ((70, 192), {"blocksize": 128}, False),
        ((70, 192), {"quant_type": "fp4"}, False),
        ((70, 192), {"compress_statistics": False}, False),
        ((70, 192), {"quant_storage": torch.bfloat16}, False),
    ],
    ids=str,
)
def test_weights_that_are_stored_in_another_way_are_dequantised_too(
    shape: tuple[int, int], how: dict[str, Any], by_triton: bool
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    stored: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True} | how
    linear = Linear4bit(shape[1], shape[0], bias=False)
    linear.weight = Params4bit(random(*shape, dtype=MULTIPLIED), requires_grad=False, **stored).to(DEVICE)
    frozen = Frozen.of(linear, compiled=True)
    assert frozen.by_triton == by_triton
    assert_near(frozen.dense(MULTIPLIED), dequantize_4bit(linear.weight.data, linear.weight.quant_state))


@pytest.mark.parametrize("lengths", [[7, 130, 64], [128, 128], [300]], ids=str)
def test_attention_is_that_of_each_document_alone(lengths: list[int]) -> None:
    tokens = sum(lengths)
    q, k, v = (random(tokens, heads, 128, seed=at) for at, heads in enumerate((8, 2, 2)))
    found = attend(q, k, v, Documents.of(lengths, q.device))
    cpu = Documents.of(lengths, torch.device("cpu"))
    expected = attend(q.cpu().double(), k.cpu().double(), v.cpu().double(), cpu)
    assert (found.cpu().double() - expected).abs().max() < 0.02
