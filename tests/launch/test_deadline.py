"""Promise: a deadline that can be met is met, whatever happens to spot, and no dollar more is spent than it takes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from job.contract.errors import BadInput
from launch.deadline import Choice, Machine, Now, Terms, check_deadline, decide, must_leave_spot_by

HOUR = 3600.0
TERMS = Terms(work=10 * HOUR, time=12.5 * HOUR, changeover=0.2 * HOUR, price_ratio=0.5, lost=0, look=0)
"""C(0)/R(0) = 0.8: the schedule runs from the start."""
LOOSE = Terms(work=10 * HOUR, time=20 * HOUR, changeover=0.2 * HOUR, price_ratio=0.5, lost=0, look=0)
"""C(0)/R(0) = 0.5: the schedule begins at C/R = 0.7."""
SELDOM = TERMS.model_copy(update={"look": 0.5 * HOUR})
"""A watcher that looks every half hour."""


def at(
    work_left: float, time_left: float, on: Machine = Machine.NONE, *, spot: bool = False, starting: float = 0
) -> Now:
    """A moment, in hours."""
    return Now(work_left * HOUR, time_left * HOUR, on, starting * HOUR, spot)


@st.composite
def terms_(draw: st.DrawFn) -> Terms:
    """Terms in whole seconds of a deadline that can be met."""
    work, changeover = draw(st.integers(1, 60)), draw(st.integers(0, 6))
    return Terms(
        work=work,
        time=work + changeover + draw(st.integers(0, 60)),
        changeover=changeover,
        price_ratio=draw(st.sampled_from([0.1, 0.5, 0.9])),
        lost=draw(st.integers(0, 5)),
        look=draw(st.integers(1, 4)),
        tight=draw(st.sampled_from([0.0, 0.7, 2.0])),
    )


NOWS = st.builds(
    Now,
    work_left=st.integers(0, 80),
    time_left=st.integers(-20, 150),
    on=st.sampled_from(Machine),
    starting=st.integers(0, 6),
    spot_available=st.booleans(),
)


def finish(terms: Terms, trace: list[bool]) -> int:
    """The second at which a run is done that follows the rule, in a world that does its worst within the terms.

    It is looked after every `look` seconds only, a commit comes every `lost` seconds, and every change of machine,
    also a wanted one, loses what was not committed. After the trace spot never comes back.
    """
    on, starting, committed, pending, due = Machine.NONE, 0, 0, 0, 0
    for second in range(10_000):
        available = second < len(trace) and trace[second]
        if on is Machine.SPOT and not available:
            on, pending = Machine.NONE, 0
        if second >= due:
            due = second + int(terms.look)
            now = Now(
                terms.work - committed, terms.time - second, on, starting if on is not Machine.NONE else 0, available
            )
            decision = decide(terms, now)
            assert decision.late_by == 0, decision
            assert available or decision.choice is not Choice.SPOT or on is Machine.SPOT
            wanted = Machine.NONE if decision.choice is Choice.WAIT else Machine(decision.choice.value)
            if wanted is not on:
                on, pending, starting = wanted, 0, int(terms.changeover)
        if on is Machine.NONE:
            continue
        if starting:
            starting -= 1
            continue
        pending += 1
        if committed + pending >= terms.work:
            return second + 1
        if pending >= terms.lost:
            committed, pending = committed + pending, 0
    raise AssertionError("never done")


@settings(deadline=None)
@given(terms_(), st.lists(st.booleans(), max_size=130))
@example(Terms(work=10, time=30, changeover=3, price_ratio=0.5, lost=0, look=1), [True] * 4 + [False] * 200)
def test_a_deadline_that_can_be_met_is_met_whatever_happens_to_spot(terms: Terms, trace: list[bool]) -> None:
    assert finish(terms, trace) <= terms.time


@settings(deadline=None)
@given(terms_(), st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12))
def test_a_deadline_is_met_when_spot_comes_and_goes_in_stretches(
    terms: Terms, stretches: list[tuple[bool, int]]
) -> None:
    assert finish(terms, [up for up, length in stretches for _ in range(length)]) <= terms.time


@settings(deadline=None)
@given(terms_())
def test_spot_that_never_goes_away_is_all_that_is_bought(terms: Terms) -> None:
    now = Now(terms.work, terms.time, Machine.NONE, spot_available=True)
    if now.slack >= terms.spot_needs:
        assert decide(terms, now).choice is Choice.SPOT
        assert finish(terms, [True] * 200) == terms.work + terms.changeover


@given(terms_(), NOWS)
def test_on_demand_is_not_bought_while_spot_can_be_had_or_the_schedule_is_kept(terms: Terms, now: Now) -> None:
    if now.on is Machine.NONE and now.work_left > 0 and now.slack >= terms.spot_needs:
        choice = decide(terms, now).choice
        if now.spot_available:
            assert choice is Choice.SPOT
        elif now.work_left <= terms.pace * now.time_left:
            assert choice is Choice.WAIT
        else:
            assert choice is Choice.ON_DEMAND


@given(terms_(), NOWS, st.integers(0, 50), st.integers(0, 50))
def test_more_time_and_less_work_never_make_it_buy_on_demand(terms: Terms, now: Now, time: int, work: int) -> None:
    if now.on is Machine.NONE and decide(terms, now).choice is not Choice.ON_DEMAND:
        easier = Now(now.work_left - work, now.time_left + time, now.on, 0, now.spot_available)
        assert decide(terms, easier).choice is not Choice.ON_DEMAND


@given(terms_(), NOWS)
def test_spot_that_computes_is_kept_while_on_demand_could_still_take_over(terms: Terms, now: Now) -> None:
    running = Now(now.work_left, now.time_left, Machine.SPOT, 0, now.spot_available)
    decision = decide(terms, running)
    if now.work_left > 0 and must_leave_spot_by(terms, running) > 0:
        assert decision.choice is Choice.SPOT
    elif decision.choice is Choice.ON_DEMAND:
        assert terms.changeover <= running.slack < terms.changeover + terms.look


@given(terms_(), NOWS)
def test_looking_again_when_it_was_said_to_be_early_enough_is(terms: Terms, now: Now) -> None:
    by = must_leave_spot_by(terms, now)
    done = by + terms.look + terms.changeover + now.work_left
    if by > 0:
        assert done == now.time_left
    else:
        assert done >= now.time_left


@given(terms_(), NOWS)
@example(Terms(work=9, time=9, changeover=2, price_ratio=0.5, lost=3, look=0), Now(9, 7, Machine.ON_DEMAND))
@example(
    Terms(work=9, time=10, changeover=1, price_ratio=0.5, lost=0, look=0), Now(1, 2, Machine.ON_DEMAND, starting=2)
)
def test_it_is_called_late_exactly_when_no_machine_could_be_in_time(terms: Terms, now: Now) -> None:
    late = decide(terms, now).late_by > 0
    ends = [now.work_left + terms.changeover]
    if now.on is not Machine.NONE:
        ends.append(now.work_left + (now.starting if now.starting else -terms.lost))
    assert late == (now.work_left > 0 and min(ends) > now.time_left)


@pytest.mark.parametrize(
    ("terms", "now", "choice", "why"),
    [
        # In the order of the paper's rules.
        (TERMS, at(0, 5, Machine.SPOT, spot=True), Choice.WAIT, "nothing is left"),
        (TERMS, at(10, 10.39, spot=True), Choice.ON_DEMAND, "on demand until the end"),
        (TERMS, at(10, 10.41, spot=True), Choice.SPOT, "can be had"),
        (TERMS, at(9, 9.3, Machine.SPOT), Choice.SPOT, "kept until it is taken away"),
        (TERMS, at(10, 12.4), Choice.ON_DEMAND, "5 min of work behind the schedule"),
        (TERMS, at(9.9, 12.4), Choice.WAIT, "ahead of the schedule, with 2.5 h of slack"),
        (TERMS, at(10, 12.4, spot=True), Choice.SPOT, "can be had"),
        (TERMS, at(8, 10.1, Machine.ON_DEMAND, spot=True), Choice.ON_DEMAND, "catching up"),
        (TERMS, at(7.7, 10.1, Machine.ON_DEMAND, spot=True), Choice.SPOT, "ahead of the schedule by two changeovers"),
        (TERMS, at(7.7, 10.1, Machine.ON_DEMAND), Choice.ON_DEMAND, "spot cannot be had"),
        (TERMS, at(9, 9.3, Machine.ON_DEMAND, spot=True), Choice.ON_DEMAND, "too little for spot"),
        # A loose deadline: the schedule begins at C/R = 0.7, 14.29 h before it.
        (LOOSE, at(10, 14.3), Choice.WAIT, "no spot"),
        (LOOSE, at(10, 14.2), Choice.ON_DEMAND, "behind the schedule"),
        # What the paper's model has not: a machine that does not keep its word, and the end of a run.
        (TERMS, at(9, 9.5, Machine.SPOT, starting=0.31), Choice.ON_DEMAND, "the last moment"),
        (SELDOM, at(9, 9.45, Machine.SPOT), Choice.ON_DEMAND, "the last moment"),
        (SELDOM, at(9, 9.75, Machine.SPOT), Choice.SPOT, "kept until it is taken away"),
        (TERMS, at(9, 9.19, Machine.SPOT), Choice.SPOT, "too late to change: 11 min of slack"),
        (TERMS, at(0.1, 4, Machine.ON_DEMAND, spot=True), Choice.ON_DEMAND, "costs less here"),
    ],
)
def test_each_rule_decides_and_says_why(terms: Terms, now: Now, choice: Choice, why: str) -> None:
    decision = decide(terms, now)
    assert decision.choice is choice
    assert why in decision.reason


def test_being_late_is_said_with_by_how_much_and_the_fastest_machine_is_taken() -> None:
    decision = decide(TERMS, at(10, 9, spot=True))
    assert decision.choice is Choice.ON_DEMAND
    assert decision.late_by == pytest.approx(1.2 * HOUR)


def test_a_deadline_that_nothing_can_meet_is_refused_with_the_numbers() -> None:
    check_deadline(TERMS)
    with pytest.raises(BadInput, match=r"the deadline is 10\.1 h away, and the run needs 10\.2 h even on demand"):
        check_deadline(TERMS.model_copy(update={"time": 10.1 * HOUR}))


@pytest.mark.parametrize("wrong", [{"work": 0}, {"time": -1}, {"changeover": float("inf")}, {"price_ratio": 1}])
def test_terms_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Terms(**{"work": 1.0, "time": 2.0, "changeover": 0.0, "price_ratio": 0.5, "lost": 0.0, "look": 0.0} | wrong)
