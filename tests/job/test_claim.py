"""Promise: a machine that cannot reach the bucket is not paid for without end."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.attempt import Attempt
from job.claim import MOST_STARTS
from job.contract.environ import JobEnviron
from job.contract.outcome import Outcome
from job.notice import Notice
from job.storage import open_store
from tests.contract.examples import claim
from tests.doubles import FlakyStore
from tests.job.running import Run, start


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = start(tmp_path, rows=4)
    made.submit()
    Path(made.environ().workdir).mkdir(parents=True, exist_ok=True)
    return made


def live(run: Run, store: FlakyStore, *, submission: int = 1, last_attempt: int | None = 21) -> Outcome:
    told = {"submission": submission, "last_attempt": last_attempt, "final_retry_seconds": 0.001}
    environ = JobEnviron.model_validate(run.environ().model_dump() | told)
    return Attempt(environ, Notice(), store=store).live().outcome


def test_where_the_backend_restarts_for_ever_starts_without_the_bucket_come_to_an_end(run: Run) -> None:
    store = FlakyStore(open_store(run.bucket))
    store.cut()
    ends = [live(run, store) for _ in range(MOST_STARTS)]
    assert ends == [Outcome.PREEMPTED] * (MOST_STARTS - 1) + [Outcome.FAILED]
    assert live(run, store, submission=2) is Outcome.PREEMPTED, "another launch begins to count anew"


def test_where_the_backend_counts_for_itself_it_is_left_to_that(run: Run) -> None:
    store = FlakyStore(open_store(run.bucket))
    store.cut()
    ends = {live(run, store, last_attempt=None) for _ in range(MOST_STARTS + 1)}
    assert ends == {Outcome.PREEMPTED}


def test_a_claim_ends_the_counting(run: Run) -> None:
    store = FlakyStore(open_store(run.bucket))
    store.cut()
    for _ in range(MOST_STARTS - 1):
        live(run, store)
    store.mend()
    open_store(run.bucket).put_new(run.layout.claim(1), claim(1).to_bytes())
    assert live(run, store, last_attempt=1) is Outcome.FAILED, "one too many, and so over at once; it has claimed"
    assert len(run.story().claims) == 2
    store.cut()
    assert live(run, store) is Outcome.PREEMPTED


def test_a_disk_that_cannot_count_gives_up_at_once(run: Run) -> None:
    store = FlakyStore(open_store(run.bucket))
    store.cut()
    folder = Path(run.environ().workdir)
    folder.rmdir()
    folder.write_bytes(b"")
    assert live(run, store) is Outcome.FAILED
