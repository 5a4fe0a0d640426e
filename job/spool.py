"""The spool: checkpoints wait on the local disk for the bucket, so that training never waits for the network.

The training copies its state aside in memory, which is the only part that blocks it, and hands over a function that
writes it. One thread writes the files, digests them and seals them with a manifest; another one uploads and commits. A
full disk stops the one and a store out of reach the other, and each tries again with growing pauses. A later attempt on
the same disk adopts what a dead one sealed: the step that was saved is not lost because the network was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from job.checkpoints import commit, prune
from job.contract.errors import StorageError
from job.contract.layout import CheckpointName, Key, RunLayout
from job.contract.records import CheckpointManifest
from job.logs import get_logger
from job.patience import pauses
from job.sealed import FILES, AliveLock, discard, seal, spool_of
from job.storage import Store
from job.storage.store import translate_os_error

_SEAL_SECONDS: Final = 5.0
"""For what is still only in memory at the end to reach the disk."""
_CLOSE_SECONDS: Final = 0.5


class Record(Protocol):
    """The journal, as far as checkpoints need it."""

    def pending(self) -> tuple[Key, bytes]:
        """The key and the bytes of what the next flush will write at least. Never waits for the store."""
        ...

    def flush(self) -> None:
        """Write it. Raises StorageError."""
        ...


@dataclass(frozen=True)
class Commit:
    """One checkpoint that became restorable. Sizes in bytes, times in seconds."""

    name: CheckpointName
    size: int
    blocking_seconds: float
    seconds: float


@dataclass(eq=False)
class _Staged:
    """In memory until it is sealed, then on the disk."""

    draft: CheckpointManifest
    write: Callable[[Path], None]
    """Holds the copy in memory; let go of once it is on the disk."""
    folder: Path
    decided: float
    blocking_seconds: float
    manifest: CheckpointManifest | None = None


def _nothing_left(_folder: Path) -> None:
    raise AssertionError("what is sealed is not written again")


class Spool:
    """The checkpoints of one attempt on their way to the bucket. One thread stages, one seals, one uploads.

    Args:
        folder: of all runs and attempts on this disk; each has a folder of its own in it.
        keep: how many of the newest checkpoints the pruner spares.
        journal: flushed before each commit, and what of it is not flushed is sealed with the checkpoint: what a resume
            will not do again must be on record no later than the checkpoint that covers it.
        on_commit: told of every commit.
        damaged: checkpoints known not to restore, which the pruner does not count.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        folder: Path,
        *,
        attempt: int,
        keep: int,
        journal: Record,
        on_commit: Callable[[Commit], None],
        damaged: frozenset[CheckpointName] = frozenset(),
    ) -> None:
        self._store = store
        self._layout = layout
        self._folder = spool_of(folder, layout) / f"a{attempt:04d}"
        self._keep = keep
        self._journal = journal
        self._on_commit = on_commit
        self._damaged = damaged
        self._queue: list[_Staged] = []
        self._dropped: list[_Staged] = []
        self._trouble: StorageError | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = AliveLock(self._folder)
        self._sealer = threading.Thread(target=self._seal_all, name="spool-seal", daemon=True)
        self._uploader = threading.Thread(target=self._upload_all, name="spool-upload", daemon=True)
        self._sealer.start()
        self._uploader.start()

    def stage(self, draft: CheckpointManifest, write: Callable[[Path], None], *, blocking_seconds: float) -> None:
        """Queue a checkpoint and return at once; it is written, uploaded and committed in the background.

        Args:
            draft: the manifest, its `files` still empty. Its name is new to this attempt.
            write: writes the files into the empty folder it is given; called in the background, again after an
                OSError.
            blocking_seconds: for how long the training stood still to make the copy; for the records.
        """
        decided = time.monotonic() - blocking_seconds
        folder = self._folder / str(draft.name)
        with self._changed:
            # The one being uploaded stays; of those that still wait, only the newest and the epochs' are worth it.
            late = [staged for staged in self._queue[1:] if staged.draft.reason == "interval"]
            # While the disk is full they wait in memory: no more of them than the pruner would spare.
            epochs = [staged for staged in self._queue[1:] if staged.manifest is None and staged not in late]
            late += epochs[: max(len(epochs) + 1 - self._keep, 0)]
            for old in late:
                self._queue.remove(old)
                self._dropped.append(old)
            self._queue.append(_Staged(draft, write, folder, decided, blocking_seconds))
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything staged is committed; whether it was, within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout=seconds)

    def close(self) -> None:
        """Stop uploading. What is not committed is on the disk then, for the next attempt, unless that is full."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._sealer.join(timeout=_SEAL_SECONDS)
        # It may be waiting for a network that does not answer; what it would still commit, the next attempt adopts.
        self._uploader.join(timeout=_CLOSE_SECONDS)
        self._lock.close()

    @property
    def waiting(self) -> int:
        """How many checkpoints are not committed yet."""
        with self._changed:
            return len(self._queue)

    @property
    def sealed(self) -> bool:
        """Whether all of those are safe on the local disk."""
        with self._changed:
            return self._unsealed() is None

    @property
    def trouble(self) -> StorageError | None:
        """Why the last try to seal or to upload failed; None once something was committed."""
        return self._trouble

    def _wait_for_close(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closing, timeout=seconds)

    # The sealing thread: nothing in it waits for the network.

    def _seal_all(self) -> None:
        waits = pauses()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._dropped or self._unsealed())
                dropped, self._dropped = self._dropped, []
                staged = self._unsealed()
            for old in dropped:
                discard(old.folder)
            if staged is None:
                if self._closing:
                    return
            elif self._seal(staged):
                waits = pauses()
            elif self._wait_for_close(next(waits)):
                return

    def _unsealed(self) -> _Staged | None:
        return next((staged for staged in self._queue if staged.manifest is None), None)

    def _seal(self, staged: _Staged) -> bool:
        try:
            manifest = seal(staged.folder, staged.draft, staged.write, self._journal.pending())
        except OSError as error:
            self._trouble = translate_os_error(error, str(staged.folder))
            get_logger().warning("checkpoint.write_failed", checkpoint=str(staged.draft.name), error=str(error))
            return False
        with self._changed:
            staged.manifest, staged.write = manifest, _nothing_left
            self._changed.notify_all()
        return True

    # The uploading thread.

    def _upload_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._queue and self._queue[0].manifest))
                if self._closing:
                    return
                staged = self._queue[0]
            if staged.manifest is not None and self._upload(staged, staged.manifest):
                with self._changed:
                    self._queue.remove(staged)
                    self._changed.notify_all()

    def _upload(self, staged: _Staged, manifest: CheckpointManifest) -> bool:
        """Commit one; False when the spool was closed before it could be."""
        log = get_logger()
        name = manifest.name
        log.info("checkpoint.uploading", checkpoint=str(name), step=name.step)
        for pause in pauses():
            try:
                self._journal.flush()
                commit(self._store, self._layout, manifest, staged.folder / FILES)
                break
            except (StorageError, OSError) as error:
                self._trouble = error if isinstance(error, StorageError) else translate_os_error(error, str(name))
                log.warning("checkpoint.upload_failed", checkpoint=str(name), error=str(error), next_try_seconds=pause)
                if self._wait_for_close(pause):
                    return False
        self._trouble = None
        size = sum(digest.size for digest in manifest.files.values())
        done = Commit(name, size, staged.blocking_seconds, time.monotonic() - staged.decided)
        log.info(
            "checkpoint.committed",
            checkpoint=str(name),
            step=name.step,
            size=size,
            seconds=round(done.seconds, 3),
            blocking_seconds=round(done.blocking_seconds, 4),
        )
        discard(staged.folder)
        self._on_commit(done)
        self._prune()
        return True

    def _prune(self) -> None:
        try:
            for name in prune(self._store, self._layout, keep=self._keep, damaged=self._damaged):
                get_logger().info("checkpoint.pruned", checkpoint=str(name))
        except StorageError as error:  # the next commit prunes again
            get_logger().warning("checkpoint.prune_failed", error=str(error))
