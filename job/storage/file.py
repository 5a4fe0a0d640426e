"""file://: a folder as a store."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from job.contract.errors import AlreadyExists, NotFound
from job.contract.layout import Key, Uri
from job.storage.store import STAGING, ObjectInfo, Progress, check_key, check_prefix, translate_os_error

_COPY_CHUNK: Final = 1024 * 1024

_ABANDONED_SECONDS: Final = 3600.0
"""A staged file that nobody has written to for so long belongs to a process that was killed."""

_PLACE_TRIES: Final = 20
"""A delete may remove a folder, empty at that instant, between making it and using it; so often it is made again."""


class FileStore:
    """A folder. Objects are written aside, flushed to the disk, and moved into place by link(2) or rename(2).

    Two keys of which one is a folder of the other ("a", "a/b") cannot both be objects here.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self._lock = threading.Lock()
        self._swept = False

    @property
    def uri(self) -> Uri:
        return Uri(self._root.as_uri())

    def put_new(self, key: Key, data: bytes) -> None:
        target = self._path(key)
        with _translated(key), self._staged() as staged:
            with staged.open("wb") as file:
                file.write(data)
                _flush(file)
            try:
                # link(2) fails when the name exists, on every POSIX file system that has links: create-only, atomic.
                self._place(target, lambda: os.link(staged, target))
            except FileExistsError:
                if target.read_bytes() != data:
                    raise AlreadyExists(f"{self.uri}/{key} exists already") from None
            self._flush_folders(target)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        target = self._path(key)
        with _using(path):
            source = path.open("rb")
        with source, _translated(key), self._staged() as staged:
            _copy(source, staged, progress)
            self._place(target, lambda: staged.replace(target))
            self._flush_folders(target)

    def get(self, key: Key) -> bytes:
        with self._reading(key):
            return self._path(key).read_bytes()

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        with self._reading(key):
            source = self._path(key).open("rb")
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with source, _using(path):
            try:
                _copy(source, partial, progress)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        # Only the folder that the prefix names is walked, not the whole store.
        start = self._root / check_prefix(prefix).rpartition("/")[0]
        with _translated(prefix or self.uri):
            found = sorted(key for key in self._walk(start) if key.startswith(prefix) and key > after)
        for key in found:
            try:
                with self._reading(key):
                    stat = (self._root / key).stat()
            except NotFound:
                continue  # deleted since the walk
            yield ObjectInfo(Key(key), stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def delete(self, key: Key) -> None:
        path = self._path(key)
        with contextlib.suppress(NotFound), self._reading(key):
            path.unlink()
        # Empty folders are not objects; removing them keeps the bucket readable to people.
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def _path(self, key: Key) -> Path:
        return self._root / check_key(key)

    def _walk(self, start: Path) -> Iterator[str]:
        def stop(error: OSError) -> None:
            # A folder that is gone, or is an object, holds no keys. Any other failure must not look like emptiness.
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            if not gone or (isinstance(error, NotADirectoryError) and not self._is_usable()):
                raise error

        for folder, folders, files in os.walk(start, onerror=stop):
            if Path(folder) == self._root and STAGING in folders:
                folders.remove(STAGING)
            for name in files:
                key = (Path(folder) / name).relative_to(self._root).as_posix()
                with contextlib.suppress(ValueError):  # other people's files, under names that are no keys
                    yield str(check_key(key))

    def _is_usable(self) -> bool:
        return self._root.is_dir() or not self._root.exists()

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFound(f"{self.uri}/{key} does not exist") from error
        except NotADirectoryError as error:
            if self._is_usable():
                raise NotFound(f"{self.uri}/{key} does not exist") from error
            raise translate_os_error(error, key) from error
        except OSError as error:
            raise translate_os_error(error, key) from error

    # Writing: aside, onto the disk, into place, and the names onto the disk.

    @contextlib.contextmanager
    def _staged(self) -> Iterator[Path]:
        staging = self._root / STAGING
        if not staging.is_dir():
            _make_lasting(staging)
        self._sweep(staging)
        staged = staging / uuid.uuid4().hex
        try:
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def _sweep(self, staging: Path) -> None:
        # Killed writers leave gigabytes behind. Should one of them be only asleep, it finds its file gone when it
        # wakes up, gets Unreachable, and tries again: no object is harmed.
        with self._lock:
            if self._swept:
                return
            self._swept = True
        for path in staging.iterdir():
            with contextlib.suppress(OSError):  # swept by another, or not ours to sweep
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    def _place(self, target: Path, move: Callable[[], object]) -> None:
        for left in reversed(range(_PLACE_TRIES)):
            try:
                _make_folders(target.parent)
                move()
            except FileNotFoundError:
                if not left:
                    raise
            else:
                return

    def _flush_folders(self, target: Path) -> None:
        # A name survives a power cut only once its folder is on the disk, and so on up to the root: another thread
        # may have made one of them a moment ago and not have flushed it yet.
        for folder in target.parents:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, and the object with it
                _flush_folder(folder)
            if folder == self._root:
                break


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate_os_error(error, what) from error


@contextlib.contextmanager
def _using(path: Path) -> Iterator[None]:
    """Errors of the caller's own file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise translate_os_error(error, str(path)) from error


def _make_folders(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        # A folder that came or went while mkdir looked.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from error


def _make_lasting(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _flush_folder(place.parent)


def _copy(source: BinaryIO, target: Path, progress: Progress | None) -> None:
    with target.open("wb") as writer:
        while chunk := source.read(_COPY_CHUNK):
            writer.write(chunk)
            if progress is not None:
                progress(len(chunk))
        _flush(writer)


def _flush(file: BinaryIO) -> None:
    file.flush()  # Python's own buffer first: fsync knows nothing of it
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.EACCES:
            return  # one may write into a folder without being allowed to open it
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
