"""Whether a recipe's precision can be had, told before anything is bought. Pure.

The job would refuse it too (job.speed), on a machine that is paid for.
"""

from __future__ import annotations

from collections.abc import Sequence

from job.contract.errors import BadInput
from job.contract.recipe import Recipe
from launch.cards import lacks_fp8
from launch.facts import ModelFacts
from launch.fast_path import why_plain, why_plain_of
from launch.plan import Place, Plan
from launch.shape import Shape

_BF16 = 'set training.precision to "bf16"'


def check_precision(recipe: Recipe, model: ModelFacts | None, *, longest: int | None = None) -> None:
    """Refuse fp8 for what does not go the fast path: DoRA, another architecture.

    Args:
        model: None where nothing is known of it. What is not known is left to the job.
        longest: tokens of the longest row, where that is known.

    Raises:
        BadInput: says why.
    """
    if recipe.training.precision != "fp8":
        return
    shape = model.shape if model is not None else ""
    if isinstance(shape, Shape):
        reason = why_plain(shape, recipe, longest)
    else:
        config = model.config if model is not None and not isinstance(model.config, str) else {}
        reason = why_plain_of(str(config.get("model_type") or "llama"), recipe, longest=longest)
    if reason is not None:
        raise BadInput(f'training.precision "fp8" cannot be had: {reason}', hint=f"{_BF16}, or {_instead(reason)}")


def with_precision(plan: Plan, *, own_gpu: bool) -> Plan:
    """The plan without places whose GPU cannot do what the recipe asks for.

    Args:
        own_gpu: whether a job on this machine has a GPU.

    Raises:
        BadInput: none can.
    """
    if plan.buys:
        places, notes = with_fp8(plan.recipe, plan.places)
        return plan.model_copy(update={"places": places, "notes": (*plan.notes, *notes)})
    if not own_gpu:
        _refuse_without_gpu(plan.recipe)
    return plan


def with_fp8(recipe: Recipe, places: Sequence[Place]) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """The places whose GPUs have the recipe's precision; and what was left out. GPUs that nobody knows are kept.

    Raises:
        BadInput: none has.
    """
    if recipe.training.precision != "fp8":
        return tuple(places), ()
    found = tuple(place for place in places if not lacks_fp8(place.offer.gpu, place.offer.cloud))
    without = sorted({place.offer.gpu for place in places} - {place.offer.gpu for place in found})
    if places and not found:
        raise BadInput(
            f'{", ".join(without)} does not multiply in fp8, and training.precision is "fp8"',
            hint=f"choose an Ada, Hopper or Blackwell GPU, such as --gpu H100 or --gpu L40S; or {_BF16}",
        )
    return found, (f"{', '.join(without)} is left out: it does not multiply in fp8",) if without else ()


def _instead(reason: str) -> str:
    return "lora.dora to false" if reason == "DoRA" else "choose a base model or target_modules of Llama's layers"


def _refuse_without_gpu(recipe: Recipe) -> None:
    """Raises BadInput for a recipe that a CPU cannot train."""
    if recipe.training.precision == "fp8":
        raise BadInput(
            'this machine has no GPU, and training.precision is "fp8"',
            hint=f"name one to rent, such as --gpu H100; or {_BF16}",
        )
