"""How an attempt ended, as a value: for its record and its exit code."""

from __future__ import annotations

from dataclasses import dataclass

from job.contract.outcome import Outcome


@dataclass(frozen=True)
class Ending:
    """An outcome, and what to say of it."""

    outcome: Outcome
    message: str
    hint: str = ""
    step: int = 0
