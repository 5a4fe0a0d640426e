"""The time that a notice leaves this process, and the part of it that is kept to say how it ended."""

from __future__ import annotations

import math
import time
from typing import Final

from job.notice import Notice

_LAST_WORDS: Final = 0.2
"""Part of the grace that is kept for the end record."""


class Grace:
    """From the notice on, how long this process may still work.

    Args:
        seconds: from a notice to the end, where whoever gave it promised no more.
    """

    def __init__(self, notice: Notice, seconds: float) -> None:
        self._notice = notice
        self._seconds = seconds

    @property
    def last_words(self) -> float:
        """Seconds for the end record."""
        return _LAST_WORDS * self._seconds

    def left(self) -> float:
        """Seconds until this process may be killed; without end before a notice."""
        if not self._notice.given:
            return math.inf
        grace = max(self._seconds, self._notice.grace_seconds)
        return max(self._notice.at + grace - time.monotonic(), 0.0)

    def time_to_save(self) -> float:
        """The same, less what it takes to say how it ended."""
        return max(self.left() - self.last_words, 0.0)
