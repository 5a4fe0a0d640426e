"""Brings an adapter here, and holds every byte to its manifest."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

from job.contract.errors import BadInput, Damaged, FtjobError, NotFound
from job.contract.layout import RunLayout
from job.contract.records import AdapterManifest, FileDigest, Part
from job.storage import Progress, Store, check_key
from launch.home import from_home
from launch.runs import newest_adapter, read_run


class Fetched(Part):
    """An adapter on this machine."""

    run_id: str
    folder: str
    base_model: str
    base_revision: str | None
    complete: bool
    step: int
    held_out_loss: float | None
    files: dict[str, FileDigest]


def read_adapter(store: Store, run_id: str) -> AdapterManifest:
    """The manifest of a run's adapter: the final one, or the last that landed when its budget ended.

    Raises:
        RunUnknown: there is no such run.
        BadInput: the run has not published an adapter.
        Damaged: the manifest is unreadable, or names a file that could leave its folder.
    """
    manifest = newest_adapter(store, run_id)
    if manifest is None:
        read_run(store, run_id)
        raise BadInput(f"run {run_id} has no adapter yet", hint=f"see `ftjob status {run_id}`")
    for name in manifest.files:
        try:
            check_key(name)
        except ValueError as error:
            raise Damaged(f"adapter.json of run {run_id} names a file {name!r}, which is no plain name") from error
    return manifest


def fetch(store: Store, run_id: str, folder: Path, progress: Progress | None = None) -> Fetched:
    """Download the adapter of a run into a new or empty folder: all of it, verified, or nothing.

    Args:
        progress: called with the number of bytes that arrived.

    Raises:
        RunUnknown: there is no such run.
        BadInput: no adapter yet, or the folder has something in it.
        Damaged: a file is missing or not what the manifest says; names it.
        FtjobError: the folder cannot be written.
        StorageError: the bucket cannot be read.
    """
    target = from_home(str(folder)).absolute()
    manifest = read_adapter(store, run_id)
    base_model = read_run(store, run_id).recipe.base_model
    staged = target
    try:
        there = target.exists()
        if there and (not target.is_dir() or any(target.iterdir())):
            raise BadInput(
                f"{target} exists and is not an empty folder", hint=f"name another: ftjob fetch {run_id} DIR"
            )
        # A folder that is there stays the one it is: somebody may stand in it, it may be a mount, or a link.
        staged = (target if there else target.parent) / f".ftjob-{uuid.uuid4().hex}"
        staged.mkdir(parents=True)
        for name, digest in manifest.files.items():
            _bring(store, RunLayout(run_id), manifest.attempt, name, digest, staged / name, progress)
        if there:
            for path in staged.iterdir():
                path.replace(target / path.name)
        else:
            staged.replace(target)
    except OSError as error:
        raise FtjobError(f"cannot write {target}: {error.strerror or error}", hint="name another folder") from error
    finally:
        if staged != target:
            shutil.rmtree(staged, ignore_errors=True)
    return Fetched(
        run_id=run_id,
        folder=str(target),
        base_model=base_model.id,
        base_revision=base_model.revision,
        complete=manifest.complete,
        step=manifest.step,
        held_out_loss=manifest.held_out_loss,
        files=manifest.files,
    )


def _bring(
    store: Store, layout: RunLayout, attempt: int, name: str, digest: FileDigest, path: Path, progress: Progress | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    what = f"adapter file {name} of run {layout.run_id}"
    try:
        store.get_file(layout.adapter_file(attempt, name), path, progress)
    except NotFound as error:
        raise Damaged(f"{what} is missing", hint="restore it from a backup, or train the run again") from error
    size = path.stat().st_size
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if size != digest.size or found != digest.sha256:
        raise Damaged(
            f"{what} is damaged: {size} bytes with sha256 {found[:12]}…, "
            f"not {digest.size} bytes with {digest.sha256[:12]}…",
            hint="restore it from a backup, or train the run again",
        )
