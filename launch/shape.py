"""The shape of a base model, read from its config.json: what its arithmetic and its memory are made of. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field

from job.contract.recipe import Lora
from job.contract.records import Part

_DENSE: Final = frozenset(
    {
        *["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite", "olmo2", "smollm3"],
        *["starcoder2", "stablelm", "cohere", "glm4", "exaone4", "seed_oss"],
    }
)
"""Values of `model_type` whose layers are attention (q, k, v, o) and one feed-forward, as transformers 5.17 builds
them. Others (mixtures of experts, state spaces, vision) are unknown, not guessed."""
NF4_BYTES: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A parameter: 4 bits, an 8-bit scale for each 64, an fp32 scale for each 256 of those (Dettmers et al. 2023,
arXiv:2305.14314, section 3: double quantisation)."""
_TWO_MATRICES: Final = frozenset({"starcoder2"})
"""Whose feed-forward is up and down; all others have a gate as well."""
_HEAD_DIM: Final = {"qwen3": 128}
"""Where the key is left out and hidden / heads is not what transformers 5.17 takes."""
_QWEN: Final = ("qwen2", "qwen3")


class Shape(Part):
    """A dense decoder. Sizes are numbers of units; parameters are counted, not published."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    feed_forward: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    tied: bool
    """Whether the output layer is the embedding."""
    gated: bool = True
    kind: str = "llama"
    """`model_type`."""
    activation: str = "silu"
    window: int | None = None
    """Tokens back that attention sees; None for all."""
    attention_dropout: float = 0.0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one layer, by the name of their module."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.feed_forward),
            "up_proj": (self.hidden, self.feed_forward),
            "down_proj": (self.feed_forward, self.hidden),
        }
        if not self.gated:
            del found["gate_proj"]
        return found

    @property
    def linear_parameters(self) -> int:
        """Of all layers' linear layers: what is quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def head_parameters(self) -> int:
        """Of the output layer, which is computed whether it is tied or not."""
        return self.vocabulary * self.hidden

    @property
    def other_parameters(self) -> int:
        """Embedding, output layer and norms: what stays in 16 bits."""
        return self.head_parameters * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def base_bytes(self, method: str) -> float:
        """Of the frozen weights on a GPU."""
        return (NF4_BYTES if method == "qlora" else 2.0) * self.linear_parameters + 2 * self.other_parameters

    def adapter_parameters(self, lora: Lora) -> int:
        """Of a LoRA on these layers: rank x (inputs + outputs) each, and one magnitude an output with DoRA.

        Source: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353. Modules of other names than ours
        count as nothing: the estimate of a recipe that names its own is a lower bound.
        """
        chosen = set(self.linears) if lora.target_modules == "all-linear" else set(lora.target_modules)
        return self.layers * sum(
            lora.rank * (inputs + outputs) + (outputs if lora.dora else 0)
            for name, (inputs, outputs) in self.linears.items()
            if name in chosen
        )


TINY_SHAPE: Final = Shape(
    hidden=64, layers=2, feed_forward=128, heads=4, kv_heads=2, head_dim=16, vocabulary=259, tied=False
)
"""Of the built-in model. A test holds it to the config.json that the job writes."""

LLAMA_8B: Final = Shape(
    hidden=4096, layers=32, feed_forward=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)
LLAMA_70B: Final = Shape(
    hidden=8192, layers=80, feed_forward=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256, tied=False
)
"""Llama 3.1, whose numbers all measurements are of."""


def shape_of(config: Mapping[str, Any]) -> Shape | str:
    """The shape that a config.json tells, or why none can be told."""
    kind = config.get("model_type")
    if kind not in _DENSE:
        return f"ftjob cannot estimate models of the type {kind!r}"
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            feed_forward=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or _HEAD_DIM.get(kind) or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", kind in ("gemma", "gemma2", "cohere"))),
            gated=kind not in _TWO_MATRICES,
            kind=kind,
            activation=str(config.get("hidden_act") or "silu"),
            window=_window(kind, config),
            attention_dropout=float(config.get("attention_dropout") or 0.0),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return "its config.json does not tell its shape"


def _window(kind: str, config: Mapping[str, Any]) -> int | None:
    """Where the key is left out, transformers 5.17 takes 4096 for Mistral, and none for Qwen unless it is told to."""
    if not config.get("use_sliding_window", kind not in _QWEN):
        return None
    size = config.get("sliding_window", 4096 if kind in ("mistral", *_QWEN) else None)
    return None if size is None else int(size)
