"""Promise: a run stops at its budget with an adapter in the bucket, and goes on from there, exactly."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.passport import Passport
from job.storage import open_store
from tests.job.running import Run, Zygote, start

pytestmark = pytest.mark.slow

OUT_OF_BUDGET = EXIT_CODES[Outcome.OUT_OF_BUDGET]
# Saved often: what a landing takes is known as soon as one save was measured.
RECIPE = {
    "lora": {"dropout": 0.05},
    "training": {"epochs": 3, "packing": False},
    "checkpoints": {"minutes": 0.01},
}
ROWS = 500


@pytest.fixture(scope="module")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing bounded."""
    run = start(tmp_path_factory.mktemp("whole"), rows=ROWS, recipe=RECIPE)
    run.submit()
    assert zygote.attempt(run.environ(submission=1), run.log) == 0
    return run


def passport_of_landed(run: Run, attempt: int) -> Passport:
    key = run.layout.adapter_file(attempt, "passport.json")
    return Passport.from_bytes(open_store(run.bucket).get(key), name=key)


def test_a_budget_that_ends_in_the_middle_lands_and_more_of_it_finishes_exactly(
    zygote: Zygote, whole: Run, tmp_path: Path
) -> None:
    cost = whole.ledger().usd
    assert cost is not None
    run = start(tmp_path, rows=ROWS, recipe=RECIPE)
    run.submit(max_usd=cost * 0.6)
    assert zygote.attempt(run.environ(submission=1), run.log) == OUT_OF_BUDGET
    spent = run.ledger().usd
    assert spent is not None
    assert spent <= cost * 0.6 + 0.2, "a heartbeat more than the ceiling at most"
    landed = run.landed(1)
    steps = max(run.trained())
    assert 0 < steps < max(whole.trained())
    assert not landed.complete
    assert landed.step <= steps
    assert not passport_of_landed(run, 1).complete

    run.submit(number=2, max_usd=cost * 3)
    assert zygote.attempt(run.environ(submission=2), run.log) == 0
    assert run.weights() == whole.weights()
    assert run.trained() == whole.trained()
    assert run.held_out() == whole.held_out()
    assert run.adapter().complete
    assert run.passport().complete


@pytest.mark.parametrize("money", [None, 1000])
def test_a_deadline_lands_too_and_says_so_beside_money_that_is_left(
    zygote: Zygote, whole: Run, tmp_path: Path, money: int | None
) -> None:
    cost = whole.ledger().usd
    assert cost is not None
    run = start(tmp_path, rows=ROWS, recipe=RECIPE)
    deadline = datetime.now(UTC) + timedelta(seconds=cost * 0.7)
    run.submit(deadline=deadline, max_usd=money and money * cost)
    assert zygote.attempt(run.environ(submission=1), run.log) == OUT_OF_BUDGET
    end = run.story().ends[1]
    assert "the deadline" in end.message
    assert "--by TIME" in end.hint, "more money would not help"
    assert not run.landed(1).complete


def test_kills_do_not_reset_the_ceiling(zygote: Zygote, whole: Run, tmp_path: Path) -> None:
    cost = whole.ledger().usd
    assert cost is not None
    run = start(tmp_path, rows=ROWS, recipe=RECIPE)
    run.submit(max_usd=cost)
    codes = []
    for _ in range(12):
        epochs = len(run.held_out())
        step = '"event": "evaluated"' if epochs < 3 else "publishing"
        try:
            codes.append(zygote.attempt(run.environ(submission=1), run.log, kill_at=step, with_signal=signal.SIGKILL))
        except AssertionError:  # the kill never came: it ended by itself
            codes.append(OUT_OF_BUDGET)
            break
    assert codes[-1] == OUT_OF_BUDGET, "it can be killed for ever and yet costs no more"
    spent = run.ledger().usd
    assert spent is not None
    assert spent <= cost + 0.2 * len(codes) + 1.0


def test_a_job_that_hangs_is_stopped_hard_and_says_so(zygote: Zygote, tmp_path: Path) -> None:
    run = start(tmp_path, rows=ROWS, recipe=RECIPE)
    # Loading takes longer than this; nothing in it looks at the budget.
    run.submit(max_usd=0.45)
    assert zygote.attempt(run.environ(submission=1), run.log) == OUT_OF_BUDGET
    assert run.story().ends[1].outcome is Outcome.OUT_OF_BUDGET


def test_without_a_submission_nothing_bounds_a_run(zygote: Zygote, tmp_path: Path) -> None:
    run = start(tmp_path, rows=24)
    assert zygote.attempt(run.environ(), run.log) == 0
    assert run.ledger().usd is None
