"""A watched run with a deadline: what is known of it now, put to the rule of launch/deadline.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from job.contract.status import BackendState
from launch.bill import INTERRUPTED, ONCE
from launch.deadline import Choice, Decision, Machine, Now, Terms, decide
from launch.plan import Plan
from launch.prices import Policy
from launch.runs import Poll

LOOK_SECONDS: Final = 120.0
"""Between two decisions of a watcher; SkyPilot's own word is up to half a minute old."""


@dataclass
class Course:
    """What a launch with a deadline goes by, and where it has come to.

    Args:
        deadline, began: of the whole run, so that every watcher goes by the same schedule.
        work_seconds: of the whole run on the machine that is bought, by the quote.
        changeover_seconds: to the first step on another machine, pessimistic, by the quote.
        lost_seconds: between two commits.
        price_ratio: spot over on demand, below 1.
        policy: what is bought now.
    """

    deadline: datetime
    began: datetime
    work_seconds: float
    changeover_seconds: float
    lost_seconds: float
    price_ratio: float
    policy: Policy = Policy.SPOT
    wanted: Policy | None = None
    """What to buy instead; None while the course is right."""
    reason: str = ""
    _looked_at: datetime | None = field(default=None, repr=False)

    @property
    def terms(self) -> Terms:
        return Terms(
            work=self.work_seconds,
            time=max((self.deadline - self.began).total_seconds(), 1.0),
            changeover=self.changeover_seconds,
            price_ratio=self.price_ratio,
            lost=self.lost_seconds,
            look=LOOK_SECONDS,
        )

    def first(self, now: datetime) -> Decision:
        """What to buy before there is anything."""
        time_left = (self.deadline - now).total_seconds()
        return decide(self.terms, Now(self.work_seconds, time_left, Machine.NONE, spot_available=True))

    def look(self, poll: Poll, now: datetime) -> bool:
        """Whether something else is to be bought from now on; `wanted` and `reason` say what and why."""
        if self._looked_at is not None and (now - self._looked_at).total_seconds() < LOOK_SECONDS / 2:
            return self.wanted is not None
        self._looked_at = now
        if poll.view.status.is_over or poll.described.state is BackendState.UNREACHABLE:
            return False
        decision = decide(self.terms, self._now(poll, now))
        # To SkyPilot "spot" and "wait" are one thing: it looks for spot by itself, and buys nothing else.
        wanted = Policy.ON_DEMAND if decision.choice is Choice.ON_DEMAND else Policy.SPOT
        if wanted is not self.policy:
            self.wanted, self.reason = wanted, decision.reason
        return self.wanted is not None

    def _now(self, poll: Poll, now: datetime) -> Now:
        view = poll.view
        on_demand = self.policy is Policy.ON_DEMAND
        on = Machine.NONE
        if poll.described.state is BackendState.ALIVE and view.attempts:
            on = Machine.ON_DEMAND if on_demand else Machine.SPOT
        computing = view.step is not None and view.tokens_per_second is not None
        return Now(
            work_left=self._work_left(poll),
            time_left=(self.deadline - now).total_seconds(),
            on=on,
            starting=0.0 if computing or on is Machine.NONE else self.changeover_seconds,
            # Whether spot can be had nobody says before it is bought. While SkyPilot looks for it, it cannot; from on
            # demand it is tried, which costs about what the paper's greedy policy does (bench/spot_policies.py).
            spot_available=on is Machine.ON_DEMAND,
        )

    def _work_left(self, poll: Poll) -> float:
        """Seconds of computing from the last commit, at the speed measured, else at the quote's."""
        view = poll.view
        if not view.total_steps:
            return self.work_seconds
        committed = view.last_commit.step if view.last_commit else 0
        left = 1 - committed / view.total_steps
        if view.eta_seconds and view.step is not None and view.step < view.total_steps:
            return left * view.total_steps * view.eta_seconds / (view.total_steps - view.step)
        return left * self.work_seconds


def course_of(plan: Plan, *, began: datetime) -> Course | None:
    """The course of a launch that looks for spot and has a deadline; None for any other, and where no quote says how
    long the run takes: then only the job itself goes by the deadline, and lands.

    Args:
        began: when the run was created.
    """
    ratio = price_ratio(plan)
    chosen = plan.quote.chosen if plan.quote is not None else None
    if plan.budget.deadline is None or ratio is None or chosen is None or chosen.seconds is None:
        return None
    work = sum(item.seconds.p50 for item in chosen.items if item.name not in ONCE and item.name != INTERRUPTED)
    return Course(
        deadline=plan.budget.deadline,
        began=began,
        work_seconds=max(work, 1.0),
        changeover_seconds=sum(item.seconds.p90 for item in chosen.items if item.name in ONCE),
        lost_seconds=chosen.save_every_seconds or 0.0,
        price_ratio=ratio,
    )


def price_ratio(plan: Plan) -> float | None:
    """The cheapest spot offer's price over the cheapest on-demand price known; None where spot saves nothing."""
    spot = [offer.usd_per_hour for offer in plan.offers if offer.spot and offer.usd_per_hour]
    on_demand = [offer.usd_per_hour for offer in plan.offers if not offer.spot and offer.usd_per_hour]
    on_demand += [offer.on_demand_usd_per_hour for offer in plan.offers if offer.on_demand_usd_per_hour]
    if not spot or not on_demand or min(spot) >= min(on_demand):
        return None
    return min(spot) / min(on_demand)
