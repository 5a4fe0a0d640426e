"""A request to stop, left in the bucket: the one way to reach a job that works everywhere, and leaves it time to save.

What a backend does when it is told to cancel is between it and the cloud: some send no signal at all.
"""

from __future__ import annotations

import threading
from typing import Final

from job.contract.errors import NotFound, StorageError
from job.contract.layout import RunLayout
from job.notice import Notice
from job.storage import Store

LOOK_SECONDS: Final = 5.0
"""Between two looks: one small request."""
REASON: Final = "a request to stop"


def is_asked_to_stop(store: Store, layout: RunLayout, submission: int) -> bool:
    """Whether somebody asked this submission of the run to stop. Raises StorageError."""
    try:
        return bool(submission and store.get(layout.stop(submission)))
    except NotFound:
        return False


def watch_for_stop(
    store: Store, layout: RunLayout, submission: int, notice: Notice, *, every: float = LOOK_SECONDS
) -> threading.Event:
    """Give the notice once somebody asks this submission of the run to stop. Setting the event ends the watch.

    Args:
        submission: 0 for a job that no launcher started; nobody can ask that one.
        every: seconds between two looks.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not notice.given:
            try:
                if is_asked_to_stop(store, layout, submission):
                    notice.give(REASON)
                    return
            except StorageError:  # whoever cannot be reached asks for nothing
                pass
            over.wait(every)

    if submission:
        threading.Thread(target=watch, name="stop", daemon=True).start()
    return over
