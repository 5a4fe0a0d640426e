"""The checkpoint protocol: commit, committed, restore, prune. Files and bytes; what is in them is not known here.

commit   files first, each under a key of its own, then the manifest, create-only. Its existence is the commit:
         whoever dies before it leaves nothing that a reader sees.
restore  newest first; every file is verified against the manifest; a damaged checkpoint is reported and the one
         before it is used.
prune    forgets the manifest first and deletes data second, so that dying in between leaves nothing torn. Spares the
         newest `keep`, counted without those known to be damaged.

Every checkpoint stands alone: no file of it lies in another one, so pruning one can never hurt another. The name holds
step and attempt, so two overlapping attempts never write the same key.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from job.contract.errors import Damaged, NotFound
from job.contract.layout import CheckpointName, Key, RunLayout
from job.contract.records import CheckpointManifest, FileDigest
from job.logs import get_logger
from job.storage import Store, check_key

_CHUNK = 1024 * 1024


def digest_file(path: Path) -> FileDigest:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileDigest(size=path.stat().st_size, sha256=digest.hexdigest())


def digest_folder(folder: Path) -> dict[str, FileDigest]:
    """Digests of all files in a folder, by relative path, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def commit(store: Store, layout: RunLayout, manifest: CheckpointManifest, folder: Path) -> None:
    """Upload the files of a manifest from a folder, then the manifest. When this returns, the checkpoint exists.

    May be repeated after a failure, or by another process that has the same bytes.
    """
    name = manifest.name
    for file in manifest.files:
        store.put_file(layout.checkpoint_file(name, file), folder / file)
    store.put_new(layout.checkpoint_manifest(name), manifest.to_bytes())


def committed(store: Store, layout: RunLayout) -> list[CheckpointName]:
    """The checkpoints that exist, newest first. Readers and the pruner ask here and nowhere else."""
    names = (layout.committed_checkpoint(info.key) for info in store.list(layout.checkpoints))
    return sorted((name for name in names if name is not None), reverse=True)


@dataclass(frozen=True)
class Restored:
    """What a restore found: a verified folder, and the checkpoints that were too damaged to use."""

    manifest: CheckpointManifest | None
    folder: Path
    damaged: frozenset[CheckpointName] = field(default_factory=frozenset)


def restore(store: Store, layout: RunLayout, folder: Path) -> Restored:
    """Bring the newest usable checkpoint into a folder (emptied first). manifest is None when there is none at all.

    Raises:
        Damaged: checkpoints exist, and not one of them is usable. Starting over would throw work away in silence.
    """
    damaged: dict[CheckpointName, str] = {}
    while True:
        # Listed anew each time: a pruner may have removed the one just tried, having committed newer ones.
        candidates = [name for name in committed(store, layout) if name not in damaged]
        if not candidates:
            break
        name = candidates[0]
        try:
            manifest = fetch(store, layout, name, folder)
        except Damaged as error:
            if name in committed(store, layout):
                damaged[name] = error.message
                get_logger().error("checkpoint.damaged", checkpoint=str(name), error=error.message)
            continue
        return Restored(manifest, folder, frozenset(damaged))
    if damaged:
        first = next(iter(damaged.values()))
        raise Damaged(
            f"none of the {len(damaged)} checkpoints of run {layout.run_id} can be used; the newest: {first}",
            hint="nothing was overwritten; start a new run, or restore the files from a copy of the bucket",
        )
    return Restored(None, folder)


def fetch(store: Store, layout: RunLayout, name: CheckpointName, folder: Path) -> CheckpointManifest:
    """Bring one checkpoint into a folder (emptied first) and verify every file.

    Raises:
        Damaged: the manifest is unreadable, or a file is missing or not what the manifest says; names the file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key = layout.checkpoint_manifest(name)
    try:
        manifest = CheckpointManifest.from_bytes(store.get(key), name=key)
    except NotFound as error:
        raise Damaged(f"checkpoint {name} vanished while it was read") from error
    if manifest.name != name:
        raise Damaged(f"manifest {key} speaks of checkpoint {manifest.name}")
    for file, digest in manifest.files.items():
        fetch_verified(store, layout.checkpoint_file(name, file), folder / relative(file), digest)
    return manifest


def fetch_verified(store: Store, key: Key, path: Path, expected: FileDigest) -> None:
    """Bring one object into a file and compare it with its digest.

    Raises:
        Damaged: it is missing, or differs; names the key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.get_file(key, path)
    except NotFound as error:
        raise Damaged(f"{key} is missing") from error
    found = digest_file(path)
    if found.size != expected.size:
        raise Damaged(f"{key} has {found.size} bytes instead of {expected.size}")
    if found.sha256 != expected.sha256:
        raise Damaged(f"{key} has changed: sha256 {found.sha256} instead of {expected.sha256}")


def relative(file: str) -> PurePosixPath:
    """A manifest's file name as a path that stays inside its folder.

    Raises:
        Damaged: it would leave the folder.
    """
    try:
        return check_key(file)
    except ValueError as error:
        raise Damaged(f"a manifest names the file {file!r}") from error


def prune(
    store: Store, layout: RunLayout, *, keep: int, damaged: Collection[CheckpointName] = ()
) -> list[CheckpointName]:
    """Delete all but the newest `keep` (at least 2) checkpoints; returns those deleted.

    Damaged ones do not count as kept: were the newest two damaged, the one that restores would go.
    """
    names = committed(store, layout)
    sound = [name for name in names if name not in damaged]
    spared = set(sound[: max(keep, 2)])
    # Nothing newer than the oldest spared one is touched: a damaged checkpoint there may be evidence of a sick disk.
    oldest = min(spared, default=None)
    doomed = [name for name in names if oldest is not None and name < oldest]
    for name in doomed:
        forget(store, layout, name)
    return doomed


def forget(store: Store, layout: RunLayout, name: CheckpointName) -> None:
    """Delete one checkpoint: the manifest first, the data second."""
    store.delete(layout.checkpoint_manifest(name))
    for info in list(store.list(layout.checkpoint_files(name))):
        store.delete(info.key)
