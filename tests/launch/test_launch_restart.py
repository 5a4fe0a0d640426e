"""The decision to restart, as a table and as a property."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.outcome import EXIT_CODES, Outcome
from launch.restart import Again, Past, RestartPolicy, Stop, decide


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_final_exit_code_is_never_followed_by_another_attempt(code: int) -> None:
    assert decide(RestartPolicy(), Past(), exit_code=code, lived_seconds=1) == Stop()


@pytest.mark.parametrize("code", [75, -9, -15, -11, 137, 255])
def test_a_preemption_or_a_death_is_followed_by_another_attempt(code: int) -> None:
    assert decide(RestartPolicy(), Past(), exit_code=code, lived_seconds=100) == Again(1.0, Past(restarts=1, quick=0))


def test_pauses_double_while_attempts_end_quickly_and_start_over_when_one_lived() -> None:
    past, pauses = Past(), []
    for lived in [1, 1, 1, 1, 1, 1, 1, 1, 59, 60, 1]:
        decision = decide(RestartPolicy(), past, exit_code=75, lived_seconds=lived)
        assert isinstance(decision, Again)
        past = decision.past
        pauses.append(decision.pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 1]


@given(
    codes=st.lists(st.sampled_from([75, -9, *EXIT_CODES.values()]), max_size=60),
    bound=st.integers(0, 30),
    lived=st.floats(0, 1e6),
)
def test_restarts_are_bounded_whatever_happens(codes: list[int], bound: int, lived: float) -> None:
    past = Past()
    for code in codes:
        decision = decide(RestartPolicy(max_restarts=bound), past, exit_code=code, lived_seconds=lived)
        if isinstance(decision, Stop):
            break
        assert code in (EXIT_CODES[Outcome.PREEMPTED], -9)
        assert 0 <= decision.pause <= 60
        past = decision.past
    assert past.restarts <= bound


def test_giving_up_is_said() -> None:
    policy = RestartPolicy(max_restarts=2)
    assert decide(policy, Past(restarts=2), exit_code=-9, lived_seconds=1) == Stop("gave up after 2 restarts")


def test_a_very_long_row_of_quick_deaths_does_not_overflow() -> None:
    policy = RestartPolicy(max_restarts=10_000)
    assert decide(policy, Past(5000, 5000), exit_code=75, lived_seconds=0) == Again(60.0, Past(5001, 5001))
