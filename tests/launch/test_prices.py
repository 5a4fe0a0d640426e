"""Promise: what is bought is the cheapest of what was asked for, and spot only where it saves money."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.errors import BadInput
from launch.prices import Gpu, Listed, Policy, choose, nobody_sells, offers_of, parse_gpus
from tests.launch.fake_sky import H100 as ROWS

PRICES = st.none() | st.floats(0.01, 100)
LISTED = st.builds(
    Listed,
    cloud=st.sampled_from(["aws", "gcp", "lambda"]),
    region=st.sampled_from(["r1", "r2"]),
    instance_type=st.sampled_from(["a", "b"]),
    gpu=st.sampled_from(["H100", "A100"]),
    gpus=st.sampled_from([1.0, 8.0]),
    on_demand=PRICES,
    spot=PRICES,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("H100", (Gpu("H100"),)),
        ("H100:8", (Gpu("H100", 8),)),
        ("H100:1, A100-80GB:8", (Gpu("H100"), Gpu("A100-80GB", 8))),
        ("H100,H100:1", (Gpu("H100"),)),
    ],
)
def test_gpus_are_read_as_people_write_them(text: str, found: tuple[Gpu, ...]) -> None:
    assert parse_gpus(text) == found


@pytest.mark.parametrize("text", ["", ",", "H100:", "H100:0", "H100:x", "H100;rm", "H100:1:2", "-H100", "H100 A100"])
def test_gpus_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--gpu"):
        parse_gpus(text)


def test_the_cheapest_offer_is_taken_and_the_others_follow_in_order() -> None:
    choice = choose(offers_of(ROWS, parse_gpus("H100")), Policy.SPOT)
    assert [(offer.cloud, offer.usd_per_hour) for offer in choice.order] == [("nebius", 1.25), ("gcp", 1.54)]
    assert "48% under the cheapest on-demand offer, $2.39/h on demand (runpod/US)" in choice.why
    assert choice.notes == (
        "2 of 4 spot offers are left out: they cost as much as $2.39/h on demand (runpod/US) or more",
    )


def test_on_demand_is_taken_where_spot_is_no_cheaper() -> None:
    dear = [Listed("azure", "eastus", "nc", "H100", 1, 6.98, 6.98), Listed("lambda", "r", "g", "H100", 1, 2.49, None)]
    choice = choose(offers_of(dear, parse_gpus("H100")), Policy.SPOT)
    assert [offer.kind for offer in choice.order] == ["on demand", "on demand"]
    assert choice.order[0].cloud == "lambda"
    assert "no spot offer is cheaper" in choice.why


def test_policies_take_what_they_say() -> None:
    offers = offers_of(ROWS, parse_gpus("h100"))
    assert {offer.spot for offer in choose(offers, Policy.ON_DEMAND).order} == {False}
    both = choose(offers, Policy.SPOT_THEN_ON_DEMAND).order
    assert [offer.spot for offer in both] == [True] * 2 + [False] * 6


def test_a_region_and_a_count_are_kept_to() -> None:
    assert {offer.region for offer in offers_of(ROWS, parse_gpus("H100"), region="us-east-1")} == {"us-east-1"}
    assert {offer.gpus for offer in offers_of(ROWS, parse_gpus("A100-80GB:8"))} == {8}
    assert offers_of(ROWS, parse_gpus("A100-80GB")) == ()


@given(st.lists(LISTED, max_size=12), st.sampled_from(Policy))
def test_nothing_offered_is_cheaper_than_what_is_bought(rows: list[Listed], policy: Policy) -> None:
    offers = offers_of(rows, (Gpu("H100"), Gpu("A100", 8)))
    assert all((o.gpu, o.gpus) in {("H100", 1), ("A100", 8)} for o in offers)
    try:
        order = choose(offers, policy).order
    except BadInput:
        assert not [offer for offer in offers if policy is not Policy.ON_DEMAND or not offer.spot]
        return
    prices = [offer.usd_per_hour or 0 for offer in order]
    allowed = [offer.usd_per_hour or 0 for offer in offers if policy is not Policy.ON_DEMAND or not offer.spot]
    assert prices[0] == min(allowed)
    if policy is Policy.ON_DEMAND:
        assert not any(offer.spot for offer in order)
    on_demand = [offer.usd_per_hour or 0 for offer in offers if not offer.spot]
    assert all((offer.usd_per_hour or 0) < min(on_demand, default=1e9) for offer in order if offer.spot)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("H1000", "did you mean H100"),
        ("H100:3", "H100 by 1"),
        ("A100-80GB", "A100-80GB by 8"),
        ("Quantum", "sold there: A100-80GB, H100"),
    ],
)
def test_what_nobody_sells_is_refused_with_what_comes_nearest(asked: str, says: str) -> None:
    error = nobody_sells(parse_gpus(asked), ROWS, where="aws, gcp")
    assert asked.partition(":")[0] in error.message
    assert says in error.hint
