"""The notice that this machine is about to go: one flag, set by SIGTERM (or Ctrl-C). Loops look at it and act."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Final

_LOOK_SECONDS: Final = 0.05


class Notice:
    """A flag that only ever goes up.

    The handler does nothing but raise it: printing, saving or raising inside a signal handler tears whatever it
    interrupted. A second SIGTERM changes nothing; the save under way is the answer to both.

    A plain attribute, and not a threading.Event: an Event has a lock, and a handler that interrupts its owner in
    `wait` would stand still in `set` for ever.
    """

    def __init__(self) -> None:
        self._given = False
        self.reason = ""
        self.at = 0.0
        """time.monotonic() of the notice; 0 before it."""

    def give(self, reason: str) -> None:
        """Raise the flag; the first reason stays."""
        if not self._given:
            self.reason = reason
            self.at = time.monotonic()
            self._given = True

    @property
    def given(self) -> bool:
        return self._given

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
