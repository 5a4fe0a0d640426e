"""Keeps a folder of what need not be computed twice small: what was not used for longest goes first."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

ENTRIES: Final = 100
BYTES: Final = 500_000_000


def use(path: Path) -> None:
    """Note that an entry was used now."""
    with suppress(OSError):  # one of a disk that is read-only
        os.utime(path)


def keep_newest(folder: Path, *, entries: int = ENTRIES, size: int = BYTES) -> None:
    """Remove what is too much: files and folders beyond so many, or beyond so many bytes in all. The newest one stays.

    What cannot be removed stays, too, as does what another launcher removes at the same time.
    """
    with suppress(OSError):  # there is no such folder
        newest_first = sorted(((_time_of(path), path) for path in folder.iterdir()), reverse=True)
        total = 0
        for place, (_, path) in enumerate(newest_first):
            total += _size_of(path)
            if place and (place >= entries or total > size):
                _remove(path)


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just gone
        return 0.0


def _size_of(path: Path) -> int:
    try:
        return sum(_size_of(inner) for inner in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
