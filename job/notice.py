"""The notice that this machine is about to go: one flag, set by SIGTERM (or Ctrl-C). Loops look at it and act."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType


class Notice:
    """A flag that only ever goes up.

    The handler does nothing but raise it: printing, saving or raising inside a signal handler tears whatever it
    interrupted. A second SIGTERM changes nothing; the save under way is the answer to both.
    """

    def __init__(self) -> None:
        self._given = threading.Event()
        self.reason = ""
        self.at = 0.0
        """time.monotonic() of the notice; 0 before it."""

    def give(self, reason: str) -> None:
        """Raise the flag; the first reason stays."""
        if not self._given.is_set():
            self.reason = reason
            self.at = time.monotonic()
            self._given.set()

    @property
    def given(self) -> bool:
        return self._given.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake for a notice. Returns whether it was given."""
        return self._given.wait(seconds)

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on. Main thread only; do it first: the default is death."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self.give(signal.Signals(number).name)

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, handle)
