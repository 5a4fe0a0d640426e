"""The journal: metric lines on their way to the bucket, as whole objects, at least one each heartbeat.

Lines wait in memory while the store is out of reach, in order; nothing blocks the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

from job.contract.errors import AlreadyExists, StorageError
from job.contract.layout import Key, RunLayout
from job.contract.metrics import Heartbeat, MetricLine, dump_lines
from job.logs import get_logger
from job.storage import Store


def now() -> datetime:
    """The time by this machine's clock, UTC."""
    return datetime.now(UTC)


class Journal:
    """The metric lines of one attempt. Open it with `with`; lines may come from several threads.

    Args:
        began: when the attempt did, by `clock`; now unless told.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        *,
        attempt: int,
        heartbeat_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self._store = store
        self._layout = layout
        self._attempt = attempt
        self._interval = heartbeat_seconds
        self._clock = clock
        self._began = clock() if began is None else began
        self._lines: list[MetricLine] = []
        self._phase = "starting"
        self._sequence = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="journal", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=0.1)  # one that waits for the network is left to it

    def write(self, line: MetricLine) -> None:
        """Add a line; it is in the bucket by the next heartbeat."""
        with self._lock:
            self._lines.append(self._timed(line))

    def phase(self, name: str) -> None:
        """Say what the attempt does from now on; heartbeats repeat it. Whoever watches hears of it at once."""
        self._phase = name
        get_logger().info("phase", phase=name)
        self.write(Heartbeat(at=now(), phase=name))
        self._wake.set()

    @property
    def elapsed(self) -> float:
        """Seconds since the attempt began; by a clock that only goes forward."""
        return self._clock() - self._began

    def _timed(self, line: MetricLine) -> MetricLine:
        return line.model_copy(update={"elapsed": round(self.elapsed, 3)})

    def flush(self) -> None:
        """Bring everything written so far into the bucket, now.

        Raises:
            StorageError: it did not work; the lines are kept for the next time.
        """
        with self._writing:  # one object at a time, so that their order is the order of the lines
            with self._lock:
                lines = list(self._lines)
            while lines:
                written = self._put(lines)
                with self._lock:
                    self._sequence += 1
                    del self._lines[:written]
                del lines[:written]

    def _put(self, lines: list[MetricLine]) -> int:
        """Create the next object from the first of these lines; returns how many."""
        key = self._layout.metrics_object(self._attempt, self._sequence)
        try:
            self._store.put_new(key, dump_lines(lines))
        except AlreadyExists:
            # An answer was lost: the lines that there were then are in the bucket, and others have joined since.
            found = self._store.get(key)
            written = found.count(b"\n")
            if not 0 < written <= len(lines) or dump_lines(lines[:written]) != found:
                raise
            return written
        return len(lines)

    def pending(self) -> tuple[Key, bytes]:
        """What the next flush will write, and under which key; more lines may have joined by then.

        Waits for nobody: while a flush is under way, its lines are the first of these, and its key is this one.
        """
        with self._lock:
            return self._layout.metrics_object(self._attempt, self._sequence), dump_lines(self._lines)

    def _beat(self) -> None:
        failing_since: float | None = None
        while True:
            self._wake.wait(self._interval)
            self._wake.clear()
            if self._closing:
                return
            with self._lock:
                beat = self._timed(Heartbeat(at=now(), phase=self._phase))
                # Behind older lines too: the ledger counts from the last one, and that may be an interval old.
                if not self._lines or self._lines[-1].elapsed < beat.elapsed:
                    self._lines.append(beat)
            try:
                self.flush()
                failing_since = None
            except StorageError as error:
                failing_since = failing_since or time.monotonic()
                silent = round(time.monotonic() - failing_since, 1)
                get_logger().warning("journal.unreachable", error=str(error), silent_seconds=silent)
