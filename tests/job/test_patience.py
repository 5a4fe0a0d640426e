"""Promise: what is out of reach is tried again with growing pauses, as long as it was said, and no longer."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.contract.errors import AccessRefused, NotFound, Unreachable
from job.patience import LONGEST_PAUSE, insist, pauses


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


class Failing:
    """Out of reach so many times, or for ever; then it answers."""

    def __init__(self, times: int | None) -> None:
        self.left = times
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left is None or self.calls <= self.left:
            raise Unreachable(f"no answer to call {self.calls}")
        return "here"


def try_it(action: Failing, clock: Clock, seconds: float) -> str:
    return insist(action, what="recipe", seconds=seconds, sleep=clock.sleep, clock=clock)


def test_pauses_double_up_to_the_longest() -> None:
    found = list(islice(pauses(), 8))
    assert found == [1, 2, 4, 8, 16, 30, 30, 30]
    assert max(found) == LONGEST_PAUSE


def test_what_succeeds_at_once_is_not_waited_for() -> None:
    clock = Clock()
    assert try_it(Failing(0), clock, 0) == "here"
    assert clock.slept == []


def test_it_goes_on_until_it_succeeds_and_says_each_time_when_it_tries_next() -> None:
    clock = Clock()
    with capture_logs() as logs:
        assert try_it(Failing(3), clock, 100) == "here"
    assert clock.slept == [1, 2, 4]
    assert [(line["event"], line["what"], line["next_try_seconds"]) for line in logs] == [
        ("store.unreachable", "recipe", pause) for pause in (1, 2, 4)
    ]


@given(st.floats(0, 500))
def test_it_gives_up_with_the_last_error_within_the_time(seconds: float) -> None:
    clock, action = Clock(), Failing(None)
    with pytest.raises(Unreachable, match="no answer to call") as raised:
        try_it(action, clock, seconds)
    assert raised.value.message.endswith(f" {action.calls}")
    assert sum(clock.slept) <= seconds
    assert action.calls == len(clock.slept) + 1
    following = next(islice(pauses(), len(clock.slept), None))
    assert sum(clock.slept) + following > seconds  # and not earlier than it must


def test_the_time_runs_from_the_first_failure_and_counts_what_the_tries_take() -> None:
    clock = Clock()

    def slow() -> str:
        clock.now += 10
        raise Unreachable("after 10 s")

    with pytest.raises(Unreachable):
        insist(slow, what="recipe", seconds=25, sleep=clock.sleep, clock=clock)
    # the first failure at 10, then 1 + 10 and 2 + 10; the next pause, 4, would pass 10 + 25
    assert clock.now == 1000 + 10 + 11 + 12
    assert clock.slept == [1, 2]


@pytest.mark.parametrize("error", [NotFound("x"), AccessRefused("x"), KeyError("x")])
def test_what_trying_again_cannot_help_is_raised_at_once(error: Exception) -> None:
    clock = Clock()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        insist(fail, what="recipe", seconds=100, sleep=clock.sleep, clock=clock)
    assert clock.slept == []


def test_a_sleep_that_raises_ends_it() -> None:
    """How a notice ends the waiting."""

    class Notice(Exception):
        pass

    def sleep(_seconds: float) -> None:
        raise Notice

    with pytest.raises(Notice):
        insist(Failing(None), what="recipe", seconds=100, sleep=sleep, clock=Clock())


def test_pauses_never_shrink() -> None:
    assert all(a <= b for a, b in pairwise(islice(pauses(), 50)))
