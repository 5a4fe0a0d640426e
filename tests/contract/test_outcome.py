"""The table of endings."""

from __future__ import annotations

import pytest

from job.contract.outcome import EXIT_CODES, Outcome, is_worth_another_attempt, outcome_of_exit

TABLE = {
    Outcome.DONE: (0, False),
    Outcome.FAILED: (1, False),
    Outcome.BAD_INPUT: (2, False),
    Outcome.OUT_OF_BUDGET: (3, False),
    Outcome.PREEMPTED: (75, True),
}


def test_the_table_is_total() -> None:
    assert set(TABLE) == set(Outcome)
    assert {outcome: code for outcome, (code, _) in TABLE.items()} == EXIT_CODES


@pytest.mark.parametrize("outcome", Outcome)
def test_an_exit_code_states_one_outcome_and_whether_to_go_on(outcome: Outcome) -> None:
    code, again = TABLE[outcome]
    assert outcome_of_exit(code) is outcome
    assert is_worth_another_attempt(code) is again


@pytest.mark.parametrize("code", [-9, -15, -11, 137, 143, 139, 120, 126, 127, 4, 255])
def test_a_death_without_a_word_states_nothing_and_is_worth_another_attempt(code: int) -> None:
    assert outcome_of_exit(code) is None
    assert is_worth_another_attempt(code)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        EXIT_CODES[Outcome.DONE] = 7  # type: ignore[index]
