"""Stores that break. They stand in front of a real store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from job.contract.errors import Unreachable
from job.contract.layout import Key, Uri
from job.storage import ObjectInfo, Progress, Store


class Death(BaseException):
    """The process ends here, as by SIGKILL: not an Exception, so that nothing handles it."""


class DyingStore:
    """Raises Death at its n-th write (put_new, put_file or delete, from 1), before or after it; then at every call."""

    def __init__(self, inner: Store, *, die_at: int | None, when: Literal["before", "after"] = "before") -> None:
        self._inner = inner
        self._die_at = die_at
        self._when = when
        self._lock = threading.Lock()
        self.writes = 0
        self.dead = False

    @property
    def uri(self) -> Uri:
        return self._inner.uri

    def put_new(self, key: Key, data: bytes) -> None:
        last = self._begin()
        self._inner.put_new(key, data)
        self._end(last)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        last = self._begin()
        self._inner.put_file(key, path, progress)
        self._end(last)

    def delete(self, key: Key) -> None:
        last = self._begin()
        self._inner.delete(key)
        self._end(last)

    def get(self, key: Key) -> bytes:
        self._live()
        return self._inner.get(key)

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._live()
        self._inner.get_file(key, path, progress)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        self._live()
        return self._inner.list(prefix, after=after)

    def _live(self) -> None:
        if self.dead:
            raise Death("after its death")

    def _begin(self) -> bool:
        """Whether this is the last write."""
        with self._lock:
            self._live()
            self.writes += 1
            last = self.writes == self._die_at
            if last:
                self.dead = True
        if last and self._when == "before":
            raise Death(f"before write {self.writes}")
        return last

    def _end(self, last: bool) -> None:
        if last:
            raise Death(f"after write {self._die_at}")


class FlakyStore:
    """Every call raises Unreachable from `cut` until `mend`."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._is_cut = threading.Event()

    def cut(self) -> None:
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    @property
    def uri(self) -> Uri:
        return self._inner.uri

    def put_new(self, key: Key, data: bytes) -> None:
        self._reach(key)
        self._inner.put_new(key, data)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._reach(key)
        self._inner.put_file(key, path, progress)

    def delete(self, key: Key) -> None:
        self._reach(key)
        self._inner.delete(key)

    def get(self, key: Key) -> bytes:
        self._reach(key)
        return self._inner.get(key)

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._reach(key)
        self._inner.get_file(key, path, progress)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        self._reach(prefix)
        return self._inner.list(prefix, after=after)

    def _reach(self, key: str) -> None:
        if self._is_cut.is_set():
            raise Unreachable(f"{self.uri}/{key} is out of reach: cut")
