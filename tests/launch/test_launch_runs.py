"""What is read of a run, and what is made of it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from job.contract.budget import Budget
from job.contract.errors import AccessRefused, BadInput, RunUnknown, Unreachable
from job.contract.layout import Key, RunLayout, Uri
from job.contract.metrics import Committed, Evaluated, Heartbeat, MetricLine, Restored, Step, dump_lines
from job.contract.outcome import Outcome
from job.contract.records import AttemptClaim, AttemptEnd, Hardware, RunRecord
from job.contract.status import BackendState, Status
from job.contract.submission import Offer, Submission
from job.storage import ObjectInfo, Progress, Store
from launch.backend import Described
from launch.begin import take_up
from launch.displays import PlainDisplay
from launch.follow import Interrupts, follow
from launch.render import progress_line
from launch.runs import Poll, RunReader, list_runs
from launch.spending import budget_and_spent
from launch.view import Facts, exit_code_of, view_of
from launch.wish import Wish
from tests.contract import examples
from tests.launch.kit import Desk

START = datetime(2026, 1, 1, tzinfo=UTC)
CPU = Hardware(device="cpu", name="a processor", memory_bytes=1, count=1)
LAYOUT = RunLayout("one")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def claim(attempt: int, seconds: float = 0) -> AttemptClaim:
    return examples.claim(attempt).model_copy(update={"claimed_at": at(seconds)})


def ended(attempt: int, outcome: Outcome, message: str = "so it is", hint: str = "") -> AttemptEnd:
    said = {"ended_at": at(9), "message": message, "hint": hint}
    return examples.end(outcome, attempt, step=1).model_copy(update=said)


def restored(step: int) -> Restored:
    return Restored(
        at=at(1),
        step=step,
        checkpoint=f"step-{step:08d}-a0001" if step else None,
        total_steps=10,
        epochs=3,
        train_rows=4,
        hardware=CPU,
    )


def step(number: int, seconds: float = 2.0) -> Step:
    return Step(
        at=at(number),
        step=number,
        epoch=number / 10,
        loss=5 - number / 10,
        grad_norm=1,
        learning_rate=1e-4,
        tokens=100,
        seconds=seconds,
        rows=(1,),
    )


def committed(number: int, seconds: float) -> Committed:
    return Committed(
        at=at(seconds), checkpoint=f"step-{number:08d}-a0001", step=number, size=1, blocking_seconds=0, seconds=0
    )


class Says:
    """A backend's word."""

    def __init__(self, state: BackendState, detail: str = "", exit_code: int | None = None) -> None:
        self.described = Described(state, detail, exit_code)

    def describe(self, run_id: str) -> Described:
        return self.described


