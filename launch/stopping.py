"""Stops a run so that its job saves first: by a record in its bucket, and then by its backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from job.contract.errors import StorageError
from job.contract.layout import RunLayout
from job.contract.status import BackendState
from job.storage import Store
from launch.backend import Backend
from launch.local import LocalBackend
from launch.runs import RunReader, newest_submission

STOP_PATIENCE_SECONDS: Final = 60.0
"""For a job elsewhere to see that it should stop, to save and to end, before its machine is taken away."""
_LOOK_SECONDS: Final = 2.0


def stop_run(store: Store, run_id: str, backend: Backend, say: Callable[[str], None]) -> bool:
    """Stop whatever of a run lives; False when nothing did.

    A job on this machine gets its SIGTERM. Of a job elsewhere nobody knows whether a signal will reach it: it is asked
    through the bucket, and given the time to save and end. One that does not answer loses what it did since its last
    commit, as at any preemption.

    Raises:
        FtjobError: its backend could not be asked.
    """
    if backend.name != LocalBackend.name:
        try:
            _ask(store, run_id, backend, say)
        except StorageError as error:
            say(f"the job could not be asked to save first: {error.message}")
    return backend.cancel(run_id)


def _ask(store: Store, run_id: str, backend: Backend, say: Callable[[str], None]) -> None:
    submission = newest_submission(store, run_id)
    if submission is None or backend.describe(run_id).state is not BackendState.ALIVE:
        return
    say("asking the job to save its work")
    store.put_new(RunLayout(run_id).stop(submission.submission), b"{}\n")
    reader = RunReader(store, run_id, backend)
    until = time.monotonic() + STOP_PATIENCE_SECONDS
    while time.monotonic() < until:
        newest = reader.poll(datetime.now(UTC)).view.attempts[-1:]
        if newest and newest[0].ended != "running":
            return
        time.sleep(_LOOK_SECONDS)
