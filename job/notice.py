"""The notice that this machine is about to go: one flag, set by SIGTERM (or Ctrl-C), or by the cloud's metadata."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Final

_LOOK_SECONDS: Final = 0.05


class Notice:
    """A flag that only ever goes up, and a second one that says that it was answered.

    The handler does nothing but raise it: printing, saving or raising inside a signal handler tears whatever it
    interrupted. A second SIGTERM changes nothing; the save under way is the answer to both.

    A plain attribute, and not a threading.Event: an Event has a lock, and a handler that interrupts its owner in
    `wait` would stand still in `set` for ever.
    """

    def __init__(self) -> None:
        self._given = False
        self._answered = False
        self.reason = ""
        """What ends this machine's time: a signal's name, or what the cloud said."""
        self.at = 0.0
        """time.monotonic() of the notice; 0 before it."""
        self.grace_seconds = 0.0
        """From the notice to the end, where whoever gave it promised some."""

    def give(self, reason: str, *, grace_seconds: float = 0.0) -> None:
        """Raise the flag; the first reason stays."""
        if not self._given:
            self.reason = reason
            self.at = time.monotonic()
            self.grace_seconds = grace_seconds
            self._given = True

    def answer(self) -> None:
        """What could be done about it is done: whoever kept silent for the save may speak."""
        self._answered = True

    @property
    def given(self) -> bool:
        return self._given

    @property
    def unanswered(self) -> bool:
        """Whether the machine's last seconds are for saving, and for nothing else."""
        return self._given and not self._answered

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake for a notice. Returns whether it was given."""
        until = time.monotonic() + seconds
        while not self._given and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))
        return self._given

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on. Main thread only; do it first: the default is death."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.give(signal.Signals(number).name)

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
