"""Promise: a receipt adds up to the cent in every direction, and says what it does not know."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.contract.ledger import Charge, Ledger
from job.contract.receipt import KINDS, Receipt, receipt_of, share_out
from job.contract.submission import Offer
from tests.contract.examples import START
from tests.contract.fleet import offer

CENT: Final = 36.0
"""Seconds that cost a cent at 1 $/h."""


def charge(
    attempt: int = 1,
    usd_per_hour: float | None = 1.0,
    *,
    ended: str = "done",
    on_demand: float | None = None,
    spot: bool = True,
    **seconds: float,
) -> Charge:
    bought = offer("here", usd_per_hour, spot=spot).model_copy(update={"on_demand_usd_per_hour": on_demand})
    return Charge(
        attempt=attempt,
        offer=bought,
        usd_per_hour=usd_per_hour,
        started_at=START,
        ended=ended,
        **{f"{kind}_seconds": seconds.get(kind, 0.0) for kind in KINDS},
    )


def receipt(*charges: Charge) -> Receipt:
    return receipt_of(Ledger(charges=charges))


SOME_SECONDS: Final = st.sampled_from([0.0, 0.001, 12.3456, 18.0, 36.0]) | st.floats(0, 1e6, allow_subnormal=False)
SOME_CHARGES: Final = st.lists(
    st.builds(
        lambda price, seconds: charge(1, price, **dict(zip(KINDS, seconds, strict=True))),
        st.sampled_from([0.0, 0.5, 1.0, 2.4999, 98.32]),
        st.tuples(*[SOME_SECONDS] * len(KINDS)),
    ),
    max_size=5,
)


@settings(deadline=None)
@given(SOME_CHARGES)
def test_rows_and_columns_add_up_to_the_cent_and_the_total_is_the_ledgers(charges: list[Charge]) -> None:
    ledger = Ledger(charges=tuple(charges))
    told = receipt_of(ledger)
    assert ledger.usd is not None
    assert told.cents is not None
    assert told.cents_by is not None
    assert abs(told.cents - 100 * ledger.usd) <= 0.5 + 1e-6
    assert told.cents == sum(row.cents or 0 for row in told.rows) == sum(told.cents_by.model_dump().values())
    for row, cost in zip(told.rows, charges, strict=True):
        assert row.cents_by is not None
        assert row.cents == sum(row.cents_by.model_dump().values())
        for kind, cents in row.cents_by.model_dump().items():
            assert abs(cents - getattr(cost, f"{kind}_seconds") / 36 * (cost.usd_per_hour or 0)) < 1 + 1e-6
    for kind, cents in told.cents_by.model_dump().items():
        assert cents == sum(getattr(row.cents_by, kind) for row in told.rows)
    assert told.seconds == pytest.approx(sum(told.seconds_by.model_dump().values()))


@given(st.lists(st.fractions(0, 1000), min_size=1), st.booleans())
def test_shares_are_one_of_the_two_whole_numbers_around_what_they_should_be(parts: list[Fraction], up: bool) -> None:
    exact = sum(parts, Fraction())
    total = math.ceil(exact) if up else math.floor(exact)
    shares = share_out(total, parts)
    assert sum(shares) == total
    assert all(math.floor(part) <= share <= math.ceil(part) for share, part in zip(shares, parts, strict=True))
    raised = [part % 1 for share, part in zip(shares, parts, strict=True) if share > part]
    left = [part % 1 for share, part in zip(shares, parts, strict=True) if share < part]
    assert not raised or not left or min(raised) >= max(left)


def test_a_cent_that_three_parts_share_goes_to_the_one_that_is_nearest_to_it() -> None:
    told = receipt(charge(useful=0.3 * CENT, loading=0.5 * CENT, other=0.2 * CENT))
    assert told.cents_by is not None
    assert told.cents_by.model_dump() == dict.fromkeys(KINDS, 0) | {"loading": 1}


def test_thirds_of_a_cent_do_not_vanish() -> None:
    told = receipt(*(charge(number, useful=CENT / 3) for number in (1, 2, 3)))
    assert [row.cents for row in told.rows] == [1, 0, 0]
    assert told.cents == 1


def test_a_row_says_where_it_ran_for_how_long_and_how_it_ended() -> None:
    told = receipt(charge(3, 2.5, ended="killed", useful=100, repeated=20, other=5)).rows[0]
    assert (told.attempt, told.cloud, told.region, told.gpu, told.gpus) == (3, "aws", "here", "H100", 1)
    assert (told.spot, told.usd_per_hour, told.started_at, told.ended) == (True, 2.5, START, "killed")
    assert told.seconds == 125
    assert told.seconds_by.repeated == 20


def test_goodput_is_the_useful_part_of_the_time() -> None:
    told = receipt(charge(1, 1.0, useful=60, loading=20), charge(2, 9.0, useful=30, idle=10))
    assert told.goodput == 90 / 120


def test_with_an_unknown_price_there_is_no_sum_and_what_is_known_is_still_told() -> None:
    told = receipt(charge(1, 1.0, useful=10 * CENT), charge(2, None, useful=50))
    assert (told.cents, told.cents_by) == (None, None)
    assert [row.cents for row in told.rows] == [10, None]
    assert told.rows[1].cents_by is None
    assert told.seconds == 10 * CENT + 50
    assert told.goodput == 1


def test_a_machine_that_costs_nothing_is_not_one_of_unknown_price() -> None:
    assert receipt(charge(1, 0.0, useful=50)).cents == 0


def test_without_attempts_nothing_is_owed() -> None:
    told = receipt()
    assert (told.rows, told.cents, told.seconds, told.goodput, told.on_demand_cents) == ((), 0, 0, None, 0)


def test_an_attempt_of_no_known_offer_is_told_without_a_place() -> None:
    (row,) = receipt(charge().model_copy(update={"offer": None, "usd_per_hour": None})).rows
    assert (row.cloud, row.region, row.gpu, row.spot, row.cents) == (None, None, None, None, None)


# What on demand would have cost.


def test_on_demand_does_the_useful_work_once_after_one_start() -> None:
    told = receipt(
        charge(1, 1.0, ended="killed", on_demand=3.0, provisioning=300, loading=60, useful=600, repeated=200, other=40),
        charge(2, 1.0, on_demand=3.0, provisioning=400, loading=80, useful=1000, other=100),
    )
    # Of the first attempt's other seconds, three quarters belong to steps that were kept.
    assert told.on_demand_cents == round((300 + 60 + 600 + 0.75 * 40 + 1000 + 100) / 36 * 3.0)


def test_an_attempt_whose_work_was_all_lost_would_not_have_been() -> None:
    lost = charge(1, 1.0, ended="killed", on_demand=3.0, provisioning=300, loading=60, repeated=200, other=40)
    kept = charge(2, 1.0, on_demand=3.0, provisioning=400, loading=80, useful=1000)
    assert receipt(lost, kept).on_demand_cents == round((400 + 80 + 1000) / 36 * 3.0)
    assert receipt(lost).on_demand_cents == 0


def test_an_attempt_that_only_published_did_what_had_to_be_done() -> None:
    told = receipt(
        charge(1, 1.0, ended="preempted", on_demand=3.0, provisioning=300, useful=600),
        charge(2, 1.0, on_demand=3.0, provisioning=400, loading=80, other=90),
    )
    assert told.on_demand_cents == round((300 + 600 + 90) / 36 * 3.0)


def test_on_demand_costs_what_it_cost_when_it_was_on_demand() -> None:
    told = receipt(charge(1, 4.0, spot=False, provisioning=100, loading=50, useful=900, other=30))
    assert told.on_demand_cents == told.cents == 120


def test_where_nobody_sells_it_on_demand_its_price_is_unknown() -> None:
    told = receipt(charge(1, 1.0, on_demand=None, useful=600), charge(2, 1.0, on_demand=3.0, useful=600))
    assert told.cents == 33
    assert told.on_demand_cents is None


@settings(deadline=None)
@given(SOME_CHARGES)
def test_a_receipt_is_read_back_as_it_was_written(charges: list[Charge]) -> None:
    told = receipt(*charges)
    assert Receipt.model_validate_json(told.model_dump_json()) == told


def test_the_offer_of_the_kit_is_a_real_one() -> None:
    assert isinstance(charge().offer, Offer)
