"""What happens to files that nobody touched: a bit turns, the end is lost, the whole file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final


def flip(path: Path) -> None:
    """One bit in the middle of it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.resolve().write_bytes(data)


def cut_short(path: Path) -> None:
    """Its last byte."""
    path.resolve().write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    """All of it."""
    path.unlink()


HARMS: Final[tuple[Callable[[Path], None], ...]] = (flip, cut_short, remove)
