"""What a person says of money on the command line, and what it makes of the budget that holds."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from job.contract.budget import Budget
from job.contract.errors import BadInput
from job.contract.records import RunRecord, utc
from job.storage import Store
from launch.here import Elsewhere
from launch.runs import RunReader
from launch.wish import Wish

_DOLLARS = re.compile(r"(\+)?\$?([0-9]+(?:\.[0-9]+)?)")


def budget_for(base: Budget, *, dollars: str | None, by: str | None, now: datetime) -> Budget:
    """The budget of a launch.

    Args:
        base: of the recipe, or of the run's last submission.
        dollars: "40" is the ceiling over all attempts, "+20" raises the one that holds.
        by: a moment in ISO 8601; without a zone in this machine's.

    Raises:
        BadInput: one of them cannot be read, or is too late.
    """
    if dollars is not None:
        base = base.model_copy(update={"max_usd": _dollars(dollars, base.max_usd)})
    if by is not None:
        base = base.model_copy(update={"deadline": _moment(by)})
    if base.deadline is not None and base.deadline <= now:
        raise BadInput(f"the deadline {utc(base.deadline)} is over", hint="--by names another")
    return base


def budget_and_spent(
    record: RunRecord, store: Store, wish: Wish, *, given: Budget | None = None
) -> tuple[Budget, float]:
    """What the run may cost, as said now, else as its last submission said, else as its recipe says; and what it has
    cost.

    Args:
        given: of the recipe that is named together with a run. What was written into it since the launch is said now.

    Raises:
        BadInput: it is used up; or as `budget_for`.
        Unreachable: its records cannot be read for now, so that nobody knows what holds.
    """
    now, base = datetime.now(UTC), record.recipe.budget
    if wish.run_id is None:
        return budget_for(base, dollars=wish.budget, by=wish.by, now=now), 0.0
    view = RunReader(store, record.run_id, Elsewhere("")).poll(now).certain
    written = {} if given is None else {name: said for name, said in given if said not in (None, getattr(base, name))}
    budget = budget_for(view.budget.model_copy(update=written), dollars=wish.budget, by=wish.by, now=now)
    if budget.max_usd is not None and view.spent_usd is not None and view.spent_usd >= budget.max_usd:
        raise BadInput(
            f"run {record.run_id} has spent ${view.spent_usd:.2f} of its ${budget.max_usd:.2f}",
            # With what the recipe says "+20" would come to the same sum again.
            hint=f"--budget {math.ceil(view.spent_usd) + 20} allows more"
            if "max_usd" in written
            else "--budget +20 allows so much more",
        )
    return budget, view.spent_usd or 0.0


def _dollars(text: str, holds: float | None) -> float:
    match = _DOLLARS.fullmatch(text.strip())
    if match is None or not 0 < float(match[2]) < math.inf:
        raise BadInput(f"--budget {text!r} is no sum of dollars", hint="--budget 40, or --budget +20 for so much more")
    if not match[1]:
        return float(match[2])
    if holds is None:
        raise BadInput(f"--budget {text} would raise a budget, and there is none", hint="name the whole: --budget 40")
    return holds + float(match[2])


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:  # no moment, or one that is in no year of our calendar in UTC
        raise BadInput(f"--by {text!r} is no moment", hint="for example: --by 2026-12-01T18:00") from error
