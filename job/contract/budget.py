"""The Budget: how much a run may cost, and when it has to land. Pure arithmetic; the Ledger says what it has cost.

What holds, whatever is taken away at whatever moment (tests/contract/test_budget.py): if every attempt trains only
while `seconds_left` is positive, loads and lands only if it `can_land`, and otherwise ends at once, the machines of a
run never cost more than max_usd and one heartbeat; and it lands unless machines are taken away twice after its money
became short. For this a start takes at most `restart_seconds` and a landing `landing_seconds`, and no machine costs
more than `dearest_usd_per_hour`. A start that takes longer costs as much more, once. So do the seconds in which an
attempt lives on beside its successor.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

FIRST_LANDING_SECONDS: Final = 3.0
"""Taken for a landing before its parts were measured: the first save comes within seconds of the first step."""
LANDING_MARGIN: Final = 1.5
"""How much longer a landing may take than it took before: uploads vary more than anything else here."""

_ROUNDING: Final = 1e-9
"""Dollars."""


def _has_a_year_in_utc(moment: datetime) -> datetime:
    """A few hours around the first and the last year of the calendar have none, and cannot be told."""
    try:
        moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("should be a moment within the years 1 to 9999, in UTC") from error
    return moment


class Budget(BaseModel):
    """The ceiling of a run, over all its attempts. What is absent bounds nothing."""

    # Strict, as the rest of the recipe; but JSON has no moments, so a deadline is read from its text.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    max_usd: float | None = Field(
        default=None, gt=0, description="Dollars, over all attempts. Before them the best adapter so far is published."
    )
    max_hourly_usd: float | None = Field(default=None, gt=0, description="No machine that costs more is bought.")
    deadline: Annotated[AwareDatetime, AfterValidator(_has_a_year_in_utc)] | None = Field(
        default=None,
        strict=False,
        description='"2026-12-01T18:00:00+01:00". Before it the best adapter so far is published.',
    )

    @property
    def is_none(self) -> bool:
        return self.max_usd is None and self.max_hourly_usd is None and self.deadline is None


class Reserve(BaseModel):
    """What is kept back to land, seconds. Measured on this run; the first guess is replaced as soon as it can be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    save_seconds: float = FIRST_LANDING_SECONDS / 3
    """From the decision to save until the commit."""
    evaluate_seconds: float = FIRST_LANDING_SECONDS / 3
    publish_seconds: float = FIRST_LANDING_SECONDS / 3
    restart_seconds: float = 0.0
    """To get another machine as far as this one: landing depends on it if this one is taken away at the worst moment.
    0 where none is taken away; one that is nevertheless may then cost a start more than the budget."""

    @property
    def landing_seconds(self) -> float:
        return LANDING_MARGIN * (self.save_seconds + self.evaluate_seconds + self.publish_seconds)

    @property
    def seconds(self) -> float:
        """A landing; and where machines are taken away, one that is lost as it ends, and a start, before it."""
        lost = self.landing_seconds + self.restart_seconds if self.restart_seconds > 0 else 0.0
        return lost + self.landing_seconds


def seconds_left(
    budget: Budget,
    *,
    spent_usd: float,
    usd_per_hour: float | None,
    reserve: Reserve,
    heartbeat_seconds: float,
    seconds_to_deadline: float | None,
    dearest_usd_per_hour: float | None = None,
    look_seconds: float = 0.0,
) -> float:
    """For how many more seconds an attempt may train before it has to land; negative when it is too late for that.

    Kept back are the time until the attempt asks again; a landing; and where machines are taken away, a landing that is
    lost as it ends, the interval that the ledger counts then and that may not have been lived, a start of another
    machine to land on, and a start of one more should that one be taken away too: it finds nothing left, and ends.

    Args:
        spent_usd: by all attempts until now, this one included.
        usd_per_hour: of this machine; None when nobody knows. Then money bounds nothing, and `ftjob launch` refuses.
        seconds_to_deadline: by a trusted clock; None without a deadline.
        dearest_usd_per_hour: of any machine that may come after this one; None for the same price.
        look_seconds: until this is asked again, if that is more than a heartbeat: a long step, an evaluation.
    """
    until_asked = max(look_seconds, heartbeat_seconds)
    left = math.inf
    if budget.max_usd is not None and usd_per_hour is not None and usd_per_hour > 0:
        here, there = usd_per_hour / 3600, max(usd_per_hour, dearest_usd_per_hour or 0.0) / 3600
        kept = here * (until_asked + reserve.landing_seconds)
        if reserve.restart_seconds > 0:
            kept += here * heartbeat_seconds + there * (2 * reserve.restart_seconds + reserve.landing_seconds)
        left = (budget.max_usd - spent_usd - kept) / here
    if seconds_to_deadline is not None:
        left = min(left, seconds_to_deadline - reserve.seconds - until_asked)
    return left


def can_land(
    budget: Budget,
    *,
    spent_usd: float,
    usd_per_hour: float | None,
    reserve: Reserve,
    dearest_usd_per_hour: float | None = None,
    loading_seconds: float = 0.0,
) -> bool:
    """Whether an attempt that may not train may still land. If not it ends at once: its successor could not pay either.

    A start of another machine is kept back: should this one be taken away, the backend buys that before anybody can
    look at the ledger.

    Args:
        spent_usd: by all attempts until now, this one included.
        usd_per_hour: of this machine; None when nobody knows.
        dearest_usd_per_hour: of any machine that may come after this one; None for the same price.
        loading_seconds: until the attempt could begin to land.
    """
    if budget.max_usd is None or not usd_per_hour:
        return True
    there = max(usd_per_hour, dearest_usd_per_hour or 0.0)
    needs = usd_per_hour * (loading_seconds + reserve.landing_seconds) + there * reserve.restart_seconds
    return budget.max_usd - spent_usd >= needs / 3600 - _ROUNDING
