"""Promise: every checkpoint that exists restores, whoever dies when, whatever rots, whoever else writes."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from job.checkpoints import commit, committed, digest_folder, fetch, prune, restore
from job.contract.errors import Damaged
from job.contract.layout import CheckpointName, Key
from job.contract.records import CheckpointManifest
from job.storage import FileStore, ObjectInfo, Store, open_store
from tests.doubles import Death, DyingStore
from tests.harm import HARMS, cut_short, flip, remove
from tests.job.kit import RUN, contents, draft, read_back, writer


def put(store: Store, folder: Path, step: int, attempt: int = 1) -> CheckpointManifest:
    """Commit a checkpoint as an attempt does."""
    files = folder / f"{step}-{attempt}"
    if not files.exists():
        files.mkdir(parents=True)
        writer(step)(files)
    manifest = draft(step, attempt).model_copy(update={"files": digest_folder(files)})
    commit(store, RUN, manifest, files)
    return manifest


def assert_all_restore(store: Store, folder: Path) -> list[CheckpointName]:
    """Fetch every checkpoint that exists and compare it with what was saved under its name."""
    names = committed(store, RUN)
    for name in names:
        fetch(store, RUN, name, folder)
        assert read_back(folder) == contents(name.step)
    return names


def live(store: Store, folder: Path) -> None:
    """The writes of a life: four checkpoints, pruned to two after each."""
    for step in (10, 20, 30, 40):
        put(store, folder, step)
        prune(store, RUN, keep=2)


def count_writes(folder: Path) -> int:
    store = DyingStore(FileStore(folder / "bucket"), die_at=None)
    live(store, folder / "made")
    return store.writes


@pytest.mark.parametrize("when", ["before", "after"])
def test_dying_at_any_write_leaves_only_checkpoints_that_restore(
    tmp_path: Path, when: Literal["before", "after"]
) -> None:
    total = count_writes(tmp_path / "count")
    assert total > 20  # four commits of three files and a manifest, and the deletions of two
    for die_at in range(1, total + 1):
        here = tmp_path / f"{when}-{die_at}"
        inner = FileStore(here / "bucket")
        with pytest.raises(Death):
            live(DyingStore(inner, die_at=die_at, when=when), here / "made")
        before = assert_all_restore(inner, here / "read")
        live(inner, here / "made")  # the next life does the same again
        after = assert_all_restore(inner, here / "read")
        assert [name.step for name in after] == [40, 30]
        assert len(before) <= 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_committed_before_a_death_is_still_there(tmp_path: Path, when: Literal["before", "after"]) -> None:
    """Only the pruner takes checkpoints away, and it spares the newest two."""
    for die_at in range(1, count_writes(tmp_path / "count") + 1):
        here = tmp_path / f"{when}-{die_at}"
        inner = FileStore(here / "bucket")
        done: list[int] = []
        try:
            store = DyingStore(inner, die_at=die_at, when=when)
            for step in (10, 20, 30, 40):
                put(store, here / "made", step)
                done.append(step)
                prune(store, RUN, keep=2)
        except Death:
            pass
        left = {name.step for name in committed(inner, RUN)}
        assert set(done[-2:]) <= left


@pytest.mark.parametrize("file", [*contents(1), None])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, file: str | None, harm: Callable[[Path], None]
) -> None:
    store = FileStore(tmp_path / "bucket")
    put(store, tmp_path / "made", 10)
    newest = put(store, tmp_path / "made", 20)
    key = RUN.checkpoint_file(newest.name, file) if file else RUN.checkpoint_manifest(newest.name)
    path = tmp_path / "bucket" / key
    harm(path)
    restored = restore(store, RUN, tmp_path / "read")
    assert restored.manifest is not None
    if file is None and harm is flip and _still_reads(path, newest):
        assert restored.manifest.step == 20  # the flipped bit is in a text that nothing depends on
        return
    if file is None and harm is cut_short:
        assert restored.manifest.step == 20  # the last byte is the newline behind the JSON
        return
    assert restored.manifest.step == 10
    assert read_back(tmp_path / "read") == contents(10)
    if not (file is None and harm is remove):  # without its manifest it is not a checkpoint at all
        assert restored.damaged == {newest.name}
        with pytest.raises(Damaged, match=Path(key).name):
            fetch(store, RUN, newest.name, tmp_path / "read")


def _still_reads(path: Path, newest: CheckpointManifest) -> bool:
    try:
        return CheckpointManifest.from_bytes(path.read_bytes(), name="x").files == newest.files
    except Damaged:
        return False


def test_starting_over_in_silence_is_refused_when_nothing_restores(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    for step in (10, 20):
        manifest = put(store, tmp_path / "made", step)
        store.delete(RUN.checkpoint_file(manifest.name, "state.json"))
    with pytest.raises(Damaged, match=r"none of the 2 checkpoints .*step-00000020-a0001/state.json is missing"):
        restore(store, RUN, tmp_path / "read")


def test_no_checkpoint_at_all_is_a_beginning(tmp_path: Path) -> None:
    restored = restore(FileStore(tmp_path), RUN, tmp_path / "read")
    assert restored.manifest is None
    assert not restored.damaged


def test_a_manifest_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    manifest = put(store, tmp_path / "made", 10)
    digest = manifest.files["state.json"]
    evil = manifest.model_copy(update={"step": 20, "files": {"../../escaped": digest}})
    store.put_new(RUN.checkpoint_manifest(evil.name), evil.to_bytes())
    restored = restore(store, RUN, tmp_path / "read" / "deep")
    assert restored.manifest == manifest
    assert restored.damaged == {evil.name}
    assert not (tmp_path / "escaped").exists()


def test_the_pruner_never_takes_the_last_two_sound_checkpoints(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    manifests = [put(store, tmp_path / "made", step) for step in (10, 20, 30, 40, 50)]
    damaged = {manifests[3].name, manifests[4].name}
    prune(store, RUN, keep=2, damaged=damaged)
    left = {name.step for name in committed(store, RUN)}
    assert left == {20, 30, 40, 50}
    for manifest in manifests[3:]:
        store.delete(RUN.checkpoint_file(manifest.name, "state.json"))
    restored = restore(store, RUN, tmp_path / "read")
    assert restored.manifest == manifests[2]


def test_the_pruner_leaves_nothing_of_what_it_forgets(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    for step in (10, 20, 30):
        put(store, tmp_path / "made", step)
    assert [name.step for name in prune(store, RUN, keep=2)] == [10]
    assert not [info.key for info in store.list(RUN.checkpoint_files(CheckpointName(10, 1)))]


class PrunedMeanwhile:
    """Passes everything on; at its first reading of a manifest, another attempt commits and prunes."""

    def __init__(self, inner: Store, made: Path) -> None:
        self._inner = inner
        self._made = made
        self._calm = True

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def get(self, key: Key) -> bytes:
        if self._calm:
            self._calm = False
            for step in (40, 50):
                put(self._inner, self._made, step, attempt=2)
            prune(self._inner, RUN, keep=2)
        return self._inner.get(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        return self._inner.list(prefix, after=after)


def test_a_checkpoint_pruned_while_it_is_read_is_no_damage(tmp_path: Path) -> None:
    inner = FileStore(tmp_path / "bucket")
    put(inner, tmp_path / "made", 30)
    store = PrunedMeanwhile(inner, tmp_path / "made")
    restored = restore(store, RUN, tmp_path / "read")  # type: ignore[arg-type]
    assert restored.manifest is not None
    assert restored.manifest.step == 50
    assert not restored.damaged


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_two_overlapping_attempts_tear_nothing(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """An old attempt still writes while the new one runs: both commit and prune, in any order."""
    uri = (tmp_path / "bucket").as_uri() if kind == "file" else request.getfixturevalue("s3_uri")
    dice = random.Random(5)
    failures: list[BaseException] = []
    rounds = 8

    def attempt(number: int) -> None:
        try:
            store = open_store(uri)
            for step in range(10, 10 * rounds + 1, 10):
                put(store, tmp_path / f"made-{number}", step, attempt=number)
                prune(store, RUN, keep=2)
                restored = restore(store, RUN, tmp_path / f"read-{number}")
                assert restored.manifest is not None
                assert restored.manifest.step >= step
                assert not restored.damaged
                assert read_back(tmp_path / f"read-{number}") == contents(restored.manifest.step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in (1, 2)]
    dice.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    names = assert_all_restore(open_store(uri), tmp_path / "read")
    assert names[0].step == 10 * rounds


def test_names_sort_by_step_then_attempt() -> None:
    names = [CheckpointName(step, attempt) for step, attempt in itertools.product((9, 10, 100), (1, 2, 10))]
    assert sorted(names) == sorted(names, key=str)
