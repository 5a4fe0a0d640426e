"""How an attempt ended, as a value: for its record and its exit code."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Final

from job.contract.errors import BadInput, FtjobError, StorageError, Unreachable
from job.contract.layout import RunLayout
from job.contract.outcome import Outcome
from job.contract.records import AttemptClaim, AttemptEnd
from job.grace import Grace
from job.journal import Journal, now
from job.logs import get_logger
from job.storage import Store

_LOOK_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Ending:
    """An outcome, and what to say of it."""

    outcome: Outcome
    message: str
    hint: str = ""
    step: int = 0


def ending_of(error: FtjobError) -> Ending:
    """How an error ends an attempt."""
    match error:
        case BadInput():
            outcome = Outcome.BAD_INPUT
        case Unreachable():
            outcome = Outcome.PREEMPTED  # another attempt may find what this one could not reach
        case _:
            outcome = Outcome.FAILED
    return Ending(outcome, error.message, error.hint)


def record_end(
    store: Store,
    layout: RunLayout,
    claim: AttemptClaim,
    ending: Ending,
    journal: Journal,
    *,
    grace: Grace,
    patience: float = math.inf,
) -> None:
    """Say how it ended. Waits no longer than this process has, and not beyond `patience` seconds."""
    until = time.monotonic() + patience
    end = AttemptEnd(
        attempt=claim.attempt,
        nonce=claim.nonce,
        ended_at=now(),
        outcome=ending.outcome,
        step=ending.step,
        message=ending.message,
        hint=ending.hint,
        elapsed=journal.elapsed,
    )

    def record() -> None:
        try:
            journal.flush()
            store.put_new(layout.end(claim.attempt), end.to_bytes())
        except StorageError as error:  # the exit code says it too, and the records do without
            get_logger().warning("attempt.end_not_recorded", error=str(error))

    # In a thread, since a network that does not answer must not hold this process beyond its grace.
    recording = threading.Thread(target=record, name="end", daemon=True)
    recording.start()
    while recording.is_alive() and grace.left() and time.monotonic() < until:
        recording.join(_LOOK_SECONDS)
