"""Whether a checkpoint may be resumed here: pure comparison of two identities."""

from __future__ import annotations

from typing import Final

from job.contract.errors import IdentityMismatch
from job.contract.records import Identity

_INPUTS: Final = {
    "recipe": "the recipe",
    "train": "the train dataset",
    "held_out": "the held-out dataset",
    "tokens": "the rendered tokens (chat template, tokenizer or split)",
    "base_model": "the files of the base model",
}

DECISIVE_VERSIONS: Final = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "accelerate",
    "numpy",
    "ftjob",
)
"""Libraries whose code computes bits of the adapter. The others (python, datasets, tokenizers) act on it only through
the tokens, whose digest is compared."""


def check_resumable(saved: Identity, here: Identity) -> list[str]:
    """Refuse a resume that would not be the same run; return what only weakens the promise.

    Returns:
        Warnings: differences of hardware. The run goes on and is the same statistically, not bit for bit.

    Raises:
        IdentityMismatch: anything else differs; names all of it.
    """
    differences = [f"{name} changed" for field, name in _INPUTS.items() if _differs(field, saved, here)]
    if saved.world_size != here.world_size:
        differences.append(f"the number of GPUs was {saved.world_size} and is {here.world_size}")
    if saved.threads != here.threads:
        differences.append(f"the number of CPU threads was {saved.threads} and is {here.threads}")
    differences += [
        f"{library} was {getattr(saved.versions, library)} and is {getattr(here.versions, library)}"
        for library in DECISIVE_VERSIONS
        if getattr(saved.versions, library) != getattr(here.versions, library)
    ]
    if differences:
        raise IdentityMismatch(
            "the checkpoints of this run cannot be resumed exactly: " + "; ".join(differences),
            hint="put it back as it was to go on, or start a new run; nothing was overwritten",
        )
    if saved.hardware.computes_unlike(here.hardware):
        return [f"the hardware was {saved.hardware.name} and is {here.hardware.name}"]
    return []


def _differs(field: str, saved: Identity, here: Identity) -> bool:
    return bool(getattr(saved, field) != getattr(here, field))
