"""Promise: the Triton kernels compute what job/fast/pointwise.py says, within bf16's rounding of float64.

`pytest -m gpu tests/job/test_fast_gpu.py`, on a machine with an NVIDIA GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from job.contract.fast_path import Keep
from job.fast import pointwise
from job.fast.attention import Documents, attend
from job.fast.kernels import in_triton
from job.fast.model import FastModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ROUNDING = 2**-8
"""Half a step of bf16, relative, twice over: inputs are exact, outputs are rounded once or twice."""


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).bfloat16()


def assert_near(found: Tensor, expected: Tensor, *, of: float = ROUNDING) -> None:
    scale = expected.double().abs().amax(-1, keepdim=True)
    assert ((found.double() - expected.double()).abs() <= of * expected.double().abs() + of * 0.02 * scale).all()


@pytest.mark.parametrize("width", [64, 4096, 5120, 8192])
@pytest.mark.parametrize("quantise", [False, True])
def test_rms_norm_and_its_gradient(width: int, quantise: bool) -> None:
    from job.fast import triton_pointwise as kernels

    x, weight = random(33, width), random(width, seed=1)
    found, scale, small = kernels.rms_norm(x, weight, 1e-5, quantise=quantise)
    expected, scale_64, _ = pointwise.rms_norm(x.double(), weight.double(), 1e-5, quantise=False)
    assert_near(found, expected, of=2**-7)  # rounded twice, as in transformers
    assert_near(scale, scale_64)
    assert torch.equal(kernels.normed(x, weight, scale), found)
    gradient, beside = random(33, width, seed=2), random(33, width, seed=3)
    rest = (x, weight, scale, beside)
    ours, small_gradient = kernels.rms_norm_gradient(gradient.clone(), *rest, quantise=quantise)
    wide, _ = pointwise.rms_norm_gradient(gradient.double(), *(t.double() for t in rest), quantise=False)
    assert_near(ours, wide)
    for quantised, whole in ((small, found), (small_gradient, ours)):
        assert (quantised is not None) == quantise
        if quantised is not None:
            assert_same_fp8(quantised, whole)


def assert_same_fp8(found: Any, whole: Tensor) -> None:
    expected, scale = pointwise.to_fp8(whole)
    assert torch.allclose(found[1], scale, rtol=1e-6)
    # A value between two steps may go to either: scales differ in their last bit.
    assert ((found[0].float() != expected.float()).float().mean() < 0.01).item()
    assert ((found[0].float() - expected.float()).abs() <= expected.float().abs() * 0.126 + 2**-8).all()


@pytest.mark.parametrize("width", [96, 14336, 28672])
@pytest.mark.parametrize("quantise", [False, True])
def test_swiglu_and_its_gradient(width: int, quantise: bool) -> None:
    from job.fast import triton_pointwise as kernels

    gate_up, gradient = random(17, 2 * width), random(17, width, seed=1)
    act, small = kernels.swiglu(gate_up, quantise=quantise)
    wide, _ = pointwise.swiglu(gate_up.double(), quantise=False)
    assert_near(act, wide)
    d_gate_up, again, small_gradient = kernels.swiglu_gradient(gradient.clone(), gate_up.clone(), quantise=quantise)
    d_wide, _, _ = pointwise.swiglu_gradient(gradient.double(), gate_up.double(), quantise=False)
    assert_near(d_gate_up, d_wide)
    assert_near(again, wide)
    if small is not None and small_gradient is not None:
        assert_same_fp8(small, act)
        assert_same_fp8(small_gradient, d_gate_up)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("heads", "kv"), [(32, 8), (64, 8), (5, 1)])
def test_rotation_and_its_gradient(heads: int, kv: int, size: int) -> None:
    from job.fast import triton_pointwise as kernels

    states = random(19, heads + 2 * kv, size)
    angle = torch.randn(19, size // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    found = kernels.rotate(states.clone(), cos, sin, heads + kv)
    assert_near(found, pointwise.rotate(states.double(), cos.double(), sin.double(), heads + kv))
    q, k, v = torch.split(random(19, heads + 2 * kv, size, seed=1), [heads, kv, kv], dim=1)
    back = kernels.rotate_gradient(q, k, v, cos, sin)
    wide = pointwise.rotate_gradient(q.double(), k.double(), v.double(), cos.double(), sin.double())
    assert_near(back, wide)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv"), [(32, 8), (64, 8), (5, 1)])
def test_norm_and_rotation_of_heads_and_their_gradient(heads: int, kv: int, size: int) -> None:
    from job.fast import triton_pointwise as kernels

    states = random(19, heads + 2 * kv, size)
    norms = pointwise.HeadNorms(random(size, seed=1), random(size, seed=2), 1e-6)
    wide_norms = pointwise.HeadNorms(norms.query.double(), norms.key.double(), norms.epsilon)
    angle = torch.randn(19, size // 2, device=states.device)
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
        assert ((ours.double() - exact).abs() <= 3 * ROUNDING * length).all()
    q, k, v = torch.split(random(19, heads + 2 * kv, size, seed=3), [heads, kv, kv], dim=1)
    exact = pointwise.norm_and_rotate_gradient(q.double(), k.double(), v.double(), states.double(), wide_norms, *wide)
    assert_near(kernels.norm_and_rotate_gradient(q, k, v, states, norms, cos, sin), exact)


@pytest.mark.parametrize("vocabulary", [97, 128256])
def test_cross_entropy(vocabulary: int) -> None:
    from job.fast import triton_pointwise as kernels

    logits = random(23, vocabulary) * 4
    targets = torch.randint(0, vocabulary, (23,), device="cuda")
    expected, wide = pointwise.cross_entropy(logits.double(), targets)
    loss, gradient = kernels.cross_entropy(logits.clone(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_near(gradient, wide)


@pytest.mark.parametrize("shape", [(1024, 4096), (300, 192), (14336, 4096)])
def test_dequantised_weights_are_bitsandbytes_own(shape: tuple[int, int]) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    from job.fast.nf4 import dequantise

    weight = Params4bit(random(*shape), requires_grad=False, quant_type="nf4", blocksize=64).to("cuda")
    expected = dequantize_4bit(weight.data, weight.quant_state)
    dense = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    dequantise(weight.data, weight.quant_state, dense)
    assert torch.equal(dense, expected)
    beside = torch.empty(shape[1], shape[0] + 64, dtype=pointwise.FP8, device="cuda")
    scale = (expected.float().abs().amax(0) / pointwise.FP8_LARGEST).contiguous()
    dequantise(weight.data, weight.quant_state, beside[:, 64:], scale=scale, by_column=True)
    wanted = (expected.float() / scale).T
    assert ((beside[:, 64:].float() - wanted).abs() <= wanted.abs() * 0.0667 + 2**-10).all()


@pytest.mark.parametrize("lengths", [[7, 130, 64], [128, 128], [300]], ids=str)
def test_attention_is_that_of_each_document_alone(lengths: list[int]) -> None:
    tokens = sum(lengths)
    q, k, v = (random(tokens, heads, 128, seed=at) for at, heads in enumerate((8, 2, 2)))
    found = attend(q, k, v, Documents.of(lengths, q.device))
    cpu = Documents.of(lengths, torch.device("cpu"))
    expected = attend(q.cpu().double(), k.cpu().double(), v.cpu().double(), cpu)
    assert (found.cpu().double() - expected).abs().max() < 0.02


LAYERS = 6
AWAY: Keep = "input on the host"


def small_model() -> Any:
    """Llama with an adapter on all linears, in bf16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2048}
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, num_hidden_layers=LAYERS))
    model = model.to("cuda", torch.bfloat16).requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.02 * torch.randn(parameter.shape, device="cuda")
    return adapted


