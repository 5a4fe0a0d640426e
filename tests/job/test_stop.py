"""Promise: a job that is asked through the bucket saves everything and ends, and goes on exactly."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from job.attempt import Attempt
from job.contract.layout import RunLayout
from job.contract.outcome import EXIT_CODES, Outcome
from job.notice import Notice
from job.stop import REASON, watch_for_stop
from job.storage import FileStore, open_store
from tests.doubles import FlakyStore
from tests.job.running import Zygote, start

RUN = RunLayout("run")
PATIENCE = 30.0


def test_only_a_request_to_this_submission_gives_the_notice(tmp_path: Path) -> None:
    store, notice = FileStore(tmp_path), Notice()
    store.put_new(RUN.stop(1), b"{}")
    over = watch_for_stop(store, RUN, 2, notice, every=0.01)
    assert not notice.wait(0.1)
    store.put_new(RUN.stop(2), b"{}")
    assert notice.wait(PATIENCE)
    assert notice.reason == REASON
    over.set()


def test_a_bucket_out_of_reach_asks_for_nothing_and_is_asked_again(tmp_path: Path) -> None:
    store, notice = FlakyStore(FileStore(tmp_path)), Notice()
    store.put_new(RUN.stop(1), b"{}")
    store.cut()
    over = watch_for_stop(store, RUN, 1, notice, every=0.01)
    assert not notice.wait(0.1)
    store.mend()
    assert notice.wait(PATIENCE)
    over.set()


def test_a_job_that_is_started_after_it_was_asked_begins_nothing_and_asks_for_no_other_attempt(tmp_path: Path) -> None:
    run = start(tmp_path, rows=4)
    run.submit()
    open_store(run.bucket).put_new(run.layout.stop(1), b"{}")
    ending = Attempt(run.environ(submission=1), Notice()).live()
    assert (ending.outcome, ending.step) == (Outcome.FAILED, 0)
    assert REASON in ending.message
    assert not run.story().claims


@pytest.mark.slow
def test_a_real_job_saves_ends_and_goes_on_exactly(tmp_path: Path, zygote: Zygote) -> None:
    whole, run = start(tmp_path / "whole", rows=400), start(tmp_path / "stopped", rows=400)
    assert zygote.attempt(whole.environ(), whole.log) == 0
    run.submit()

    def ask() -> None:
        while not (run.log.exists() and b'"event": "step"' in run.log.read_bytes()):
            threading.Event().wait(0.01)
        open_store(run.bucket).put_new(run.layout.stop(1), b"{}")

    asking = threading.Thread(target=ask)
    asking.start()
    assert zygote.attempt(run.environ(submission=1), run.log) == EXIT_CODES[Outcome.PREEMPTED]
    asking.join()
    end = run.story().ends[1]
    assert REASON in end.message
    assert "everything is committed" in end.message
    run.submit(number=2)
    assert zygote.attempt(run.environ(submission=2), run.log) == 0
    assert run.weights() == whole.weights()
