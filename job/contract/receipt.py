"""The Receipt: what a run has cost, attempt by attempt, and for what. Pure; the Ledger says how many seconds.

Money is shown in whole cents, and every row and column adds up: the ledger's sum is rounded once, and shared out by
Hamilton's method of largest remainders (Balinski and Young, "Fair Representation", 2nd edition 2001, chapter 3), to the
attempts and then to the kinds of each attempt. No cent is shown where nothing was spent, and none differs from the
exact amount by a cent or more; only the sum of a column may, by less than a cent an attempt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from pydantic import AwareDatetime

from job.contract.ledger import Charge, Ledger
from job.contract.outcome import Outcome
from job.contract.records import Part

_DELIVERED: Final = frozenset({Outcome.DONE.value, Outcome.OUT_OF_BUDGET.value})


class Seconds(Part):
    """Of machine time, by what they were for; Charge says what each is."""

    useful: float
    repeated: float
    provisioning: float
    idle: float
    loading: float
    other: float


class Cents(Part):
    """What those seconds cost, in whole cents."""

    useful: int
    repeated: int
    provisioning: int
    idle: int
    loading: int
    other: int


KINDS: Final = tuple(Seconds.model_fields)


class ReceiptRow(Part):
    """One attempt. Where nobody knows the offer or its price, that is None, and so are the cents."""

    attempt: int
    cloud: str | None
    region: str | None
    gpu: str | None
    gpus: int | None
    spot: bool | None
    usd_per_hour: float | None
    started_at: AwareDatetime
    """By that machine's calendar."""
    ended: str
    """An outcome; "killed" when it never said; "running" while it may be."""
    seconds: float
    seconds_by: Seconds
    cents: int | None
    cents_by: Cents | None


class Receipt(Part):
    """All attempts and their sums. Equal sums in every direction."""

    rows: tuple[ReceiptRow, ...]
    seconds: float
    seconds_by: Seconds
    cents: int | None
    """None when any price is unknown: a sum that leaves something out would be a lie."""
    cents_by: Cents | None
    goodput: float | None
    """Useful seconds of all seconds, 0 to 1; None before there are any."""
    max_usd: float | None
    """The ceiling; None without one."""
    on_demand_cents: int | None
    """About what machines that nobody takes away would have cost, in the same places; None when their price is
    unknown."""


def receipt_of(ledger: Ledger, *, max_usd: float | None = None) -> Receipt:
    """The receipt of a run."""
    costs = [_cents(charge) for charge in ledger.charges]
    totals = _row_totals(ledger, costs)
    rows = tuple(map(_row, ledger.charges, costs, totals))
    known = [row.cents_by for row in rows if row.cents_by is not None]
    usd = ledger.usd
    seconds = ledger.seconds
    useful = sum(charge.useful_seconds for charge in ledger.charges)
    return Receipt(
        rows=rows,
        seconds=seconds,
        seconds_by=Seconds(**{kind: sum(getattr(row.seconds_by, kind) for row in rows) for kind in KINDS}),
        cents=None if usd is None else sum(row.cents or 0 for row in rows),
        cents_by=None if usd is None else Cents(**{kind: sum(getattr(by, kind) for by in known) for kind in KINDS}),
        goodput=useful / seconds if seconds > 0 else None,
        max_usd=max_usd,
        on_demand_cents=_on_demand_cents(ledger.charges),
    )


def share_out(total: int, amounts: Sequence[Fraction]) -> list[int]:
    """`total` in whole parts that are as near to these amounts as they can be: each is one of the two whole numbers
    around its amount, and those with the largest remainders are rounded up. Of equal ones, the first.

    Args:
        amounts: not negative; `total` is their sum, rounded up or down.
    """
    parts = [math.floor(amount) for amount in amounts]
    by_remainder = sorted(range(len(amounts)), key=lambda index: parts[index] - amounts[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _seconds(charge: Charge) -> Seconds:
    return Seconds(**{kind: getattr(charge, f"{kind}_seconds") for kind in KINDS})


def _cents(charge: Charge) -> list[Fraction] | None:
    """What each kind cost, exactly: sums of fractions do not depend on their order."""
    if charge.usd_per_hour is None:
        return None
    rate = Fraction(charge.usd_per_hour) / 36
    return [Fraction(getattr(charge, f"{kind}_seconds")) * rate for kind in KINDS]


def _row_totals(ledger: Ledger, costs: Sequence[list[Fraction] | None]) -> list[int | None]:
    """Cents of each attempt. Where some are unknown there is no sum to keep, and each of the others is rounded."""
    exact = [None if cost is None else sum(cost, Fraction()) for cost in costs]
    known = [cost for cost in exact if cost is not None]
    if len(known) < len(exact):
        return [None if cost is None else round(cost) for cost in exact]
    return [*share_out(round(sum(known, Fraction())), known)]


def _row(charge: Charge, costs: list[Fraction] | None, cents: int | None) -> ReceiptRow:
    offer = charge.offer
    cents_by = None
    if costs is not None and cents is not None:
        cents_by = Cents(**dict(zip(KINDS, share_out(cents, costs), strict=True)))
    return ReceiptRow(
        attempt=charge.attempt,
        cloud=offer.cloud if offer else None,
        region=offer.region if offer else None,
        gpu=offer.gpu if offer else None,
        gpus=offer.gpus if offer else None,
        spot=offer.spot if offer else None,
        usd_per_hour=charge.usd_per_hour,
        started_at=charge.started_at,
        ended=charge.ended,
        seconds=charge.seconds,
        seconds_by=_seconds(charge),
        cents=cents,
        cents_by=cents_by,
    )


def _on_demand_cents(charges: Sequence[Charge]) -> int | None:
    """The same useful work once, at the price that each part of it has on demand where it was done; one provisioning
    and one loading; and of everything else, evaluations and saves mostly, the share of the steps that were kept."""
    usd, started = 0.0, False
    for charge in charges:
        steps = charge.useful_seconds + charge.repeated_seconds
        kept = charge.useful_seconds / steps if steps > 0 else float(charge.ended in _DELIVERED)
        seconds = charge.useful_seconds + kept * charge.other_seconds
        if not started and kept > 0:
            started = True
            seconds += charge.provisioning_seconds + charge.loading_seconds
        if seconds == 0:
            continue
        price = _on_demand_usd_per_hour(charge)
        if price is None:
            return None
        usd += seconds / 3600 * price
    return round(100 * usd)


def _on_demand_usd_per_hour(charge: Charge) -> float | None:
    if charge.offer is None or not charge.offer.spot:
        return charge.usd_per_hour
    return charge.offer.on_demand_usd_per_hour
