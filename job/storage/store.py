"""What every store is, and what the stores share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from job.contract.errors import AccessRefused, StorageError, Unreachable
from job.contract.layout import Key, Uri, is_key

STAGING: Final = ".ftjob-staging"
"""Where a folder keeps what is still being written. No key begins with it, in any store."""

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call; from any thread, never from two at once.

The counts sum up to the size. One may be negative: a part that has to be sent again is taken back first.
"""


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing. `size` in bytes, `modified` in UTC by the store's clock."""

    key: Key
    size: int
    modified: datetime


class Store(Protocol):
    """Objects under keys. Safe to use from several threads."""

    @property
    def uri(self) -> Uri:
        """Where it is, as people write it."""
        ...

    def put_new(self, key: Key, data: bytes) -> None:
        """Create an object. Raises AlreadyExists if the key holds other bytes."""
        ...

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        """Write a file's bytes under a key that nobody else writes."""
        ...

    def get(self, key: Key) -> bytes:
        """An object's bytes. Raises NotFound."""
        ...

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        """Write an object's bytes to a file (whole or not at all). Raises NotFound."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose key starts with `prefix` and sorts behind `after`, by key."""
        ...

    def delete(self, key: Key) -> None:
        """Remove an object, if it is there."""
        ...


def check_key(key: str) -> PurePosixPath:
    """The key as a relative path. Raises ValueError where it is none or could leave its store."""
    if not is_key(key) or key.partition("/")[0] == STAGING:
        raise ValueError(f"{key!r} is not a key")
    return PurePosixPath(key)


def check_prefix(prefix: str) -> str:
    """The beginning of a key, which may be empty. Raises ValueError where no key begins so."""
    folder, _, _ = prefix.rpartition("/")
    if folder or prefix.startswith("/"):
        check_key(folder)
    return prefix


def translate_os_error(error: OSError, what: str) -> StorageError:
    """What the operating system said about a file, as an error of ours; `what` is the key or the file."""
    text = f"{what}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Unreachable(f"no space left for {text}", hint="free some space there")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessRefused(f"not allowed to use {text}", hint="check the folder's owner and permissions")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return AccessRefused(f"cannot use {text}", hint="choose another folder")
    return Unreachable(text)
