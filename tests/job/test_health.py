"""Promise: a loss that explodes is named within PATIENCE steps; one that is noisy, high at first or spikes is not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.health import PATIENCE, LossWatch


def alarm(losses: Sequence[float]) -> int | None:
    """The step, from 1, at which it is raised."""
    watch = LossWatch()
    return next((step for step, loss in enumerate(losses, start=1) if watch.note(loss) is not None), None)


def noisy(seed: int, count: int, start: float, *, spread: float, falls: float = 1000.0) -> list[float]:
    """A falling curve with lognormal noise, as of small batches."""
    chance = random.Random(seed)
    return [start * math.exp(-step / falls) * math.exp(chance.gauss(0, spread)) for step in range(count)]


@pytest.mark.parametrize("start", [0.4, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("healthy", [1, 2, 7, 19, 20, 21, 45, 300])
def test_a_loss_that_jumps_and_stays_is_named_after_exactly_so_many_steps(start: float, healthy: int) -> None:
    assert alarm([start] * healthy + [8.0] * 200) == healthy + PATIENCE


@pytest.mark.parametrize("seed", range(8))
def test_a_noisy_run_that_diverges_is_named_soon(seed: int) -> None:
    curve = noisy(seed, 200, 1.6, spread=0.3)
    chance = random.Random(seed)
    curve += [7.5 + chance.gauss(0, 0.7) for _ in range(100)]
    assert alarm(curve) == 200 + PATIENCE


def test_a_slow_explosion_is_named_before_it_has_tripled_for_long() -> None:
    curve = [1.5] * 100 + [1.5 * 1.02**step for step in range(200)]
    found = alarm(curve)
    assert found is not None
    assert curve[found - 1] < 9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.1, 0.5, 0.8])
def test_noise_raises_no_alarm(seed: int, spread: float) -> None:
    assert alarm(noisy(seed, 1500, 2.0, spread=spread)) is None


@pytest.mark.parametrize("seed", range(8))
def test_easy_and_hard_rows_by_turns_raise_no_alarm(seed: int) -> None:
    chance = random.Random(seed)
    curve = [chance.choice((0.2, 4.0)) * math.exp(chance.gauss(0, 0.3)) for _ in range(1500)]
    assert alarm(curve) is None
    assert max(curve) > LossWatch(curve).limit, "no step was ever above the limit: this proves nothing"


@pytest.mark.parametrize("lasts", [1, 5, PATIENCE - 1])
def test_spikes_that_recover_raise_no_alarm_however_high(lasts: int) -> None:
    assert alarm(([1.5] * 30 + [50.0] * lasts) * 10) is None


def test_a_high_start_that_falls_raises_no_alarm() -> None:
    assert alarm([13.0 - 0.05 * step for step in range(200)]) is None
    assert alarm([11.9] * 500) is None


@pytest.mark.parametrize("seed", range(8))
def test_an_easy_first_row_raises_no_alarm(seed: int) -> None:
    assert alarm([0.1, *noisy(seed, 500, 2.5, spread=0.4)]) is None


def test_rows_learnt_by_heart_may_be_unlearnt_a_little() -> None:
    assert alarm([0.01] * 200 + [1.0] * 100) is None


def test_the_alarm_says_what_it_compared() -> None:
    watch = LossWatch([1.5] * 40)
    found = [watch.note(8.0) for _ in range(PATIENCE)]
    assert found[:-1] == [None] * (PATIENCE - 1)
    assert found[-1] is not None
    assert found[-1].text == (
        "each of the last 20 steps lost more than 3.75 nats a token, where this run was at 1.50 before"
    )


def test_a_step_above_the_limit_is_in_doubt_until_one_is_not() -> None:
    watch = LossWatch([1.5] * 40)
    doubts = []
    for loss in (1.6, 3.7, 3.8, 9.0, 1.5):
        watch.note(loss)
        doubts.append(watch.is_in_doubt)
    assert doubts == [False, False, True, True, False]


@given(st.lists(st.floats(0, 20), max_size=120), st.data())
@settings(deadline=None, max_examples=60)
def test_a_resumed_run_decides_as_the_one_that_was_not_interrupted(losses: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(losses)))
    whole, resumed = LossWatch(losses[:cut]), LossWatch()
    for loss in losses[:cut]:
        resumed.note(loss)
    for loss in losses[cut:]:
        assert whole.note(loss) == resumed.note(loss)
        assert (whole.limit, whole.is_in_doubt) == (resumed.limit, resumed.is_in_doubt)
