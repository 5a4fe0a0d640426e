"""The base model's files: brought to this machine, taken up where a killed attempt left them, verified and digested.

From the hub they go into Hugging Face's own cache (HF_HOME), which all runs of a machine share; from a bucket into the
work folder. Every file is digested once an attempt, wherever it came from: the digests are the base's identity.
"""

from __future__ import annotations

import hashlib
import json
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
from job.contract.base_model import is_weights, model_files
from job.contract.errors import Damaged, TrainingFailed
from job.contract.recipe import TINY_MODEL, BaseModelRef
from job.contract.records import FileDigest
from job.dataset.source import local_path
from job.logs import get_logger
from job.patience import insist
from job.storage import Progress
from job.tiny import write_tiny_model

RETRY_SECONDS: Final = 300.0
"""How long a file waits for a place that is out of reach."""

_LOOK_SECONDS: Final = 0.1
_SAY_SECONDS: Final = 5.0
_DIGESTING: Final = 4
"""Threads that digest files which are here: hashlib lets go of the interpreter, and one thread would take 90 s for a
70B model."""

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """The base model's files on this machine."""

    folder: Path
    files: dict[str, FileDigest]

    @property
    def digest(self) -> str:
        """Sha256 over the names and digests of all files."""
        listed = json.dumps({name: digest.sha256 for name, digest in self.files.items()}, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def chat_template_digest(self) -> str:
        """Sha256 of the chat template's text: a file of its own, or a key of tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
        config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return hashlib.sha256(json.dumps(config.get("chat_template")).encode()).hexdigest()

    @property
    def weights_size(self) -> int:
        """Bytes of the weights' files."""
        return sum(digest.size for name, digest in self.files.items() if is_weights(name))

    def digest_of(self, *names: str) -> str:
        """The same over some of the files; absent ones count as absent."""
        listed = json.dumps({name: self.files[name].sha256 for name in names if name in self.files}, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()


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


def locate(
    ref: BaseModelRef,
    workdir: Path,
    *,
    go_on: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
    before_weights: Callable[[Path], None] = lambda _: None,
    retry_seconds: float = RETRY_SECONDS,
) -> Base:
    """Bring the base model's files to this machine and digest them.

    Args:
        go_on: called ten times a second; raises when this attempt has to end.
        say: told what is done from now on: of a download every few seconds, and of its end.
        before_weights: called once with the folder, in which everything but the weights is by then; raises when it is
            not worth bringing them.

    Raises:
        ModelInvalid: it is missing, may not be had, or has no safetensors weights.
        Unreachable: its place was out of reach for all of `retry_seconds`, or this disk is full.
        TrainingFailed: this disk is too small for it.
        Damaged: its place gives other bytes than it lists.
    """
    if ref.id == TINY_MODEL:
        folder = workdir / "base"
        write_tiny_model(folder)
        return _digest(folder, ref, go_on, before_weights)
    name = hashlib.sha256(json.dumps([ref.id, ref.revision]).encode()).hexdigest()[:16]
    if ref.is_on_hub:
        from job.hub import HubFiles

        return _bring(
            HubFiles(ref, listing=workdir / "base" / f"{name}.json"), ref, go_on, say, before_weights, retry_seconds
        )
    if ref.is_in_bucket:
        from job.bucket import BucketFiles

        return _bring(BucketFiles(ref, folder=workdir / "base" / name), ref, go_on, say, before_weights, retry_seconds)
    folder = (local_path(ref.id) if "://" in ref.id else None) or Path(ref.id).expanduser()
    return _digest(folder, ref, go_on, before_weights)


def _digest(folder: Path, ref: BaseModelRef, go_on: Callable[[], None], before_weights: Callable[[Path], None]) -> Base:
    present = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    names = model_files(present, where=f"{folder}" if ref.id != TINY_MODEL else ref.id)
    before_weights(folder)
    digests = _in_threads([partial(digest_file, folder / name) for name in names], _DIGESTING, go_on)
    return Base(folder, dict(zip(names, digests, strict=True)))


def _bring(
    source: Source,
    ref: BaseModelRef,
    go_on: Callable[[], None],
    say: Callable[[str], None],
    before_weights: Callable[[Path], None],
    retry_seconds: float,
) -> Base:
    stop = threading.Event()

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise _Stopped

    def patiently(action: Callable[[], T]) -> T:
        return insist(action, what="base model", seconds=retry_seconds, sleep=pause)

    def bring(file: Remote) -> FileDigest:
        for again in (False, True):
            path = patiently(lambda: source.fetch(file, meter.restart(file), again=again))  # noqa: B023  called at once
            meter.complete(file)
            digest = digest_file(path)
            if source.accepts(file, path, digest):
                return digest
            get_logger().warning("weights.damaged", file=file.name, sha256=digest.sha256, size=digest.size)
        raise Damaged(
            f"{file.name} of base model {ref.id} has other bytes than its place lists, twice: sha256 {digest.sha256}",
            hint="something between here and there changes bytes, or this disk does",
        )

    try:
        (files,) = _in_threads([partial(patiently, source.files)], 1, go_on)
        missing = sum(source.missing(file) for file in files)
        _check_disk(source.folder, missing, ref)
        meter = _Meter(files, stop)

        def watch() -> None:
            go_on()
            if missing:
                meter.report(say)

        watch()
        started = time.monotonic()
        found: dict[str, FileDigest] = {}

        def bring_all(some: list[Remote]) -> None:
            largest_first = sorted(some, key=lambda file: -file.size)
            digests = _in_threads([partial(bring, file) for file in largest_first], source.at_once, watch)
            found.update(zip((file.name for file in largest_first), digests, strict=True))

        bring_all([file for file in files if not is_weights(file.name)])
        before_weights(source.folder)
        bring_all([file for file in files if is_weights(file.name)])
    finally:
        stop.set()
    if missing:
        seconds = round(time.monotonic() - started, 2)
        get_logger().info("weights.downloaded", files=len(files), total=missing, seconds=seconds)
        say("loading the model")
    return Base(source.folder, dict(sorted(found.items())))


def _check_disk(folder: Path, missing: int, ref: BaseModelRef) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < missing:
        raise TrainingFailed(
            f"base model {ref.id} does not fit onto this disk: {missing:,} bytes have yet to come, and {free:,} are "
            f"free at {there}",
            hint="ask for a larger disk, or point HF_HOME to one",
        )


def _in_threads(tasks: Sequence[Callable[[], T]], at_once: int, watch: Callable[[], None]) -> list[T]:
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
