"""Whether a job that ended is started again, and when: a pure decision, apart from every process."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from job.contract.outcome import is_worth_another_attempt
from launch.backend import DEFAULT_MAX_RESTARTS


class RestartPolicy(BaseModel):
    """The bounds. Pauses grow while attempts end quickly, so that a broken machine is not hammered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_restarts: int = Field(default=DEFAULT_MAX_RESTARTS, ge=0, le=10_000)
    first_pause_seconds: float = Field(default=1.0, ge=0)
    longest_pause_seconds: float = Field(default=60.0, ge=0)
    settled_after_seconds: float = Field(
        default=60.0, ge=0, description="An attempt that lived this long was not quick."
    )


@dataclass(frozen=True)
class Past:
    """What came before: restarts so far, and how many attempts in a row ended quickly."""

    restarts: int = 0
    quick: int = 0


@dataclass(frozen=True)
class Again:
    """Start another attempt after a pause, in seconds."""

    pause: float
    past: Past


@dataclass(frozen=True)
class Stop:
    """Start no other attempt; `why` is for people, empty when the exit code says it all."""

    why: str = ""


def decide(policy: RestartPolicy, past: Past, *, exit_code: int, lived_seconds: float) -> Again | Stop:
    """What follows an attempt.

    Args:
        exit_code: as Popen reports it: negative for a death by signal.
        lived_seconds: from its start to its end.
    """
    if not is_worth_another_attempt(exit_code):
        return Stop()
    if past.restarts >= policy.max_restarts:
        return Stop(f"gave up after {past.restarts} restarts")
    quick = past.quick + 1 if lived_seconds < policy.settled_after_seconds else 0
    # The exponent is bounded: 2.0**1024 is an OverflowError, and nobody pauses that long.
    pause = policy.first_pause_seconds * 2.0 ** min(max(quick - 1, 0), 60)
    return Again(min(pause, policy.longest_pause_seconds), Past(restarts=past.restarts + 1, quick=quick))
