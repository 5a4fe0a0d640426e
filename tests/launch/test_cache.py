"""Promise: what is kept so as not to be computed twice does not fill a person's disk."""

from __future__ import annotations

import os
from pathlib import Path

from launch.cache import keep_newest, use


def entry(folder: Path, name: str, *, age: int, size: int = 10) -> Path:
    path = folder / name
    path.write_bytes(b"x" * size)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_of_too_many_entries_those_that_were_not_used_for_longest_go(tmp_path: Path) -> None:
    entries = [entry(tmp_path, str(age), age=age) for age in range(6)]
    use(entries[5])
    keep_newest(tmp_path, entries=3)
    assert names(tmp_path) == {"5", "0", "1"}


def test_entries_may_not_be_too_large_together_and_folders_count_whole(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"x" * 60)
    for age in (1, 3):
        entry(tmp_path, str(age), age=age, size=30)
    os.utime(tmp_path / "model", (1_000_000 - 2, 1_000_000 - 2))
    keep_newest(tmp_path, size=90)
    assert names(tmp_path) == {"1", "model"}
    keep_newest(tmp_path, size=89)
    assert names(tmp_path) == {"1"}
    keep_newest(tmp_path, size=1)
    assert names(tmp_path) == {"1"}  # the one that was just made


def test_a_folder_that_is_not_there_is_small_enough(tmp_path: Path) -> None:
    keep_newest(tmp_path / "nothing")
    use(tmp_path / "nothing" / "either")
