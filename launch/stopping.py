"""Stops a run so that its job saves first: by a record in its bucket, and then by its backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from job.contract.errors import FtjobError
from job.contract.layout import RunLayout
from job.contract.outcome import Outcome
from job.contract.status import BackendState
from job.storage import Store
from launch.backend import Backend
from launch.follow import BUSY
from launch.local import LocalBackend
from launch.runs import RunReader, newest_submission
from launch.view import RunView

STOP_PATIENCE_SECONDS: Final = 60.0
"""For a job elsewhere to see that it should stop, to save and to end, before its machine is taken away."""
_LOOK_SECONDS: Final = 2.0


def stop_run(store: Store, run_id: str, backend: Backend, say: Callable[[str], None]) -> bool:
    """Stop whatever of a run lives; False when nothing did.

    A job on this machine gets its SIGTERM. Of a job elsewhere nobody knows whether a signal will reach it: it is asked
    through the bucket, and given the time to save and end. One that does not answer loses what it did since its last
    commit, as at any preemption. Where its backend cannot be asked from here, that request is all there is: the job
    ends by it, and is not started again.

    Raises:
        FtjobError: its backend could not be asked, and the job neither.
    """
    asked, state = False, backend.describe(run_id).state
    if state is BackendState.UNREACHABLE or (state in BUSY and backend.name != LocalBackend.name):
        try:
            asked = _ask(store, run_id, backend, state, say)
        except FtjobError as error:  # a record that is damaged, too, must not keep the run alive
            say(f"the job could not be asked to save first: {error.message}")
    try:
        stopped = backend.cancel(run_id)
        why = "nothing of the run is known here"
    except FtjobError as error:
        if not asked:
            raise
        stopped, why = False, error.message
    if asked and not stopped and state is BackendState.UNREACHABLE:
        say(
            f"{why}: the job was asked through its bucket alone, and is not started again; its machine may stay, and "
            f"cost money, until that is seen where it was launched: `ftjob cancel {run_id}` there makes sure"
        )
    return stopped or asked


def _ask(store: Store, run_id: str, backend: Backend, state: BackendState, say: Callable[[str], None]) -> bool:
    """Leave the request, and give a job that lives the time to answer. Whether there was one to ask."""
    submission = newest_submission(store, run_id)
    reader = RunReader(store, run_id, backend)
    view = reader.poll(datetime.now(UTC)).certain
    if submission is None or view.status.is_over or not _may_go_on(view):
        return False
    say("asking the job to save its work")
    store.put_new(RunLayout(run_id).stop(submission.submission), b"{}\n")
    until = time.monotonic() + STOP_PATIENCE_SECONDS
    while state in (BackendState.ALIVE, BackendState.UNREACHABLE) and _lives(view) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        view = reader.poll(datetime.now(UTC)).view
    return True


def _may_go_on(view: RunView) -> bool:
    """Whether the newest attempt may live, or be followed by another."""
    ended = view.attempts[-1].ended if view.attempts else ""
    return ended in ("", "running", "killed", Outcome.PREEMPTED)


def _lives(view: RunView) -> bool:
    return bool(view.attempts) and view.attempts[-1].ended == "running"
