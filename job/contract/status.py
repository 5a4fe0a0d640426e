"""The status of a run: one pure function of its records and its backend's state. "Could not ask" is never "ended"."""

from __future__ import annotations

from enum import StrEnum

from job.contract.outcome import Outcome


class BackendState(StrEnum):
    """What the backend says of the process or cluster behind a run."""

    QUEUED = "queued"
    ALIVE = "alive"
    RECOVERING = "recovering"
    CANCELLED = "cancelled"
    FAILED = "failed"
    """It saw the job end with an exit code that asks for no other attempt; there may be no end record."""
    GONE = "gone"
    UNREACHABLE = "unreachable"


class Status(StrEnum):
    """What a person is told of a run."""

    PENDING = "pending"
    RUNNING = "running"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    OUT_OF_BUDGET = "out_of_budget"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """Nothing runs any more and the run is not over: `ftjob launch --run RUN` goes on from the last commit."""
    UNKNOWN = "unknown"

    @property
    def is_over(self) -> bool:
        """Whether it stays so until a person does something."""
        return self not in {Status.PENDING, Status.RUNNING, Status.RECOVERING, Status.UNKNOWN}


def derive_status(
    *,
    published: bool,
    complete: bool,
    attempts: int,
    last_end: Outcome | None,
    backend: BackendState,
    asked_to_stop: bool = False,
) -> Status:
    """The status.

    Args:
        published: adapter.json exists; `complete`: and it is the final adapter, not one landed at a ceiling.
        attempts: number of claims.
        last_end: outcome in the newest attempt's end record; None when it has none.
        backend: what the backend answered.
        asked_to_stop: the newest submission was, through the bucket. A job that is started again then ends at once, and
            its exit code asks for no other attempt: to the backend that is a failure.
    """
    if published and complete:
        return Status.SUCCEEDED
    if asked_to_stop and not published and last_end in (None, Outcome.PREEMPTED):
        backend = BackendState.CANCELLED if backend in (BackendState.FAILED, BackendState.GONE) else backend
    match backend:
        case BackendState.UNREACHABLE:
            return Status.UNKNOWN
        case BackendState.QUEUED:
            return Status.PENDING
        case BackendState.RECOVERING:
            return Status.RECOVERING
        case BackendState.ALIVE:
            if attempts == 0:
                return Status.PENDING
            return Status.RUNNING if last_end is None else Status.RECOVERING
        case BackendState.CANCELLED:
            return Status.CANCELLED
        case BackendState.FAILED:
            # "Out of budget" asks for no other attempt either, and is no failure: an adapter landed.
            return Status.OUT_OF_BUDGET if last_end is Outcome.OUT_OF_BUDGET or published else Status.FAILED
        case BackendState.GONE:
            if last_end in (Outcome.FAILED, Outcome.BAD_INPUT):
                return Status.FAILED
            if last_end is Outcome.OUT_OF_BUDGET or published:
                return Status.OUT_OF_BUDGET
            return Status.INTERRUPTED
