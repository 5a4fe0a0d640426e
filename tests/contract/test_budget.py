"""Promise: whatever is taken away at whatever moment, a run costs at most what it may, and lands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from job.contract.budget import LANDING_MARGIN, Budget, Reserve, can_land, seconds_left
from job.contract.outcome import Outcome
from tests.contract.examples import START
from tests.contract.fleet import Fleet, Machine, offer

BEAT: Final = 15.0
OFFERS: Final = (offer("a", 1.0), offer("b", 3.0), offer("c", 10.0, spot=False))
DEAREST: Final = 10.0
PARTS: Final = st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0])


class Fate(NamedTuple):
    """What comes over one attempt. Parts are of the longest that it may take."""

    offer: int
    again: bool
    """On the machine of the attempt before, some time after it ended."""
    provisioning: float
    loading: float
    look: float
    """Between two questions, of a heartbeat."""
    landing: float
    dies: Literal["loading", "training", "landing"] | None
    when: float
    beside: float
    """Seconds for which it lives beside its successor."""


@st.composite
def fates(draw: st.DrawFn) -> list[Fate]:
    one = st.builds(
        Fate,
        offer=st.integers(0, 2),
        again=st.booleans(),
        provisioning=PARTS,
        loading=PARTS,
        look=st.sampled_from([0.3, 1.0]),
        landing=PARTS,
        dies=st.sampled_from(["loading", "training", "landing", "landing"]),
        when=PARTS,
        beside=st.just(0.0),
    )
    return [*draw(st.lists(one, max_size=5)), draw(one)._replace(dies=None)]


@dataclass
class World:
    """A run in true time. Its attempts know what the records tell them, and nothing else."""

    budget: Budget
    reserve: Reserve
    start_seconds: float
    """The longest start there is: what the reserve says, unless a test lies to it."""
    fleet: Fleet = field(default_factory=lambda: Fleet(OFFERS))
    deaths: dict[int, float] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    landed: bool = False
    was_long: bool = False
    """Whether an attempt ever had money to train."""
    kills_since: int = 0
    """How many attempts were killed since money last was enough to train."""

    def run(self, fates: list[Fate]) -> None:
        now, machine = 0.0, None
        for fate in fates:
            machine, claimed = self._start(fate, now, machine)
            attempt = self.fleet.claim(machine, claimed, heartbeat_seconds=BEAT)
            self.began[attempt] = claimed
            died, outcome = self._live(fate, attempt, machine, claimed)
            self.deaths[attempt] = died
            self.fleet.die(machine, attempt, died, outcome=outcome)
            if outcome is not None:
                return
            self.kills_since += 1
            now = max(died - fate.beside, claimed)
        raise AssertionError("the last attempt is never killed")

    def _start(self, fate: Fate, now: float, last: Machine | None) -> tuple[Machine, float]:
        """A machine, and when the attempt on it claims."""
        wait = self.start_seconds * fate.provisioning
        if fate.again and last is not None:
            return last, max(now, last.lives[-1][1]) + wait
        return self.fleet.buy(OFFERS[fate.offer], now), now + wait

    def _live(self, fate: Fate, attempt: int, machine: Machine, claimed: float) -> tuple[float, Outcome | None]:
        """When it dies; and its own word, if it can still say one."""
        price = machine.offer.usd_per_hour
        rest = self.start_seconds * (1 - fate.provisioning)  # of a start
        if not self._can_land(attempt, claimed, price, loading=rest):
            return claimed, Outcome.OUT_OF_BUDGET
        now = claimed + rest * fate.loading
        killed = {"loading": now - rest * fate.loading * (1 - fate.when), "training": now + 900 * fate.when}.get(
            fate.dies or "", math.inf
        )
        if killed <= now:
            return killed, None
        while (left := self._seconds_left(attempt, now, price)) > 0:
            self.was_long, self.kills_since = True, 0
            # Questions whose answer is known are left out: alone, it has as much less as time has passed.
            now += max(fate.look * BEAT, left - 2 * BEAT if now - claimed > 60 else 0.0)
            if killed <= now:
                return killed, None
        if not self._can_land(attempt, now, price):
            return now, Outcome.OUT_OF_BUDGET
        seconds = self.reserve.landing_seconds * fate.landing
        if fate.dies == "landing":
            killed = now + seconds * fate.when
        if killed <= now + seconds:
            return killed, None
        self.landed = True
        return now + seconds, Outcome.OUT_OF_BUDGET

    def _spent(self, attempt: int, now: float) -> float:
        """As an attempt knows it: of itself the moment, of others what is in the bucket."""
        self.fleet.lines.clear()
        for other, began in self.began.items():
            lived = min(now, self.deaths.get(other, math.inf)) - began
            self.fleet.beat(other, lived if other == attempt else max(lived // BEAT * BEAT, 0.0))
        ledger = self.fleet.ledger(running=attempt)
        assert ledger.usd is not None
        own = ledger.charges[-1].usd_per_hour
        assert own is not None
        return ledger.usd - BEAT / 3600 * own  # the interval that a dead one might have lived

    def _seconds_left(self, attempt: int, now: float, price: float | None) -> float:
        return seconds_left(
            self.budget,
            spent_usd=self._spent(attempt, now),
            usd_per_hour=price,
            reserve=self.reserve,
            heartbeat_seconds=BEAT,
            seconds_to_deadline=None,
            dearest_usd_per_hour=DEAREST,
        )

    def _can_land(self, attempt: int, now: float, price: float | None, loading: float = 0.0) -> bool:
        return can_land(
            self.budget,
            spent_usd=self._spent(attempt, now),
            usd_per_hour=price,
            reserve=self.reserve,
            dearest_usd_per_hour=DEAREST,
            loading_seconds=loading,
        )


def world(start: float, landing: float, more_usd: float, *, longest_start: float | None = None) -> World:
    """With a budget that the first start does not spend alone: a launch that costs more than that is refused."""
    third = landing / LANDING_MARGIN / 3
    reserve = Reserve(save_seconds=third, evaluate_seconds=third, publish_seconds=third, restart_seconds=start)
    longest = start if longest_start is None else longest_start
    return World(Budget(max_usd=longest * DEAREST / 3600 + more_usd), reserve, longest)


MONEY: Final = st.sampled_from([0.001, 0.1, 0.5, 1.0, 2.0, 4.0, 9.0])
STARTS: Final = st.sampled_from([20.0, 300.0])
LANDINGS: Final = st.sampled_from([3.0, 90.0, 400.0])


@settings(deadline=None)
@given(fates(), STARTS, LANDINGS, MONEY)
def test_a_run_never_costs_more_than_it_may_and_lands_unless_taken_away_twice(
    fates: list[Fate], start: float, landing: float, money: float
) -> None:
    life = world(start, landing, money)
    life.run(fates)
    assert life.budget.max_usd is not None
    assert life.fleet.usd <= life.budget.max_usd + 1e-9  # not even by the one heartbeat that it might
    if life.was_long and life.kills_since <= 1:
        assert life.landed


@settings(deadline=None)
@given(fates(), LANDINGS, MONEY)
def test_where_nothing_is_taken_away_nothing_is_kept_back_for_it_and_a_run_lands_in_time(
    fates: list[Fate], landing: float, money: float
) -> None:
    life = world(0.0, landing, money, longest_start=300.0)
    life.run(fates[-1:])
    assert life.budget.max_usd is not None
    assert life.fleet.usd <= life.budget.max_usd + 1e-9
    assert life.landed or not life.was_long


@settings(deadline=None)
@given(fates(), STARTS, LANDINGS, MONEY, st.sampled_from([12.0, 30.0]))
def test_an_attempt_that_lives_on_beside_its_successor_costs_no_more_than_those_seconds(
    fates: list[Fate], start: float, landing: float, money: float, beside: float
) -> None:
    life = world(start, landing, money)
    life.run([fate._replace(beside=beside, again=False) for fate in fates])
    assert life.budget.max_usd is not None
    assert life.fleet.usd <= life.budget.max_usd + beside / 3600 * DEAREST + 1e-9


@settings(deadline=None)
@given(fates(), LANDINGS, MONEY)
def test_a_start_that_takes_longer_than_was_kept_back_costs_as_much_more_once(
    fates: list[Fate], landing: float, money: float
) -> None:
    life = world(20.0, landing, money, longest_start=300.0)
    life.run(fates)
    assert life.budget.max_usd is not None
    assert life.fleet.usd <= life.budget.max_usd + (300 - 20) / 3600 * DEAREST + 1e-9


def left(**changes: float | None) -> float:
    """Of 10 $ of which 1 is spent, at 3.60 $/h: a second costs 0.1 cent. A landing takes 30 s, a heartbeat is 10 s."""
    reserve = Reserve(save_seconds=5, evaluate_seconds=10, publish_seconds=5, restart_seconds=changes.pop("start", 0))
    given = {"spent_usd": 1.0, "usd_per_hour": 3.6, "seconds_to_deadline": None} | changes
    budget = Budget(max_usd=given.pop("max_usd", 10.0))
    return seconds_left(budget, reserve=reserve, heartbeat_seconds=10, **given)  # type: ignore[arg-type]


def test_where_nothing_is_taken_away_a_landing_and_a_heartbeat_are_kept_back() -> None:
    assert left() == pytest.approx(9000 - 30 - 10)


def test_where_machines_are_taken_away_so_are_a_lost_landing_and_two_starts_at_the_dearest_price() -> None:
    assert left(start=100) == pytest.approx(9000 - 30 - 10 - 10 - 30 - 2 * 100)
    assert left(start=100, dearest_usd_per_hour=7.2) == pytest.approx(9000 - 30 - 10 - 10 - 2 * (30 + 2 * 100))
    assert left(start=100, dearest_usd_per_hour=0.1) == left(start=100)  # this one costs what it costs


def test_who_asks_rarely_has_to_land_earlier() -> None:
    assert left(look_seconds=500) == pytest.approx(9000 - 30 - 500)
    assert left(look_seconds=5) == left()


def test_a_deadline_leaves_time_to_land_here_or_on_another_machine() -> None:
    assert left(seconds_to_deadline=1000) == pytest.approx(1000 - 30 - 10)
    assert left(seconds_to_deadline=1000, start=100) == pytest.approx(1000 - 30 - 10 - 130)
    assert left(seconds_to_deadline=-5) < 0
    assert left(seconds_to_deadline=1e9) == left()


@pytest.mark.parametrize("price", [None, 0.0])
def test_without_a_price_money_bounds_nothing_and_a_deadline_does(price: float | None) -> None:
    assert left(usd_per_hour=price) == math.inf
    assert left(usd_per_hour=price, seconds_to_deadline=1000) == pytest.approx(960)
    assert can_land(Budget(max_usd=1), spent_usd=9, usd_per_hour=price, reserve=Reserve())


def test_without_a_ceiling_nothing_is_bounded() -> None:
    assert left(max_usd=None) == math.inf
    assert can_land(Budget(), spent_usd=9e9, usd_per_hour=1, reserve=Reserve())


def test_who_cannot_pay_for_landing_and_its_successors_start_ends_at_once() -> None:
    reserve = Reserve(save_seconds=5, evaluate_seconds=10, publish_seconds=5, restart_seconds=100)

    def can(spent_usd: float, loading_seconds: float = 0.0) -> bool:
        return can_land(
            Budget(max_usd=10),
            spent_usd=spent_usd,
            usd_per_hour=3.6,
            reserve=reserve,
            dearest_usd_per_hour=7.2,
            loading_seconds=loading_seconds,
        )

    needs = 0.001 * (30 + 2 * 100)
    assert can(10 - needs - 0.001)
    assert not can(10 - needs + 0.001)
    assert not can(10 - needs - 0.001, loading_seconds=50)


@pytest.mark.parametrize("wrong", [{"max_usd": 0}, {"max_usd": math.inf}, {"max_hourly_usd": -1}, {"usd": 1}])
def test_a_ceiling_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(wrong)


def test_a_budget_is_none_when_it_bounds_nothing() -> None:
    assert Budget().is_none
    for bound in ({"max_usd": 1.0}, {"max_hourly_usd": 1.0}, {"deadline": START}):
        assert not Budget.model_validate(bound).is_none
