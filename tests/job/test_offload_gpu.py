"""Promise: on a GPU inputs that travel to the host and back are the same bits, and the GPU holds few of them.

`pytest -m gpu tests/job/test_offload_gpu.py`, on a machine with an NVIDIA GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from job.contract.fast_path import Keep
from job.fast.attention import Documents
from job.fast.kernels import in_triton
from job.fast.model import FastModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
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