class Watched:
    """A store that notes what is asked of it, and fails when told to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.got: list[str] = []
        self.broken: Exception | None = None
        self.below = ""
        """Where it is broken; everywhere unless told."""

    @property
    def uri(self) -> Uri:
        return self._store.uri

    def put_new(self, key: Key, data: bytes) -> None:
        self._store.put_new(key, data)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._store.put_file(key, path, progress)

    def get(self, key: Key) -> bytes:
        if self.broken and key.startswith(self.below):
            raise self.broken
        self.got.append(key)
        return self._store.get(key)

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._store.get_file(key, path, progress)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        if self.broken and prefix.startswith(self.below):
            raise self.broken
        return self._store.list(prefix, after=after)

    def delete(self, key: Key) -> None:
        self._store.delete(key)


@pytest.fixture
def record(desk: Desk) -> RunRecord:
    return desk.create("one")


def write(store: Store, attempt: int, sequence: int, *lines: MetricLine) -> None:
    store.put_new(LAYOUT.metrics_object(attempt, sequence), dump_lines(list(lines)))


def test_a_run_that_could_not_be_stopped_is_tried_again(desk: Desk, record: RunRecord) -> None:
    desk.store.put_new(LAYOUT.claim(1), claim(1).to_bytes())
    tries: list[str] = []
    looks: list[str] = []

    class Living:
        def describe(self, run_id: str) -> Described:
            looks.append(run_id)
            assert len(looks) < 200, "it was not tried again"
            return Described(BackendState.CANCELLED if len(tries) > 1 else BackendState.ALIVE)

    def stop() -> bool:
        tries.append("")
        return len(tries) > 1

    interrupts = Interrupts()
    interrupts.count = 1
    display = PlainDisplay(Console(file=io.StringIO()))
    reader = RunReader(desk.store, "one", Living())
    left = follow(reader, stop, display, interrupts, every=0.001, again=0.01)
    assert (len(tries), left.status) == (2, Status.CANCELLED)


def test_a_live_job_is_not_stopped_for_money_because_two_calendars_differ(desk: Desk, record: RunRecord) -> None:
    offer = Offer(cloud="local", gpu="this machine", gpus=1, spot=False, usd_per_hour=1.0)
    submission = examples.submission().model_copy(update={"offers": (offer,), "budget": Budget(max_usd=5)})
    desk.store.put_new(LAYOUT.submission(1), submission.to_bytes())
    alone = {"submission": 1, "infra": {"cloud": "local"}, "up_seconds": 0.0}
    desk.store.put_new(LAYOUT.claim(1), claim(1).model_copy(update=alone).to_bytes())
    write(desk.store, 1, 0, Heartbeat(at=at(0), elapsed=1, phase="training"))
    reader, ahead = RunReader(desk.store, "one", Says(BackendState.ALIVE)), at(10 * 3600)
    assert reader.poll(ahead).view.is_overspent, "it may be dead since then: nobody has heard it"
    write(desk.store, 1, 1, Heartbeat(at=at(15), elapsed=16, phase="training"))
    assert not reader.poll(ahead).view.is_overspent
    assert not reader.poll(ahead).view.is_overspent


# ------------------------------------------------------------------------------------------------------- the view


def test_the_numbers_of_a_run_that_goes_on(record: RunRecord) -> None:
    facts = Facts(record, claims={1: claim(1)})
    facts.lines[1] = [
        restored(0),
        *(step(n) for n in range(1, 5)),
        Evaluated(at=at(4), step=4, epoch=1, held_out_loss=2.5),
        committed(4, 5),
        Heartbeat(at=at(6), phase="training"),
    ]
    view = view_of(facts, Described(BackendState.ALIVE), bucket="file:///b", now=at(65))
    assert (view.status, view.phase, view.attempt) == (Status.RUNNING, "training", 1)
    assert (view.epoch, view.epochs, view.step, view.total_steps) == (0.4, 3, 4, 10)
    assert (view.loss, view.held_out_loss) == (4.6, 2.5)
    assert (view.tokens_per_second, view.eta_seconds) == (50, 12)
    assert (view.mfu, view.memory_bytes) == (None, None)
    assert view.last_commit is not None
    assert (view.last_commit.step, view.last_commit.age_seconds, view.last_commit.is_old) == (4, 60, False)
    assert view.last_sign_of_life == at(6)
    assert view.adapter is None


def test_of_a_gpu_the_share_of_its_arithmetic_and_its_memory_are_told(record: RunRecord) -> None:
    on_a_gpu = [
        step(1, seconds=1.0).model_copy(update={"mfu": 0.2, "memory_bytes": 5 * 2**30}),
        step(2, seconds=3.0).model_copy(update={"mfu": 0.6, "memory_bytes": 4 * 2**30}),
    ]
    facts = Facts(record, claims={1: claim(1)}, lines={1: [restored(0), *on_a_gpu]})
    view = view_of(facts, Described(BackendState.ALIVE), bucket="b", now=at(60))
    assert view.mfu == pytest.approx(0.5)
    assert view.memory_bytes == 5 * 2**30
    assert "50 tokens/s · MFU 50% · 5.0 GiB · ETA" in progress_line(view)
    text = io.StringIO()
    PlainDisplay(Console(file=text)).show(Poll(view, Described(BackendState.ALIVE), ((1, on_a_gpu[1]),)))
    assert "33 tokens/s · MFU 60% · 4.0 GiB · ETA" in text.getvalue()
    over = view_of(facts, Described(BackendState.FAILED), bucket="b", now=at(60))
    assert (over.mfu, over.memory_bytes) == (None, None)


def test_after_a_resume_the_step_is_the_newest_attempts(record: RunRecord) -> None:
    facts = Facts(record, claims={1: claim(1), 2: claim(2)})
    facts.lines = {1: [restored(0), *(step(n) for n in range(1, 8)), committed(4, 5)], 2: [restored(4)]}
    view = view_of(facts, Described(BackendState.ALIVE), bucket="b", now=at(60))
    assert (view.step, view.loss, view.epoch) == (4, 4.6, 0.4)
    assert [a.ended for a in view.attempts] == ["killed", "running"]
    facts.claims[3] = claim(3)  # nothing is known of it yet: what was true stays true
    assert view_of(facts, Described(BackendState.ALIVE), bucket="b", now=at(60)).step == 4


def test_a_calendar_that_was_set_back_hides_no_commit_and_no_sign_of_life(record: RunRecord) -> None:
    facts = Facts(record, claims={1: claim(1, 7000), 2: claim(2, 100)})
    beats = [
        Heartbeat(at=at(seconds), elapsed=elapsed, phase="training") for elapsed, seconds in ((10, 9000), (30, 120))
    ]
    facts.lines = {1: [restored(0), committed(4, 8000)], 2: [restored(4), *beats, committed(6, 110)]}
    view = view_of(facts, Described(BackendState.ALIVE), bucket="b", now=at(150))
    assert view.last_commit is not None
    assert (view.last_commit.step, view.last_commit.age_seconds) == (6, 40)
    assert view.last_sign_of_life == at(120)


@pytest.mark.parametrize(("age", "lived", "old"), [(1700, 9999, False), (1900, 9999, True), (1900, 60, False)])
def test_a_commit_that_is_old_for_a_run_that_trains_is_marked(
    record: RunRecord, age: float, lived: float, old: bool
) -> None:
    facts = Facts(record, claims={1: claim(1, age - lived)}, lines={1: [restored(0), committed(1, 0)]})
    view = view_of(facts, Described(BackendState.ALIVE), bucket="b", now=at(age))
    assert view.last_commit is not None
    assert view.last_commit.is_old is old


@pytest.mark.parametrize(
    ("says", "end", "status", "code"),
    [
        (Says(BackendState.QUEUED), None, "pending", 75),
        (Says(BackendState.ALIVE), None, "running", 75),
        (Says(BackendState.RECOVERING), Outcome.PREEMPTED, "recovering", 75),
        (Says(BackendState.UNREACHABLE), None, "unknown", 75),
        (Says(BackendState.CANCELLED), Outcome.PREEMPTED, "cancelled", 75),
        (Says(BackendState.GONE, "gave up after 20 restarts"), Outcome.PREEMPTED, "interrupted", 75),
        (Says(BackendState.FAILED, exit_code=1), Outcome.FAILED, "failed", 1),
        (Says(BackendState.FAILED, exit_code=1), None, "failed", 1),
        (Says(BackendState.FAILED, exit_code=2), None, "failed", 2),
        (Says(BackendState.FAILED, exit_code=2), Outcome.BAD_INPUT, "failed", 2),
        (Says(BackendState.GONE), Outcome.OUT_OF_BUDGET, "out_of_budget", 3),
    ],
)
def test_what_a_launcher_says_and_exits_with(
    record: RunRecord, says: Says, end: Outcome | None, status: str, code: int
) -> None:
    facts = Facts(record, claims={1: claim(1)}, ends={1: ended(1, end)} if end else {})
    view = view_of(facts, says.described, bucket="b", now=at(10))
    assert view.status == status
    assert exit_code_of(view) == code
    if view.status.is_over:
        assert view.message
        assert view.hint


def test_the_jobs_own_words_come_first(record: RunRecord) -> None:
    facts = Facts(record, claims={1: claim(1)}, ends={1: ended(1, Outcome.FAILED, "loss is NaN", "halve the rate")})
    view = view_of(facts, Described(BackendState.FAILED, "exit code 1", 1), bucket="b", now=at(10))
    assert (view.message, view.hint) == ("loss is NaN", "halve the rate")


# ------------------------------------------------------------------------------------------------------ the reader


def test_no_metrics_are_read_twice_and_none_of_overlapping_attempts_is_missed(desk: Desk, record: RunRecord) -> None:
    store = Watched(desk.store)
    reader = RunReader(store, "one", Says(BackendState.ALIVE))
    store.put_new(LAYOUT.claim(1), claim(1).to_bytes())
    write(store, 1, 0, restored(0), step(1))
    assert [line.event for _, line in reader.poll(at(9)).news] == ["restored", "step"]

    store.put_new(LAYOUT.claim(2), claim(2).to_bytes())
    write(store, 2, 0, restored(0))
    write(store, 1, 1, step(2))
    news = reader.poll(at(9)).news
    assert sorted((attempt, line.event) for attempt, line in news) == [(1, "step"), (2, "restored")]
    write(store, 1, 2, step(3))  # the old one still writes, behind the key of its successor
    assert [(attempt, line.event) for attempt, line in reader.poll(at(9)).news] == [(1, "step")]

    for attempt in (3, 4):
        store.put_new(LAYOUT.claim(attempt), claim(attempt).to_bytes())
        write(store, attempt, 0, restored(0))
    assert len(reader.poll(at(9)).news) == 2
    assert reader.poll(at(9)).news == ()
    assert reader.poll(at(9)).view.attempt == 4
    read_once = [key for key in store.got if not key.endswith("adapter.json")]
    assert len(read_once) == len(set(read_once))


def test_a_bucket_out_of_reach_makes_it_unknown_and_loses_no_news(desk: Desk, record: RunRecord) -> None:
    store = Watched(desk.store)
    reader = RunReader(store, "one", Says(BackendState.ALIVE))
    store.put_new(LAYOUT.claim(1), claim(1).to_bytes())
    write(store, 1, 0, restored(0), step(1))
    store.broken = Unreachable("no route", hint="wait")
    poll = reader.poll(at(9))
    assert (poll.view.status, poll.view.message, poll.view.hint) == (Status.UNKNOWN, "no route", "wait")
    store.broken = None
    assert len(reader.poll(at(9)).news) == 2
    store.broken = Unreachable("no route")
    unknown = reader.poll(at(9)).view
    assert (unknown.status, unknown.step) == (Status.UNKNOWN, 1)
    store.broken = AccessRefused("not yours")
    with pytest.raises(AccessRefused):
        reader.poll(at(9))


@pytest.mark.parametrize("below", ["recipe", "attempts", "metrics", "submissions"])
def test_what_was_read_in_part_is_no_receipt_and_no_ground_to_go_on(desk: Desk, record: RunRecord, below: str) -> None:
    """A run that lives would look as if it stood still, and one that has a ceiling as if it had none."""
    store = Watched(desk.store)
    store.put_new(LAYOUT.claim(1), claim(1).to_bytes())
    write(store, 1, 0, restored(0), step(1))
    store.broken, store.below = Unreachable("no route"), f"{LAYOUT.root}{below}"
    with pytest.raises(Unreachable, match="no route"):
        RunReader(store, "one", Says(BackendState.GONE)).receipt(at(9))
    with pytest.raises(Unreachable, match="no route"):
        take_up(desk.home, store, "one", Says(BackendState.GONE), given=None, recipe_name="")
    with pytest.raises(Unreachable, match="no route"):
        budget_and_spent(record, store, Wish(run_id="one"))


def test_a_ceiling_that_was_written_into_the_recipe_since_holds(desk: Desk, record: RunRecord) -> None:
    """Whoever lowers it and names the recipe must not be billed by the one before."""
    said = Budget(max_usd=40, max_hourly_usd=3)
    submission = Submission(
        submission=1,
        nonce="n",
        submitted_at=at(0),
        backend="local",
        offers=(),
        image=None,
        last_attempt=None,
        budget=said,
    )
    desk.store.put_new(LAYOUT.submission(1), submission.to_bytes())

    def holds(given: Budget | None, dollars: str | None = None) -> Budget:
        return budget_and_spent(record, desk.store, Wish(run_id="one", budget=dollars), given=given)[0]

    assert holds(None) == holds(Budget()) == holds(record.recipe.budget) == said
    assert holds(Budget(max_usd=5)) == Budget(max_usd=5, max_hourly_usd=3)
    assert holds(Budget(max_usd=5), "+20").max_usd == 25


def test_a_used_up_budget_names_what_would_help(desk: Desk, record: RunRecord) -> None:
    offer = Offer(cloud="local", gpu="this machine", gpus=1, spot=False, usd_per_hour=3600.0)
    submission = examples.submission().model_copy(update={"offers": (offer,), "budget": Budget(max_usd=80)})
    desk.store.put_new(LAYOUT.submission(1), submission.to_bytes())
    alone = {"submission": 1, "infra": {"cloud": "local"}, "up_seconds": 0.0}
    desk.store.put_new(LAYOUT.claim(1), claim(1).model_copy(update=alone).to_bytes())
    write(desk.store, 1, 0, Heartbeat(at=at(0), elapsed=81, phase="training"))
    with pytest.raises(BadInput) as caught:
        budget_and_spent(record, desk.store, Wish(run_id="one"))
    assert caught.value.hint == "--budget +20 allows so much more"
    # Of what the recipe says "+20" is 80, whatever was said before.
    with pytest.raises(BadInput) as caught:
        budget_and_spent(record, desk.store, Wish(run_id="one", budget="+20"), given=Budget(max_usd=60))
    whole = caught.value.hint.split()[1]
    assert budget_and_spent(record, desk.store, Wish(run_id="one", budget=whole), given=Budget(max_usd=60))[0]


def test_one_broken_metrics_object_hides_nothing_else(desk: Desk, record: RunRecord) -> None:
    desk.store.put_new(LAYOUT.claim(1), claim(1).to_bytes())
    write(desk.store, 1, 0, restored(0))
    desk.store.put_new(LAYOUT.metrics_object(1, 1), b"{}\n")
    write(desk.store, 1, 2, step(2))
    assert RunReader(desk.store, "one", Says(BackendState.ALIVE)).poll(at(9)).view.step == 2


def test_runs_are_listed_by_their_records_only(desk: Desk) -> None:
    desk.create("b-run")
    desk.create("a-run")
    desk.store.put_new(RunLayout("no-record").claim(1), b"x")
    desk.store.put_new(Key("runs/Not-Ours/recipe.json"), b"x")
    desk.store.put_new(Key("other/recipe.json"), b"x")
    assert list(list_runs(desk.store)) == ["a-run", "b-run"]
    with pytest.raises(RunUnknown, match="no run no-record"):
        RunReader(desk.store, "no-record", Says(BackendState.GONE)).poll(at(0))
