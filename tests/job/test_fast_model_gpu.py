"""Promise: a whole model with Triton's kernels has the loss and the gradients that torch's give it in float64: each
kernel is handed what it takes, in the shapes and strides that a layer has.

On a GPU, or interpreted, as tests/job/test_fast_gpu.py is. Sizes are no multiples of a kernel's tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, Qwen3Config

from job.contract.fast_path import Keep
from job.fast.attention import Documents
from job.fast.kernels import of_triton
from job.fast.model import FastModel
from tests.job.llamas import COUNT, SMALL, a_batch, gradients, made
from tests.job.test_fast_gpu import DEVICE, INTERPRETED
from tests.job.test_fast_gpu import pytestmark as pytestmark

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
"""Of the frozen weights and of what is computed."""
LEAST_COSINE = 1 - 1e-8 if INTERPRETED else 0.99
ODD: dict[str, Any] = SMALL | {"hidden_size": 72, "intermediate_size": 104, "head_dim": 16, "num_hidden_layers": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, Callable[[], Any]] = {
    "Llama, with biases": lambda: made(LlamaConfig(**ODD, **BIASES)),
    "Qwen 3": lambda: made(Qwen3Config(**ODD)),
    "ranks that differ, dropout": lambda: made(
        LlamaConfig(**ODD), rank_pattern={"k_proj": 1, "gate_proj": 3, "up_proj": 70}, lora_dropout=0.3
    ).train(),
    "gate only": lambda: made(LlamaConfig(**ODD), r=1, target_modules=["gate_proj"]),
    "up and o only": lambda: made(LlamaConfig(**ODD), target_modules=["up_proj", "o_proj"]),
}


@pytest.mark.parametrize(
    ("name", "lengths", "keep"),
    [
        *((name, [5, 9, 3], "no gate and up") for name in MODELS),
        ("Llama, with biases", [40, 40], "all"),
        ("Qwen 3", [40, 30], "input on the host"),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_torch(name: str, lengths: list[int], keep: Keep) -> None:
    model, (tokens, documents, positions, targets) = MODELS[name](), a_batch(lengths)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else DTYPE).double()
    torch.manual_seed(9)  # dropout
    loss = FastModel(model).loss(tokens, documents, positions, targets, COUNT)
    expected = gradients(model, loss)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else DTYPE)
        parameter.grad = None
    model.to(DEVICE)
    here = [tensor.to(DEVICE) for tensor in (tokens, positions, targets)]
    fast = FastModel(model, kernels=of_triton(), keep=keep)
    torch.manual_seed(9)
    found = fast.loss(here[0], Documents.of(lengths, here[0].device), here[1], here[2], COUNT)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5 if INTERPRETED else 0.02)
    for gradient, (of, exact) in zip(gradients(model, found).values(), expected.items(), strict=True):
        ours, theirs = gradient.cpu().double().flatten(), exact.flatten()
        assert cosine_similarity(ours, theirs, dim=0) > LEAST_COSINE, of
        assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4 if INTERPRETED else 0.05), of
