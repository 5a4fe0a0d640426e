"""The dataset's bytes: brought to this machine, and held to the digest that the launcher recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.contract.errors import DatasetInvalid, IdentityMismatch, NotFound
from job.contract.records import DatasetDigest
from job.storage import Progress, open_object


def fetch_dataset(
    expected: DatasetDigest, folder: Path, progress: Progress | None = None, *, mounted: Path | None = None
) -> Path:
    """A local file with the dataset's bytes; files on this machine are used where they are.

    Args:
        folder: for a copy, where there has to be one.
        mounted: where the backend was asked to put the file. Not there, or with other bytes, it is fetched after all.

    Raises:
        DatasetInvalid: it is gone.
        IdentityMismatch: its bytes are not those of the launch.
        StorageError: the store is out of reach, or refuses.
    """
    path = local_path(expected.uri)
    if path is None:
        if mounted is not None and mounted.is_file() and sha256_of(mounted, expected.uri) == expected.sha256:
            return mounted
        store, key = open_object(expected.uri)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{expected.sha256}.jsonl"
        if path.exists() and sha256_of(path, expected.uri) == expected.sha256:
            return path
        try:
            store.get_file(key, path, progress)
        except NotFound as error:
            raise DatasetInvalid(f"dataset {expected.uri} does not exist any more") from error
    found = sha256_of(path, expected.uri)
    if found != expected.sha256:
        raise IdentityMismatch(
            f"the dataset {expected.uri} changed after the launch: sha256 {found[:12]}… instead of "
            f"{expected.sha256[:12]}…",
            hint="put the file back as it was to go on, or start a new run",
        )
    return path


def sha256_of(path: Path, uri: str) -> str:
    """The digest of a dataset's file. Raises DatasetInvalid: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetInvalid(f"dataset {uri} cannot be read: {error.strerror or error}") from error


def local_path(uri: str) -> Path | None:
    """The path of a file:// uri; None for other stores."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None
