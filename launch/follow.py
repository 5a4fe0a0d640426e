"""Stays with a run until it is over, or until the person has had enough."""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Final, Protocol, Self

from job.contract.errors import FtjobError, StorageError
from job.contract.status import BackendState
from launch.backend import Backend
from launch.runs import Poll, RunReader
from launch.view import RunView

LOCAL_SECONDS: Final = 0.25
REMOTE_SECONDS: Final = 2.0
"""Between two looks: a look at an s3:// bucket costs some five requests."""
_ENDING_SECONDS: Final = 30.0
"""How long the processes of a run that is over may take to go away."""

BUSY: Final = (BackendState.QUEUED, BackendState.ALIVE, BackendState.RECOVERING)
"""States in which something of a run lives, or will."""


class Display(Protocol):
    """Shows a run while it goes on."""

    def show(self, poll: Poll) -> None: ...
    def say(self, text: str) -> None: ...


class Interrupts:
    """Counts SIGINT and SIGTERM instead of dying of them, for as long as the context lasts."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def follow(
    reader: RunReader, run_id: str, backend: Backend, display: Display, interrupts: Interrupts, *, every: float
) -> RunView:
    """Watch a run to its end. The first interrupt cancels it, and the job saves; the second leaves it to itself.

    A bucket that fails is shown and asked again: the run does not depend on its watchers.

    Args:
        every: seconds between two looks.

    Raises:
        FtjobError: the very first look failed.
    """
    view: RunView | None = None
    asked = False
    over_since: float | None = None
    while True:
        if interrupts.count and not asked:
            asked = True
            display.say("stopping: the job saves its work first (once more to leave it alone)")
            backend.cancel(run_id)
        try:
            poll = reader.poll(datetime.now(UTC))
        except StorageError as error:
            if view is None:
                raise
            display.say(f"cannot look at the run: {error.message}")
        else:
            view = poll.view
            display.show(poll)
            if view.status.is_over:
                over_since = over_since or time.monotonic()
                if poll.described.state not in BUSY or time.monotonic() - over_since > _ENDING_SECONDS:
                    return view
            else:
                over_since = None
        if interrupts.count > 1 and view is not None:
            return view
        time.sleep(every)


def wait_until_stopped(reader: RunReader, *, every: float, patience: float) -> RunView:
    """The run once nothing of it lives any more.

    Args:
        every: seconds between two looks.
        patience: seconds to wait at most.

    Raises:
        FtjobError: it did not stop in time.
    """
    deadline = time.monotonic() + patience
    while True:
        poll = reader.poll(datetime.now(UTC))
        if poll.described.state not in BUSY:
            return poll.view
        if time.monotonic() > deadline:
            raise FtjobError(
                f"run {poll.view.run_id} has not stopped after {patience:.0f} s", hint="look again with `ftjob status`"
            )
        time.sleep(every)
