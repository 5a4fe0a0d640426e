"""Base models in which packed rows would see each other, told by their config.json. Pure.

Attention is kept inside a row by position ids. A layer that carries a state along the sequence (a state space, a
linear attention, a convolution) has nothing of the kind: what one row said would reach into the next. Whatever is not
known here is packed, and the job proves on the loaded model that its rows are apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_STATEFUL: Final = frozenset(
    {
        *["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h"],
        *["granitemoehybrid", "plamo2", "rwkv", "rwkv7", "xlstm", "recurrent_gemma", "lfm2", "lfm2_moe", "lfm2_vl"],
        *["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear", "minimax"],
        *["olmo_hybrid", "glm5_next", "glm5_next_text", "qwen4_exp", "qwen4_exp_text"],
    }
)
"""Values of `model_type` (transformers 5.17) of models with such layers, unless `layer_types` says otherwise."""
_KINDS: Final = ("linear", "conv", "mamba", "recurrent", "ssm", "lstm", "rwkv", "hybrid")
"""Parts of the names that `layer_types` has for such layers: linear_attention, conv, mamba, recurrent, hybrid."""


def leak_of(config: Mapping[str, Any]) -> str | None:
    """Which layers would let packed rows see each other; None where none are known."""
    told = [kind for part in _parts(config) for kind in _layer_types(part)]
    carry = sorted({kind for kind in told if any(name in kind for name in _KINDS)})
    if carry:
        return f"{', '.join(carry)} layers"
    if told:
        return None
    kinds = [str(part.get("model_type")) for part in _parts(config)]
    return next((f"layers of the type {kind}" for kind in kinds if kind in _STATEFUL), None)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration, and that of its language model where it has others besides."""
    yield config
    if isinstance(text := config.get("text_config"), dict):
        yield text


def _layer_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("layer_types", "layers_block_type", "block_types", "_block_types"):
        if isinstance(kinds := config.get(key), list):
            yield from (kind for kind in kinds if isinstance(kind, str))
