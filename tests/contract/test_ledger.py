"""Promise: no second that was paid for is missing, whatever was killed and whatever the calendars said."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.contract.ledger import Charge, Ledger, ledger_of, offer_of
from job.contract.metrics import Step
from job.contract.outcome import Outcome
from tests.contract.fleet import Fleet, Machine, offer

SPOT: Final = offer("here", 1.5)
DEAR: Final = offer("there", 8.0, spot=False)
OWN: Final = offer("hall", 2.0, cloud="slurm", spot=False)
OFFERS: Final = (SPOT, DEAR, OWN)
DAYS: Final = st.sampled_from([0.0, 9_000.0, 20_000.0])
"""Of a calendar that jumps: a line after another may have been written half a century before it."""
PARTS: Final = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
"""Of a heartbeat, between a line and the next, and between the last and the death."""
LINES: Final = st.lists(st.tuples(PARTS, DAYS, st.sampled_from("hrs")), max_size=6)


@st.composite
def histories(draw: st.DrawFn) -> Fleet:
    """Attempts on machines of any price: one after the other, or beside its predecessor for half a minute; on another
    machine, or on the same; killed at any moment between two heartbeats, or ended by their own word."""
    fleet, now, number = Fleet(OFFERS), 0.0, 0
    machine: Machine | None = None
    for _ in range(draw(st.integers(1, 5))):
        beside = draw(st.sampled_from([0.0, 0.0, 12.0, 30.0]))
        if machine is None or draw(st.booleans()):
            began = max(now - beside, 0.0)
            machine = fleet.buy(draw(st.sampled_from(OFFERS)), began - draw(st.sampled_from([0.0, 1.0, 250.0])))
        else:
            began = max(now - beside, machine.lives[-1][0]) + draw(st.sampled_from([0.0, 3.0, 90.0]))
        beat = draw(st.sampled_from([1.0, 15.0]))
        attempt = fleet.claim(machine, began, heartbeat_seconds=beat, days=draw(DAYS))
        elapsed = 0.0
        for part, days, kind in draw(LINES):
            elapsed += part * beat
            if kind == "h":
                fleet.beat(attempt, elapsed, days)
            elif kind == "r":
                number = max(number - 2, 0)
                fleet.restored(attempt, number, elapsed, days)
            else:
                number += 1
                fleet.step(attempt, number, 7.0, elapsed, days)
        died = began + elapsed + draw(PARTS) * beat
        fleet.die(machine, attempt, died, outcome=draw(st.sampled_from([None, None, Outcome.PREEMPTED])))
        now = max(now, died)
        fleet.look()
    return fleet


@settings(deadline=None)
@given(histories())
def test_no_second_is_missing_and_a_killed_attempt_counts_at_most_one_interval_too_much(fleet: Fleet) -> None:
    """Asked after every death, as jobs do."""
    for look in fleet.looks:
        assert look.true_usd - 1e-9 <= look.ledger_usd <= look.true_usd + look.intervals_usd + 1e-9


@settings(deadline=None)
@given(histories())
def test_the_parts_of_a_charge_are_its_seconds_and_steps_are_counted_where_they_were_done(fleet: Fleet) -> None:
    for charge in fleet.ledger().charges:
        done = sum(line.seconds for line in fleet.lines.get(charge.attempt, ()) if isinstance(line, Step))
        assert charge.useful_seconds + charge.repeated_seconds <= done + 1e-9
        assert min(charge.provisioning_seconds, charge.idle_seconds) == 0


def seconds(charge: Charge) -> tuple[float, ...]:
    """Provisioning, idle, loading, useful, repeated, other."""
    return (
        charge.provisioning_seconds,
        charge.idle_seconds,
        charge.loading_seconds,
        charge.useful_seconds,
        charge.repeated_seconds,
        charge.other_seconds,
    )


def test_a_life_is_told_by_what_its_seconds_were_spent_on() -> None:
    fleet = Fleet(OFFERS)
    machine = fleet.buy(SPOT, 0)
    fleet.claim(machine, 300)
    fleet.restored(1, 0, 40)
    for number in (1, 2, 3, 4):
        fleet.step(1, number, 10, 40 + number * 10)
    fleet.beat(1, 90)
    fleet.die(machine, 1, 399)  # killed: counted until 90 + 15 after the claim. Steps 3 and 4 were not committed
    fleet.claim(machine, 430)
    fleet.restored(2, 2, 20)
    for number in (3, 4, 5):
        fleet.step(2, number, 10, 20 + number * 10)
    fleet.die(machine, 2, 510, outcome=Outcome.DONE)
    first, second = fleet.ledger().charges
    assert (first.ended, second.ended) == ("killed", "done")
    assert seconds(first) == (300, 0, 40, 20, 20, 25)
    assert seconds(second) == (0, 25, 20, 30, 0, 30)
    assert fleet.ledger().seconds == 510
    assert fleet.ledger().usd == pytest.approx(510 / 3600 * 1.5)
    assert fleet.ledger().restart_seconds == 340


def test_steps_that_nobody_has_done_again_yet_are_lost_all_the_same() -> None:
    fleet = Fleet(OFFERS)
    for number, at in ((1, 0), (2, 100)):
        machine = fleet.buy(SPOT, at)
        fleet.claim(machine, at)
        fleet.restored(number, 0, 0)
        fleet.step(number, 1, 10, 10)
        fleet.die(machine, number, at + 10, outcome=Outcome.PREEMPTED)
    third = fleet.buy(SPOT, 200)
    fleet.claim(third, 200)
    assert [charge.useful_seconds for charge in fleet.ledger().charges] == [0, 10, 0]
    fleet.restored(3, 0, 0)  # the checkpoint of the second is damaged, say
    assert [charge.repeated_seconds for charge in fleet.ledger().charges] == [10, 10, 0]


def test_a_machine_of_ones_own_is_not_charged_for_the_time_between_attempts() -> None:
    fleet = Fleet(OFFERS)
    node = fleet.buy(OWN, -1e6)
    for attempt, at in ((1, 0), (2, 86_400)):
        fleet.claim(node, at)
        fleet.die(node, attempt, at + 60, outcome=Outcome.PREEMPTED)
    assert [charge.seconds for charge in fleet.ledger().charges] == [60, 60]


def test_two_attempts_beside_each_other_on_one_machine_share_its_bill() -> None:
    fleet = Fleet(OFFERS)
    machine = fleet.buy(SPOT, 0)
    fleet.claim(machine, 100)
    fleet.die(machine, 1, 200, outcome=Outcome.PREEMPTED)
    fleet.claim(machine, 170)
    fleet.die(machine, 2, 300, outcome=Outcome.PREEMPTED)
    fleet.claim(machine, 290)
    fleet.die(machine, 3, 295, outcome=Outcome.PREEMPTED)
    assert [charge.seconds for charge in fleet.ledger().charges] == [200, 100, 0]


def test_machines_that_cannot_be_told_apart_are_each_their_own() -> None:
    fleet = Fleet(OFFERS)
    for attempt in (1, 2):
        machine = fleet.buy(SPOT, 0)
        machine.id = ""
        fleet.claim(machine, 100)
        fleet.die(machine, attempt, 110, outcome=Outcome.PREEMPTED)
    assert [charge.seconds for charge in fleet.ledger().charges] == [110, 110]


def test_an_attempt_that_may_live_is_charged_as_if_it_had_just_died() -> None:
    fleet = Fleet(OFFERS)
    fleet.claim(fleet.buy(SPOT, 0), 100)
    fleet.beat(1, 30)
    (charge,) = fleet.ledger(running=1).charges
    assert (charge.ended, charge.seconds) == ("running", 145)


def test_a_sum_with_an_unknown_price_is_unknown_and_its_seconds_are_not() -> None:
    unknown = offer("nowhere", None)
    fleet = Fleet((SPOT, unknown))
    for attempt, bought in enumerate((SPOT, unknown), start=1):
        machine = fleet.buy(bought, 0)
        fleet.claim(machine, 0)
        fleet.die(machine, attempt, 3600, outcome=Outcome.PREEMPTED)
    ledger = fleet.ledger()
    assert [charge.usd for charge in ledger.charges] == [1.5, None]
    assert (ledger.usd, ledger.seconds) == (None, 7200)


def test_without_attempts_nothing_is_spent() -> None:
    assert (Ledger().usd, Ledger().seconds, Ledger().restart_seconds) == (0, 0, 0)


def test_where_spot_and_on_demand_fit_the_dearer_is_counted() -> None:
    fleet = Fleet((SPOT, offer("here", 4.0, spot=False), DEAR))
    fleet.claim(fleet.buy(SPOT, 0), 0)
    (charge,) = fleet.ledger().charges
    assert charge.usd_per_hour == 4


def test_an_attempt_of_no_submission_ran_on_no_offer() -> None:
    fleet = Fleet(OFFERS)
    fleet.claim(fleet.buy(SPOT, 0), 100)
    assert offer_of(fleet.claims[1], None) is None
    (charge,) = ledger_of(fleet.claims, {}, {}, []).charges
    assert (charge.offer, charge.usd, charge.seconds) == (None, None, 15)
