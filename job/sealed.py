"""A checkpoint on the local disk: sealed by a manifest beside its files, or nothing.

<spool>/<run>/a0001/step-00000400-a0001/files/...       what will be uploaded
<spool>/<run>/a0001/step-00000400-a0001/journal/...     the metric lines that are not in the bucket yet
<spool>/<run>/a0001/step-00000400-a0001/manifest.json   the seal, written last
<spool>/<run>/a0001/.alive                              locked as long as the attempt lives

Runs may share a disk: the volume of a container outlives the run that it was made for.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final

from job.checkpoints import commit, digest_file, digest_folder
from job.contract.errors import AlreadyExists, Damaged
from job.contract.layout import CheckpointName, Key, RunLayout
from job.contract.records import CheckpointManifest
from job.logs import get_logger
from job.storage import Store

FILES: Final = "files"
_MANIFEST: Final = "manifest.json"
_JOURNAL: Final = "journal"


def spool_of(folder: Path, layout: RunLayout) -> Path:
    """Where a run's attempts have their folders. Another run's checkpoints are never this one's."""
    return folder / layout.run_id


def seal(
    folder: Path, draft: CheckpointManifest, write: Callable[[Path], None], unflushed: tuple[Key, bytes]
) -> CheckpointManifest:
    """Write a checkpoint's files, then the manifest beside them.

    Args:
        draft: the manifest, its `files` still empty.
        write: writes the files into the empty folder it is given.
        unflushed: key and bytes of the journal's next object, which the checkpoint covers.

    Raises:
        OSError: nothing is sealed then, and it may be repeated.
    """
    shutil.rmtree(folder, ignore_errors=True)
    files = folder / FILES
    files.mkdir(parents=True)
    write(files)
    key, lines = unflushed
    (folder / _JOURNAL).mkdir()
    (folder / _JOURNAL / PurePosixPath(key).name).write_bytes(lines)
    manifest = draft.model_copy(update={"files": digest_folder(files)})
    partial = folder / f".{_MANIFEST}"
    partial.write_bytes(manifest.to_bytes())
    partial.replace(folder / _MANIFEST)
    return manifest


def sealed(folder: Path) -> CheckpointManifest | None:
    """The manifest of a staged checkpoint whose files are all there and unchanged; None for anything else."""
    try:
        manifest = CheckpointManifest.from_bytes((folder / _MANIFEST).read_bytes(), name=folder.name)
        whole = all(digest_file(folder / FILES / file) == digest for file, digest in manifest.files.items())
    except (OSError, Damaged):
        return None
    return manifest if whole else None


def discard(folder: Path) -> None:
    """Remove a staged checkpoint: its seal first, so that dying halfway leaves nothing that looks whole."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def adopt(store: Store, layout: RunLayout, folder: Path) -> list[CheckpointName]:
    """Commit what dead attempts of the run left in the spool, oldest first; returns what was committed.

    Only sealed checkpoints whose bytes still match their manifest are adopted; the rest is removed. The folder of an
    attempt that is still alive is left alone: it holds a lock, which its death releases.

    Raises:
        StorageError: the store is out of reach; everything stays where it is.
    """
    adopted: list[CheckpointName] = []
    for owner in sorted(spool_of(folder, layout).glob("a[0-9]*")):
        try:
            lock = AliveLock(owner)
        except BlockingIOError:
            get_logger().warning("spool.attempt_still_alive", folder=owner.name)
            continue
        with lock:
            for staged in sorted(path for path in owner.iterdir() if path.is_dir()):
                manifest = sealed(staged)
                if manifest is not None:
                    _adopt_journal(store, layout, staged / _JOURNAL)
                    commit(store, layout, manifest, staged / FILES)
                    get_logger().info("checkpoint.adopted", checkpoint=str(manifest.name), step=manifest.step)
                    adopted.append(manifest.name)
                discard(staged)
        shutil.rmtree(owner, ignore_errors=True)
    return adopted


def _adopt_journal(store: Store, layout: RunLayout, folder: Path) -> None:
    for file in folder.iterdir():
        position = layout.metrics_position(f"{layout.metrics}{file.name}")
        if position is None:
            continue
        attempt, sequence = position
        lines = file.read_bytes()
        while lines:
            key = layout.metrics_object(attempt, sequence)
            try:
                store.put_new(key, lines)
                break
            except AlreadyExists:
                found = store.get(key)
            # The dead attempt did flush: all of these lines and more, or only the first of them when it never heard
            # that it had.
            if not lines.startswith(found):
                break
            lines, sequence = lines[len(found) :], sequence + 1


class AliveLock:
    """An flock(2) on an attempt's folder; the kernel releases it, whatever kills the process.

    Raises:
        BlockingIOError: the attempt lives.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / ".alive").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AliveLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
