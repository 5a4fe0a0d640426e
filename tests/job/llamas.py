"""Small Llama-like models with adapters, in float64; batches for them; and what their own modules compute."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from job.fast.attention import Documents

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WIDE_HEADS = SMALL | {"head_dim": 24}
COUNT = 7.0
"""What losses are divided by: not the number of this batch's tokens, which are a part of a step."""
CLOSE = 4e-6
"""transformers normalises in fp32 whatever the weights are in."""


def made(config: Any, **lora: Any) -> Any:
    """A model in float64 with an adapter that does something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().requires_grad_(False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**(settings | lora)))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or "norm" in name or "bias" in name:
            parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).double()
    return adapted


def a_batch(lengths: list[int]) -> tuple[Tensor, Documents, Tensor, Tensor]:
    """Tokens, and every third of them untrained."""
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (sum(lengths),))
    last = set(torch.tensor(lengths).cumsum(0).sub(1).tolist())
    positions = torch.tensor([at for at in range(len(tokens)) if at % 3 and at not in last])
    return tokens, Documents.of(lengths, tokens.device), positions, tokens[positions + 1]


def by_modules(model: Any, tokens: Tensor, documents: Documents, positions: Tensor, targets: Tensor) -> Tensor:
    """The same loss, each document alone through transformers' and PEFT's own modules."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length in documents.lengths:
        logits = model(input_ids=tokens[start : start + length][None]).logits[0].double()
        inside = (positions >= start) & (positions < start + length)
        log = torch.log_softmax(logits[positions[inside] - start], dim=-1)
        total = total - log.gather(1, targets[inside][:, None]).sum()
        start += length
    return total / COUNT


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= CLOSE * tensor.abs().max(), name
        assert tensor.abs().max() > 0, name


def rotated_by(kind: str, **how: float) -> LlamaConfig:
    return LlamaConfig(**SMALL, rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | how)


MODELS = {
    "Llama": lambda: made(LlamaConfig(**SMALL)),
    "Mistral": lambda: made(MistralConfig(**SMALL, sliding_window=None)),
    "Qwen 2, with biases": lambda: made(Qwen2Config(**SMALL)),
    "Qwen 3, heads that are normed, and wider together than the stream": lambda: made(Qwen3Config(**WIDE_HEADS)),
    "Qwen 3, with biases, v and up only": lambda: made(
        Qwen3Config(**WIDE_HEADS, attention_bias=True), target_modules=["v_proj", "up_proj"]
    ),
    "q and v only": lambda: made(LlamaConfig(**SMALL), target_modules=["q_proj", "v_proj"]),
    "k and down only": lambda: made(LlamaConfig(**SMALL), target_modules=["k_proj", "down_proj"]),
    "ranks that differ": lambda: made(LlamaConfig(**SMALL), rank_pattern={"k_proj": 2, "up_proj": 6}),
    "rank 1": lambda: made(LlamaConfig(**SMALL), r=1),
    "gate only, rank 5, scaled by its root": lambda: made(
        LlamaConfig(**SMALL), r=5, lora_alpha=7, use_rslora=True, target_modules=["gate_proj"]
    ),
    "one linear each of two layers, and none of the first": lambda: made(
        LlamaConfig(**SMALL), target_modules=["layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"]
    ),
    "biases everywhere, as many heads of k as of q": lambda: made(
        LlamaConfig(**(SMALL | {"num_key_value_heads": 4}), attention_bias=True, mlp_bias=True)
    ),
    "one head of k, and the embedding is the head": lambda: made(
        Qwen2Config(**(SMALL | {"num_key_value_heads": 1}), tie_word_embeddings=True)
    ),
    "Llama 3's rotation": lambda: made(
        rotated_by("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
    ),
    "YaRN, whose rotation is no rotation alone": lambda: made(
        rotated_by("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "linear positions": lambda: made(rotated_by("linear", factor=4.0)),
}
