"""Promise: every line reaches the bucket once, in order; silence is never longer than a heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from job.contract.errors import AlreadyExists, Unreachable
from job.contract.layout import Key
from job.contract.metrics import Heartbeat, MetricLine, Step, dump_lines, parse_lines
from job.journal import Journal
from job.sealed import adopt, spool_of
from job.storage import FileStore, Store
from tests.contract.examples import step
from tests.doubles import FlakyStore
from tests.job.kit import RUN, draft

NEVER = 3600.0
PATIENCE = 30.0


class Watched(FlakyStore):
    """Lets a test wait for what is written."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._changed = threading.Condition()
        self.puts: list[tuple[Key, bytes]] = []
        self.refused = 0
        self.before_put: Callable[[], None] = lambda: None
        self.answers_get_lost = False

    def put_new(self, key: Key, data: bytes) -> None:
        self.before_put()
        try:
            super().put_new(key, data)
        except Unreachable:
            with self._changed:
                self.refused += 1
                self._changed.notify_all()
            raise
        with self._changed:
            self.puts.append((key, data))
            self._changed.notify_all()
        if self.answers_get_lost:
            raise Unreachable("written, but the answer was lost")

    def wait(self, enough: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(enough, timeout=PATIENCE)


@pytest.fixture
def store(tmp_path: Path) -> Watched:
    return Watched(FileStore(tmp_path / "bucket"))


def journal(store: Store, seconds: float = NEVER, attempt: int = 3) -> Journal:
    # With a clock that stands still a line is what it was when it was written.
    return Journal(store, RUN, attempt=attempt, heartbeat_seconds=seconds, clock=lambda: 7.0)


def objects(store: Store, attempt: int = 3) -> list[list[MetricLine]]:
    """The lines of each object, in the order of the keys, which must be without a gap."""
    keys = [info.key for info in store.list(RUN.metrics)]
    assert keys == [RUN.metrics_object(attempt, number) for number in range(len(keys))]
    return [parse_lines(store.get(key), name=key) for key in keys]


def steps(store: Store) -> list[int]:
    return [line.step for lines in objects(store) for line in lines if isinstance(line, Step)]


def test_each_flush_is_one_object_of_the_lines_since_the_last(store: Watched) -> None:
    book = journal(store)
    for numbers in ((1, 2), (3,), (4, 5, 6)):
        for number in numbers:
            book.write(step(number))
        book.flush()
    assert objects(store) == [[step(1), step(2)], [step(3)], [step(4), step(5), step(6)]]


def test_with_nothing_to_say_a_flush_writes_nothing(store: Watched) -> None:
    book = journal(store)
    book.flush()
    book.write(step(1))
    book.flush()
    book.flush()
    assert len(store.puts) == 1


def test_lines_survive_a_store_out_of_reach_and_arrive_in_order_afterwards(store: Watched) -> None:
    book = journal(store)
    book.write(step(1))
    book.flush()
    store.cut()
    for number in (2, 3, 4):
        book.write(step(number))
        with pytest.raises(Unreachable):
            book.flush()
    store.mend()
    book.write(step(5))
    book.flush()
    assert objects(store) == [[step(1)], [step(2), step(3), step(4), step(5)]]


def test_a_lost_answer_neither_doubles_lines_nor_stops_the_journal(store: Watched) -> None:
    """The object is there, and by the next try there are more lines than it holds."""
    book = journal(store)
    store.answers_get_lost = True
    book.write(step(1))
    with pytest.raises(Unreachable):
        book.flush()
    store.answers_get_lost = False
    book.write(step(2))
    book.flush()
    book.write(step(3))
    book.flush()
    assert objects(store) == [[step(1)], [step(2)], [step(3)]]


def test_a_lost_answer_with_nothing_new_since_is_repeated_without_harm(store: Watched) -> None:
    book = journal(store)
    store.answers_get_lost = True
    book.write(step(1))
    with pytest.raises(Unreachable):
        book.flush()
    store.answers_get_lost = False
    book.flush()
    assert objects(store) == [[step(1)]]


@pytest.mark.parametrize("there", [b"", b"not ours\n", dump_lines([step(9)])])
def test_an_object_of_somebody_else_is_not_taken_for_ones_own(store: Watched, there: bytes) -> None:
    store.put_new(RUN.metrics_object(3, 0), there)
    book = journal(store)
    book.write(step(1))
    book.write(step(2))
    with pytest.raises(AlreadyExists):
        book.flush()
    assert store.get(RUN.metrics_object(3, 0)) == there
    assert book.pending()[1] == dump_lines([step(1), step(2)])


def test_pending_names_what_the_next_flush_writes(store: Watched) -> None:
    book = journal(store)
    assert book.pending() == (RUN.metrics_object(3, 0), b"")
    for numbers in ((1, 2), (3,)):
        for number in numbers:
            book.write(step(number))
        said = book.pending()
        assert book.pending() == said
        book.flush()
        assert store.puts[-1] == said


def test_pending_does_not_wait_for_a_flush_that_hangs(store: Watched) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        assert go_on.wait(PATIENCE)

    store.before_put = hang
    book = journal(store)
    book.write(step(1))
    flushing = threading.Thread(target=book.flush)
    flushing.start()
    try:
        assert hanging.wait(PATIENCE)
        book.write(step(2))  # nor does a line
        assert book.pending() == (RUN.metrics_object(3, 0), dump_lines([step(1), step(2)]))
    finally:
        go_on.set()
        flushing.join(PATIENCE)
    assert book.pending() == (RUN.metrics_object(3, 1), dump_lines([step(2)]))


def test_what_was_pending_at_a_death_is_adopted_around_what_had_been_written(store: Watched, tmp_path: Path) -> None:
    """Sealed beside a checkpoint while the journal's own writing had come to any point."""
    lines = [step(number) for number in range(1, 7)]
    for case, written in enumerate(([], [lines[:2]], [lines[:2], lines[2:5]], [lines[:4]], [lines[:2], lines[2:]])):
        bucket = FileStore(tmp_path / f"bucket{case}")
        for number, part in enumerate(written):
            bucket.put_new(RUN.metrics_object(3, number), dump_lines(list(part)))
        sealed = spool_of(tmp_path / f"spool{case}", RUN) / "a0003" / "step-00000004-a0003"
        (sealed / "journal").mkdir(parents=True)
        (sealed / "files").mkdir()
        (sealed / "journal" / "a0003-000000.jsonl").write_bytes(dump_lines(list(lines[:4])))
        (sealed / "manifest.json").write_bytes(draft(4, attempt=3).to_bytes())
        assert len(adopt(bucket, RUN, tmp_path / f"spool{case}")) == 1
        found = steps(bucket)
        assert found == list(range(1, len(found) + 1))
        assert len(found) == max(4, sum(len(part) for part in written))


def test_silence_is_broken_by_heartbeats_that_say_the_phase(store: Watched) -> None:
    with journal(store, 0.05) as book:
        book.phase("training")
        store.wait(lambda: len(store.puts) >= 5)
    lines = [line for found in objects(store) for line in found]
    assert all(isinstance(line, Heartbeat) and line.phase == "training" for line in lines)
    assert len(lines) >= 5
    gaps = [(b.at - a.at).total_seconds() for a, b in pairwise(lines)]
    assert min(gaps[1:]) > 0.02  # the first may follow the phase at once
    assert sorted(gaps)[len(gaps) // 2] < 5  # a busy machine is late, not silent


def test_an_object_ends_with_the_moment_at_which_it_was_written_however_old_its_lines(store: Watched) -> None:
    """What a killed attempt cost is counted from its last line on."""
    ticks = count()
    with Journal(store, RUN, attempt=3, heartbeat_seconds=0.05, clock=lambda: float(next(ticks))) as book:
        book.write(step(1))
        store.wait(lambda: bool(steps(store)))
    written = next(lines for lines in objects(store) if any(isinstance(line, Step) for line in lines))
    assert isinstance(written[-1], Heartbeat)
    assert written[-1].elapsed > written[-2].elapsed


def test_lines_of_the_moment_need_no_heartbeat_beside_them(store: Watched) -> None:
    with journal(store, 0.05) as book:
        book.write(step(1))
        store.wait(lambda: bool(store.puts))
    assert objects(store)[0] == [step(1)]


def test_a_phase_is_in_the_bucket_at_once(store: Watched) -> None:
    with journal(store, NEVER) as book:
        for number, name in enumerate(("loading the model", "training"), start=1):
            book.phase(name)
            store.wait(lambda number=number: len(store.puts) >= number)  # type: ignore[misc]
    phases = [line.phase for lines in objects(store) for line in lines if isinstance(line, Heartbeat)]
    assert phases == ["loading the model", "training"]


def test_the_writer_outlives_an_outage_and_says_for_how_long_it_was(store: Watched) -> None:
    store.cut()
    with capture_logs() as logs, journal(store, 0.02) as book:
        book.write(step(1))
        store.wait(lambda: store.refused >= 3)
        book.write(step(2))
        store.mend()
        store.wait(lambda: bool(store.puts))
    assert steps(store) == [1, 2]
    silent = [line["silent_seconds"] for line in logs if line["event"] == "journal.unreachable"]
    assert len(silent) >= 3
    assert silent == sorted(silent)


def test_leaving_ends_the_writer_soon(store: Watched) -> None:
    with journal(store, NEVER) as book:
        writer = next(thread for thread in threading.enumerate() if thread.name == "journal")
        book.write(step(1))
        began = time.monotonic()
    writer.join(PATIENCE)
    assert not writer.is_alive()
    assert time.monotonic() - began < PATIENCE
    assert store.puts == []  # the end of an attempt flushes for itself, and hears of a failure


def test_writers_in_many_threads_lose_nothing_and_keep_their_own_order(store: Watched) -> None:
    writers, each = 8, 150

    def write(number: int) -> None:
        for at in range(each):
            book.write(step(1000 * number + at))
            if at % 29 == number:
                book.flush()

    with journal(store, 0.01) as book:
        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        book.flush()
    found = steps(store)
    assert len(found) == len(set(found)) == writers * each
    for number in range(writers):
        assert [at for at in found if at // 1000 == number] == list(range(1000 * number, 1000 * number + each))
    assert len(store.puts) > writers


def test_each_line_says_how_long_the_attempt_has_lived_by_a_clock_that_only_goes_forward(store: Watched) -> None:
    seconds = [100.0]
    with Journal(store, RUN, attempt=3, heartbeat_seconds=NEVER, clock=lambda: seconds[0]) as timed:
        for seconds[0] in (100.5, 160.25):
            timed.write(step(1))
        timed.flush()
        assert timed.elapsed == 60.25
    [written] = objects(store)
    assert [line.elapsed for line in written] == [0.5, 60.25]
