"""What attempts did together, on histories written by hand."""

from __future__ import annotations

from job.contract.history import effective_steps, last_sign_of_life, phase_of, summarise_attempts
from job.contract.metrics import MetricLine
from job.contract.outcome import Outcome
from tests.contract.examples import GPU, at, claim, end, heartbeat, restored, step


def steps(first: int, last: int, seconds: float = 0) -> list[MetricLine]:
    return [step(number, seconds + number) for number in range(first, last + 1)]


# Attempt 1 does 5 steps and is killed; its newest commit is step 3. Attempt 2 repeats 4 and 5, goes on to 8 and is
# preempted after saving. Attempt 3 is killed before it writes a line. Attempt 4 goes on at 8 and finishes.
CLAIMS = [claim(4, 300), claim(1, 0), claim(3, 200), claim(2, 100)]
ENDS = {2: end(Outcome.PREEMPTED, 2, step=8, seconds=190), 4: end(Outcome.DONE, 4, step=10, seconds=400)}
LINES = {
    4: [restored(8, 301), *steps(9, 10, 301)],
    1: [heartbeat("loading", 1), restored(0, 2), *steps(1, 5, 2), heartbeat("training", 30)],
    2: [restored(3, 101), *steps(4, 8, 101)],
}


def test_each_attempt_is_told_by_what_it_did_repeated_and_how_it_ended() -> None:
    told = summarise_attempts(CLAIMS, ENDS, LINES)
    assert [
        (one.attempt, one.ended, one.restored_step, one.last_step, one.steps_done, one.steps_repeated) for one in told
    ] == [
        (1, "killed", 0, 5, 5, 0),
        (2, "preempted", 3, 8, 5, 2),
        (3, "killed", 0, 0, 0, 0),
        (4, "done", 8, 10, 2, 0),
    ]


def test_an_end_is_by_its_own_word_and_for_the_killed_the_last_sign_of_life() -> None:
    told = summarise_attempts(CLAIMS, ENDS, LINES)
    assert [one.started_at for one in told] == [at(0), at(100), at(200), at(300)]
    assert [one.ended_at for one in told] == [at(30), at(190), at(200), at(400)]


def test_hardware_is_known_once_an_attempt_has_begun_to_train() -> None:
    assert [one.hardware for one in summarise_attempts(CLAIMS, ENDS, LINES)] == [GPU, GPU, None, GPU]


def test_an_attempt_that_runs_has_not_ended() -> None:
    (told,) = summarise_attempts([claim()], {}, {1: [restored(0, 1), *steps(1, 2, 1)]}, running=1)
    assert told.ended == "running"
    assert told.ended_at is None
    assert told.last_step == 2


def test_an_end_record_outweighs_the_belief_that_it_runs() -> None:
    (told,) = summarise_attempts([claim()], {1: end(Outcome.FAILED, seconds=9)}, {}, running=1)
    assert (told.ended, told.ended_at) == ("failed", at(9))


def test_steps_lost_twice_are_counted_as_repeated_twice() -> None:
    lines = {number: [restored(0), *steps(1, 4)] for number in (1, 2, 3)}
    told = summarise_attempts([claim(1), claim(2), claim(3)], {}, lines)
    assert [one.steps_repeated for one in told] == [0, 4, 4]


def test_a_damaged_newest_checkpoint_shows_as_more_repeated_steps() -> None:
    lines = {1: [restored(0), *steps(1, 8)], 2: [restored(8), *steps(9, 9)], 3: [restored(4), *steps(5, 10)]}
    told = summarise_attempts([claim(1), claim(2), claim(3)], {}, lines)
    assert [one.steps_repeated for one in told] == [0, 0, 5]


def test_work_whose_lines_were_lost_is_still_behind_us_when_it_was_restored() -> None:
    # Attempt 1 was killed before its lines of steps 3 to 6 were written; its checkpoint of step 6 was.
    lines = {1: [restored(0), *steps(1, 2)], 2: [restored(6), *steps(7, 7)], 3: [restored(4), *steps(5, 8)]}
    told = summarise_attempts([claim(1), claim(2), claim(3)], {}, lines)
    assert [one.steps_repeated for one in told] == [0, 0, 3]


def test_no_attempts_are_no_history() -> None:
    assert summarise_attempts([], {}, {}) == ()
    assert effective_steps({}) == {}


def test_each_step_counts_once_in_order_as_the_newest_attempt_did_it() -> None:
    lines: dict[int, list[MetricLine]] = {
        2: [restored(3), step(4, loss=24), step(5, loss=25), step(6, loss=26)],
        1: [restored(0), step(1, loss=11), step(4, loss=14), step(5, loss=15)],
        3: [restored(1), step(2, loss=32), step(3, loss=33)],
    }
    told = effective_steps(lines)
    assert list(told) == [1, 2, 3, 4, 5, 6]
    assert [line.loss for line in told.values()] == [11, 32, 33, 24, 25, 26]


def test_the_last_sign_of_life_is_the_newest_line_of_any_kind() -> None:
    assert last_sign_of_life([]) is None
    assert last_sign_of_life([step(1, 5), heartbeat("saving", 9), step(2, 7)]) == heartbeat("saving", 9)


def test_the_phase_is_that_of_the_last_heartbeat() -> None:
    assert phase_of([]) == phase_of([step(1)]) == "starting"
    assert phase_of([heartbeat("loading"), heartbeat("training"), step(1)]) == "training"