def gradients_of(model: Any, fast: FastModel, lengths: list[int], *, late: int = 0) -> list[Tensor]:
    """Of one batch.

    Args:
        late: clock cycles that the stream to the host is held up for, before each pass: whoever does not wait for it
            reads or overwrites too early.
    """
    generator = torch.Generator(device="cuda").manual_seed(sum(lengths))
    tokens = torch.randint(0, 512, (sum(lengths),), device="cuda", generator=generator)
    at = torch.arange(len(tokens) - 1, device="cuda")
    model.zero_grad()

    def hold_up() -> None:
        if fast.host.stream is not None and late:
            with torch.cuda.stream(fast.host.stream):
                torch.cuda._sleep(late)  # type: ignore[no-untyped-call]

    hold_up()
    loss = fast.loss(tokens, Documents.of(lengths, tokens.device), at, tokens[1:], 7.0)
    hold_up()
    loss.backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "keeps",
    [[AWAY] * LAYERS, [AWAY] * 4 + ["input"] * 2, ["all", AWAY, "no gate and up", AWAY, AWAY, "input"]],
    ids=["all", "the first", "mixed"],
)
def test_inputs_on_the_host_change_no_bit_however_late_they_travel(keeps: list[Keep]) -> None:
    """Documents of at most 64 tokens: with longer ones FlashAttention's backward pass adds up in any order."""
    model = small_model()
    kernels = in_triton()
    whole, fast = FastModel(model, kernels=kernels), FastModel(model, kernels=kernels)
    fast.keep(keeps, tokens=4096)
    taken = fast.host.numbers
    assert fast.host.place(0, torch.Size([taken])).is_pinned()
    for lengths in ([64] * 64, [64, 17, 33], [48] * 20, [5], [64, 63] * 32, [64] * 64):
        expected = gradients_of(model, whole, lengths)
        assert all(map(torch.equal, gradients_of(model, whole, lengths), expected)), "two passes differ by themselves"
        for late in (0, 100_000_000):
            found = gradients_of(model, fast, lengths, late=late)
            assert all(map(torch.equal, found, expected)), (lengths, late)
    assert fast.host.numbers == taken


def test_few_inputs_are_on_the_gpu_at_a_time() -> None:
    model, lengths = small_model(), [64] * 256
    one = sum(lengths) * 1024 * 2
    peaks = []
    for keep in ("input", AWAY):
        fast = FastModel(model, kernels=in_triton(), keep=keep)
        gradients_of(model, fast, lengths)  # what is made once is there now
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients_of(model, fast, lengths)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Most is held when the last layer's backward pass begins: there all inputs, here its own and the next.
    assert peaks[0] - peaks[1] >= (LAYERS - 3) * one
