"""Trying again: with growing pauses, as long as it is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from job.contract.errors import Unreachable
from job.logs import get_logger

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0

T = TypeVar("T")


def pauses() -> Iterator[float]:
    """1, 2, 4, ... 30, 30, ... seconds."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def insist(
    action: Callable[[], T],
    *,
    what: str,
    seconds: float,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do it; while the store is out of reach, again, for at most this many seconds after the first failure.

    Raises:
        Unreachable: it still was at the end of that time.
    """
    deadline: float | None = None
    for pause in pauses():
        try:
            return action()
        except Unreachable as error:
            now = clock()
            deadline = now + seconds if deadline is None else deadline
            if now + pause > deadline:
                raise
            get_logger().warning("store.unreachable", what=what, error=str(error), next_try_seconds=pause)
            sleep(pause)
    raise AssertionError("pauses never end")
