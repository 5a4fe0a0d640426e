"""Base models that are published quantised: which of them can be trained. Launcher and job share it. Pure.

transformers reads codes without their scales where it is not told what they are: with method "lora" the int8 or e4m3
codes of such a model would be trained as if they were its weights. (5.17: a quantization_config of None skips the one
in config.json.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from job.contract.errors import ModelInvalid

_KEYS: Final = ("quantization_config", "compression_config")
"""Of config.json; the second is compressed-tensors' older name."""


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json says that its weights are codes."""
    return bool(_said(config))


def refuse_quantised(config: Mapping[str, Any], method: str, *, model: str) -> ModelInvalid | None:
    """Why a base model cannot be trained with a method; None where its quantisation is no reason.

    Args:
        config: its config.json.
        method: the recipe's.
        model: what errors call it.
    """
    said = _said(config)
    if not said:
        return None
    bitsandbytes = str(said.get("quant_method", "bitsandbytes")).startswith("bitsandbytes")
    if not (bitsandbytes and said.get("load_in_4bit", said.get("_load_in_4bit"))):
        kind = "8 bits by bitsandbytes" if bitsandbytes else str(said.get("quant_method", "an unknown way"))
        return ModelInvalid(
            f"base model {model} is published quantised ({kind}), and of such models only bitsandbytes' 4 bits are "
            "trained",
            hint='name the model that it was made from: method "qlora" makes 4 bits of it',
        )
    if method != "qlora":
        return ModelInvalid(
            f'base model {model} is published in 4 bits, and method "{method}" is for 16',
            hint='set method to "qlora", which trains it as it is; or name the model that it was made from',
        )
    return None


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[key] for key in _KEYS if isinstance(config.get(key), Mapping)), {})
