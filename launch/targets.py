"""Names in lora.target_modules that a base model does not have, told by its shape. Pure.

PEFT is content when one of the names fits, and would train less than was asked for. What is not known here is left to
the job, which looks at the loaded model before it trains.
"""

from __future__ import annotations

from job.contract.fast_path import ARCHITECTURES
from job.contract.recipe import Lora
from launch.shape import Shape

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def unknown_targets(lora: Lora, shape: Shape) -> tuple[str, ...]:
    """The names that fit no module which can be trained; none for a model whose modules are not known."""
    if shape.kind not in ARCHITECTURES:
        return ()
    names = ["model.embed_tokens"]
    for layer in range(shape.layers):
        for name in shape.linears:
            names.append(f"model.layers.{layer}.{'self_attn' if name in _ATTENTION else 'mlp'}.{name}")
    return tuple(target for target, fitting in lora.targets_in(names).items() if not fitting)
