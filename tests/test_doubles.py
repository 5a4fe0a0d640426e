"""The stores that break do break, and only where they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from job.contract.errors import Unreachable
from job.contract.layout import Key
from job.storage import FileStore, Store
from tests.doubles import Death, DyingStore, FlakyStore


@pytest.fixture
def inner(tmp_path: Path) -> Store:
    return FileStore(tmp_path / "bucket")


def three_writes(store: Store, source: Path) -> None:
    store.put_new(Key("a"), b"new")
    store.put_file(Key("b"), source)
    store.delete(Key("a"))


def keys(store: Store) -> list[str]:
    return [info.key for info in store.list("")]


@pytest.mark.parametrize(
    ("die_at", "when", "left"),
    [
        *[(1, "before", []), (1, "after", ["a"]), (2, "before", ["a"]), (2, "after", ["a", "b"])],
        *[(3, "before", ["a", "b"]), (3, "after", ["b"]), (4, "before", ["b"]), (None, "before", ["b"])],
    ],
)
def test_a_dying_store_dies_at_its_nth_write(
    inner: Store, tmp_path: Path, die_at: int | None, when: Literal["before", "after"], left: list[str]
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    store = DyingStore(inner, die_at=die_at, when=when)
    if die_at in (1, 2, 3):
        with pytest.raises(Death):
            three_writes(store, source)
    else:
        three_writes(store, source)
    assert store.dead == (die_at in (1, 2, 3))
    assert store.writes == (die_at if store.dead else 3)
    assert keys(inner) == left


def every_call(store: Store, folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: store.put_new(Key("x"), b""),
        lambda: store.put_file(Key("x"), folder),
        lambda: store.delete(Key("x")),
        lambda: store.get(Key("x")),
        lambda: store.get_file(Key("x"), folder / "got"),
        lambda: store.list(""),
    ]


def test_the_dead_do_nothing_more(inner: Store, tmp_path: Path) -> None:
    store = DyingStore(inner, die_at=1)
    with pytest.raises(Death):
        store.put_new(Key("x"), b"")
    for call in every_call(store, tmp_path):
        with pytest.raises(Death):
            call()
    assert store.writes == 1


def test_a_flaky_store_is_out_of_reach_from_cut_to_mend(inner: Store, tmp_path: Path) -> None:
    store = FlakyStore(inner)
    store.put_new(Key("x"), b"here")
    store.cut()
    for call in every_call(store, tmp_path):
        with pytest.raises(Unreachable):
            call()
    store.mend()
    assert store.get(Key("x")) == b"here"
    assert keys(store) == ["x"]
