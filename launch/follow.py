"""Stays with a run until it is over, or until the person has had enough."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Final, Protocol, Self

from job.contract.errors import FtjobError, StorageError
from job.contract.status import BackendState
from job.storage import Store
from launch.runs import Poll, RunReader
from launch.view import RunView

OVERSPENT_SECONDS: Final = 60.0
"""For how long a job may take to notice by itself that its budget is spent."""
STOP_AGAIN_SECONDS: Final = 60.0
"""Between two tries to stop a run, where the first did not work."""
_LOCAL_SECONDS: Final = 0.25
_REMOTE_SECONDS: Final = 2.0
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


def seconds_between_looks(store: Store) -> float:
    """At a run in this bucket."""
    return _LOCAL_SECONDS if store.uri.startswith("file:") else _REMOTE_SECONDS


def follow(
    reader: RunReader,
    stop: Callable[[], bool],
    display: Display,
    interrupts: Interrupts,
    *,
    every: float,
    again: float = STOP_AGAIN_SECONDS,
    cancels: bool = True,
    leave_now: Callable[[Poll], str] = lambda _: "",
) -> RunView:
    """Watch a run to its end. The first interrupt cancels it, and the job saves; the second leaves it to itself.

    A bucket that fails is shown and asked again: the run does not depend on its watchers. A job that cannot stop itself
    when its budget is spent is stopped from here.

    Args:
        stop: ends the run, and says whether it could be asked to; until then it is called again. May take a minute.
        every: seconds between two looks.
        again: seconds between two tries to stop it.
        cancels: False when an interrupt is for the watching only.
        leave_now: why the run should stop where it is, to go on elsewhere; empty while it should not.

    Raises:
        FtjobError: the very first look failed.
    """
    view: RunView | None = None
    asked = False
    next_try = 0.0
    overspent_since: float | None = None
    over_since: float | None = None

    def end(why: str) -> None:
        nonlocal asked, next_try
        display.say(why)
        asked = stop()
        next_try = time.monotonic() + again

    while True:
        if interrupts.count and not cancels and view is not None:
            return view
        if interrupts.count and cancels and not asked and time.monotonic() >= next_try:
            end("stopping: the job saves its work first (once more to leave it alone)")
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
            may_try = not asked and time.monotonic() >= next_try
            if may_try and (why := leave_now(poll)):
                end(why)
            overspent_since = (overspent_since or time.monotonic()) if view.is_overspent else None
            if overspent_since and time.monotonic() - overspent_since > OVERSPENT_SECONDS and may_try and not asked:
                end("its budget is spent and it goes on: it is stopped from here")
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
