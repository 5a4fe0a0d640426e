"""The files of a base model from elsewhere: brought by several threads, again while their place is out of reach,
verified one by one, and counted for whoever watches."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

from job.checkpoints import digest_file
from job.contract.base_model import is_weights
from job.contract.errors import Damaged, TrainingFailed
from job.contract.recipe import BaseModelRef
from job.contract.records import FileDigest
from job.logs import get_logger
from job.patience import insist
from job.storage import Progress

_LOOK_SECONDS: Final = 0.1
_SAY_SECONDS: Final = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A file as its place lists it. `size` in bytes; of equal versions the bytes are equal."""

    name: str
    size: int
    version: str


class Source(Protocol):
    """A place elsewhere that a base model comes from. `fetch` is called from several threads."""

    @property
    def folder(self) -> Path:
        """Where its files are on this machine, once they are."""
        ...

    @property
    def at_once(self) -> int:
        """How many files to fetch at the same time."""
        ...

    def files(self) -> list[Remote]:
        """The files that are read of the model. Raises ModelInvalid, Unreachable, AccessRefused."""
        ...

    def missing(self, file: Remote) -> int:
        """Bytes that have yet to come."""
        ...

    def fetch(self, file: Remote, progress: Progress, *, again: bool) -> Path:
        """A file on this machine. Takes up what a killed attempt left; `again`: what is here is damaged.

        `progress` hears of the bytes as they come, those that were here first. Raises as `files`.
        """
        ...

    def accepts(self, file: Remote, path: Path, digest: FileDigest) -> bool:
        """Whether these are the bytes that its place lists; remembers them where the place lists no digest."""
        ...


def download(
    source: Source,
    ref: BaseModelRef,
    go_on: Callable[[], None],
    say: Callable[[str], None],
    before_weights: Callable[[Path], None],
    retry_seconds: float,
) -> dict[str, FileDigest]:
    """Bring every file, largest first, and the weights last; the digests by name.

    Args:
        go_on, say, before_weights, retry_seconds: as `job.weights.locate` has them.

    Raises:
        ModelInvalid, Unreachable, TrainingFailed, Damaged: as `job.weights.locate` has them.
    """
    stop = threading.Event()

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def patiently(action: Callable[[], T]) -> T:
        return insist(action, what="base model", seconds=retry_seconds, sleep=pause)

    try:
        (files,) = in_threads([partial(patiently, source.files)], 1, go_on)
        missing = sum(source.missing(file) for file in files)
        _check_disk(source.folder, missing, ref)
        meter = _Meter(files, stop)

        def watch() -> None:
            go_on()
            if missing:
                meter.report(say)

        watch()
        started = time.monotonic()

        def bring_all(some: list[Remote]) -> dict[str, FileDigest]:
            largest_first = sorted(some, key=lambda file: -file.size)
            tasks = [partial(_bring, source, ref, meter, patiently, file) for file in largest_first]
            digests = in_threads(tasks, source.at_once, watch)
            return dict(zip((file.name for file in largest_first), digests, strict=True))

        found = bring_all([file for file in files if not is_weights(file.name)])
        before_weights(source.folder)
        found |= bring_all([file for file in files if is_weights(file.name)])
    finally:
        stop.set()
    if missing:
        seconds = round(time.monotonic() - started, 2)
        get_logger().info("weights.downloaded", files=len(files), total=missing, seconds=seconds)
        say("loading the model")
    return dict(sorted(found.items()))


def _bring(
    source: Source, ref: BaseModelRef, meter: _Meter, patiently: Callable[[Callable[[], Path]], Path], file: Remote
) -> FileDigest:
    """A file with the very bytes that its place lists.

    Raises:
        Damaged: it has others, twice.
    """

    def fetch(again: bool) -> Path:
        return patiently(lambda: source.fetch(file, meter.restart(file), again=again))

    for again in (False, True):
        path = fetch(again)
        meter.complete(file)
        digest = digest_file(path)
        if source.accepts(file, path, digest):
            return digest
        get_logger().warning("weights.damaged", file=file.name, sha256=digest.sha256, size=digest.size)
    raise Damaged(
        f"{file.name} of base model {ref.id} has other bytes than its place lists, twice: sha256 {digest.sha256}",
        hint="something between here and there changes bytes, or this disk does",
    )


def _check_disk(folder: Path, missing: int, ref: BaseModelRef) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < missing:
        raise TrainingFailed(
            f"base model {ref.id} does not fit onto this disk: {missing:,} bytes have yet to come, and {free:,} are "
            f"free at {there}",
            hint="ask for a larger disk, or point HF_HOME to one",
        )


def in_threads(tasks: Sequence[Callable[[], T]], at_once: int, watch: Callable[[], None]) -> list[T]:
    """Do it in threads; what they return, in order. The first failure, of one of them or of `watch`, is raised at once.

    Threads that are still at work then are left to themselves: they may be waiting for a network.
    """
    pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="weights")
    try:
        futures = [pool.submit(task) for task in tasks]
        while True:
            done, pending = wait(futures, timeout=_LOOK_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if not pending:
                return [future.result() for future in futures]
            watch()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Stopped(Exception):
    """The attempt ends; so does the thread that this is raised in."""


class _Meter:
    """Counts the bytes that are here, over all files, and says so every few seconds."""

    def __init__(self, files: list[Remote], stop: threading.Event) -> None:
        self._counts = dict.fromkeys((file.name for file in files), 0)
        self._total = sum(file.size for file in files)
        self._stop = stop
        self._next = 0.0

    def restart(self, file: Remote) -> Progress:
        """What counts one file, from nothing."""
        self._counts[file.name] = 0

        def count(size: int) -> None:
            if self._stop.is_set():
                raise _Stopped
            self._counts[file.name] += size

        return count

    def complete(self, file: Remote) -> None:
        self._counts[file.name] = file.size

    def report(self, say: Callable[[str], None]) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SAY_SECONDS
        done = sum(self._counts.values())
        get_logger().info("weights.downloading", done=done, total=self._total)
        unit, size = ("GB", 1e9) if self._total >= 1e9 else ("MB", 1e6)
        say(f"downloading the base model: {done / size:.1f} of {self._total / size:.1f} {unit}")
