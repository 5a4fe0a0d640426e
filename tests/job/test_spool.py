"""Promise: the training never waits for the network, and what was sealed on this disk is not lost with the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.checkpoints import committed, restore
from job.contract.errors import Unreachable
from job.contract.layout import Key, RunLayout
from job.sealed import adopt
from job.spool import Commit, Spool
from job.storage import FileStore, Store
from tests.doubles import FlakyStore
from tests.job.kit import RUN, contents, draft, read_back, writer


class Lines:
    """A journal with one line to write."""

    def __init__(self, flush: Callable[[], None] = lambda: None) -> None:
        self._flush = flush

    def pending(self) -> tuple[Key, bytes]:
        return RUN.metrics_object(1, 7), b"a line\n"

    def flush(self) -> None:
        self._flush()


def spool(
    store: Store,
    folder: Path,
    *,
    attempt: int = 1,
    keep: int = 3,
    flush: Callable[[], None] = lambda: None,
    commits: list[Commit] | None = None,
) -> Spool:
    told = commits if commits is not None else []
    return Spool(store, RUN, folder, attempt=attempt, keep=keep, journal=Lines(flush), on_commit=told.append)


def steps(store: Store) -> list[int]:
    return [name.step for name in committed(store, RUN)]


def test_staging_returns_while_the_store_is_out_of_reach_and_all_is_committed_later(tmp_path: Path) -> None:
    inner = FileStore(tmp_path / "bucket")
    store = FlakyStore(inner)
    store.cut()
    commits: list[Commit] = []
    line = spool(store, tmp_path / "spool", commits=commits)
    started = time.monotonic()
    line.stage(draft(10), writer(10), blocking_seconds=0.25)
    assert time.monotonic() - started < 0.5
    assert not line.flush(0.2)
    assert line.waiting == 1
    store.mend()
    assert line.flush(10)
    line.close()
    assert steps(inner) == [10]
    assert [(c.name.step, c.blocking_seconds) for c in commits] == [(10, 0.25)]
    assert commits[0].seconds >= 0.25


def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    line = spool(store, tmp_path / "spool")
    refusals = iter([True, False])

    def write(folder: Path) -> None:
        writer(10)(folder)
        if next(refusals):
            raise OSError(28, "No space left on device")

    line.stage(draft(10), write, blocking_seconds=0)
    assert line.flush(10)
    line.close()
    restored = restore(store, RUN, tmp_path / "read")
    assert read_back(restored.folder) == contents(10)


def test_waiting_interval_checkpoints_give_way_to_newer_ones_and_epochs_do_not(tmp_path: Path) -> None:
    inner = FileStore(tmp_path / "bucket")
    store = FlakyStore(inner)
    store.cut()
    line = spool(store, tmp_path / "spool", keep=9)
    for step in (10, 20, 30, 40):
        line.stage(draft(step, reason="epoch" if step == 20 else "interval"), writer(step), blocking_seconds=0)
    store.mend()
    assert line.flush(10)
    line.close()
    assert steps(inner) == [40, 20, 10]


def test_while_the_disk_is_full_no_more_epochs_wait_in_memory_than_would_be_kept(tmp_path: Path) -> None:
    inner = FileStore(tmp_path / "bucket")
    full = threading.Event()
    full.set()

    def held(step: int) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            if full.is_set():
                raise OSError(28, "No space left on device")
            writer(step)(folder)

        return write

    line = spool(inner, tmp_path / "spool", keep=2)
    for step in range(10, 100, 10):
        line.stage(draft(step), held(step), blocking_seconds=0)
    assert line.waiting == 3  # the one that is being tried, and the newest two
    full.clear()
    assert line.flush(20)
    line.close()
    assert steps(inner) == [90, 80]


def test_the_journal_is_on_record_before_the_checkpoint_that_covers_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    seen: list[list[int]] = []
    failing = iter([True, False])

    def before() -> None:
        if next(failing):
            raise Unreachable("not yet")
        seen.append(steps(store))

    line = spool(store, tmp_path / "spool", flush=before)
    line.stage(draft(10), writer(10), blocking_seconds=0)
    assert line.flush(10)
    line.close()
    assert seen == [[]]
    assert steps(store) == [10]


def left_behind(tmp_path: Path) -> Path:
    """The folder of an attempt that sealed step 10 and ended before it could commit it."""
    store = FlakyStore(FileStore(tmp_path / "bucket"))
    store.cut()
    sealed = threading.Event()

    def before() -> None:
        sealed.set()
        raise Unreachable("the store went away")

    line = spool(store, tmp_path / "spool", flush=before)
    line.stage(draft(10), writer(10), blocking_seconds=0)
    assert sealed.wait(10)
    line.close()
    return tmp_path / "spool" / RUN.run_id / "a0001" / str(draft(10).name)


def test_the_next_attempt_adopts_what_a_dead_one_sealed(tmp_path: Path) -> None:
    left_behind(tmp_path)
    store = FileStore(tmp_path / "bucket")
    assert steps(store) == []
    assert [name.step for name in adopt(store, RUN, tmp_path / "spool")] == [10]
    restored = restore(store, RUN, tmp_path / "read")
    assert read_back(restored.folder) == contents(10)
    assert store.get(RUN.metrics_object(1, 7)) == b"a line\n"
    assert adopt(store, RUN, tmp_path / "spool") == []


def test_what_another_run_left_on_the_disk_stays_that_runs(tmp_path: Path) -> None:
    """A container's volume outlives the run that it was made for. Adopted, it would be lost to that run, and this one
    would be refused for ever: its newest checkpoint would be of another recipe."""
    left_behind(tmp_path)
    store, other = FileStore(tmp_path / "bucket"), RunLayout("other")
    assert adopt(store, other, tmp_path / "spool") == []
    assert restore(store, other, tmp_path / "read").manifest is None
    assert [name.step for name in adopt(store, RUN, tmp_path / "spool")] == [10]


def test_adoption_does_not_mind_a_journal_that_was_flushed_after_all(tmp_path: Path) -> None:
    left_behind(tmp_path)
    store = FileStore(tmp_path / "bucket")
    store.put_new(RUN.metrics_object(1, 7), b"a line\nand another\n")
    assert [name.step for name in adopt(store, RUN, tmp_path / "spool")] == [10]
    assert store.get(RUN.metrics_object(1, 7)) == b"a line\nand another\n"


def test_a_changed_or_unsealed_leftover_is_not_adopted(tmp_path: Path) -> None:
    staged = left_behind(tmp_path)
    (staged / "files" / "state.json").write_bytes(b"!!")
    unsealed = staged.with_name(str(draft(20).name)) / "files"
    unsealed.mkdir(parents=True)
    writer(20)(unsealed)
    store = FileStore(tmp_path / "bucket")
    assert adopt(store, RUN, tmp_path / "spool") == []
    assert steps(store) == []


def test_adoption_fails_whole_when_the_store_is_out_of_reach(tmp_path: Path) -> None:
    left_behind(tmp_path)
    inner = FileStore(tmp_path / "bucket")
    store = FlakyStore(inner)
    store.cut()
    with pytest.raises(Unreachable):
        adopt(store, RUN, tmp_path / "spool")
    store.mend()
    assert [name.step for name in adopt(store, RUN, tmp_path / "spool")] == [10]


def test_the_folder_of_a_living_attempt_is_left_alone(tmp_path: Path) -> None:
    inner = FileStore(tmp_path / "bucket")
    store = FlakyStore(inner)
    store.cut()
    line = spool(store, tmp_path / "spool")
    line.stage(draft(10), writer(10), blocking_seconds=0)
    assert adopt(inner, RUN, tmp_path / "spool") == []
    store.mend()
    assert line.flush(10)
    line.close()
    assert steps(inner) == [10]
