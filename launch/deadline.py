"""Which machine a run with a deadline should be on: the Uniform Progress rule. Pure: no clock, nothing is bought here.

Zhanghao Wu, Wei-Lin Chiang, Ziming Mao, Zongheng Yang, Eric Friedman, Scott Shenker, Ion Stoica: "Can't Be Late:
Optimizing Spot Instance Savings under Deadlines", NSDI 2024,
https://www.usenix.org/conference/nsdi24/presentation/wu-zhanghao. Its letters: C(t) is the work left, R(t) the time
left, d the changeover. Its rules, and where they are here:

- Thrifty (3.3): with no work left, nothing is held.
- Safety Net (3.3): with no machine and R < C + 2d, on demand until the end. Here R < C + 2d + lost + look, because a
  watcher looks from time to time and C counts from the last commit.
- Exploitation (3.3): a spot machine is kept until it is taken away.
- Uniform Progress (5.2.2): with no machine and progress behind schedule, on demand.
- Taking Risks (5.2.2): spot whenever it can be had, even behind schedule.
- Hysteresis (5.2.2): on demand until progress is what the schedule asks for 2d later. Where the text is silent (ahead,
  but no spot to be had) on demand is kept, as the authors' simulator does: to leave it and wait costs more.
- Loose Deadline (A.8): the schedule begins when C/R reaches 0.7; until then there is time to wait for spot.

Two additions, which the paper's model does not need. A spot machine that no longer leaves time for a changeover (it
is slower than estimated, or does not start) is left while on demand can still make it. And on demand is not left for
spot when what remains is too little to pay for the changeover.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from job.contract.errors import BadInput

TIGHT: Final = 0.7
"""Work left over time left at which a deadline is tight (A.8 of the paper)."""
_ROUNDING: Final = 1e-9


class Terms(BaseModel):
    """What does not change while a run goes on. Seconds, and work in seconds of computing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    work: float = Field(gt=0, description="C(0): computing that the whole run needs on the machine that is bought.")
    time: float = Field(gt=0, description="R(0): from the launch to the deadline.")
    changeover: float = Field(
        ge=0, description="d: from the decision to the first new step on another machine: provision, image, restore."
    )
    price_ratio: float = Field(gt=0, lt=1, description="Price of spot over price of on demand.")
    lost: float = Field(ge=0, description="The most that an interruption loses: time between two commits.")
    look: float = Field(
        ge=0, description="The longest time between two decisions. Understated, the deadline is missed."
    )
    tight: float = Field(
        default=TIGHT,
        ge=0,
        description="The schedule begins when work left / time left is this. 0: at once. Above 1: never (greedy).",
    )

    @property
    def pace(self) -> float:
        """The schedule: work left is at most this times the time left. A straight line that ends at the deadline."""
        return max(self.work / self.time, self.tight)

    @property
    def spot_needs(self) -> float:
        """Seconds of slack without which spot is not begun: it may be taken away as soon as it has started, so there
        must be time for two changeovers."""
        return 2 * self.changeover + self.lost + self.look


class Machine(StrEnum):
    """What the run has."""

    NONE = "none"
    SPOT = "spot"
    ON_DEMAND = "on-demand"


class Choice(StrEnum):
    """What it should have."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    WAIT = "wait"
    """Nothing, until spot can be had or time runs short."""


@dataclass(frozen=True)
class Now:
    """A run at one moment. Seconds."""

    work_left: float
    """C(t), from the last commit: what another machine would have to do."""
    time_left: float
    """R(t); negative after the deadline."""
    on: Machine
    starting: float = 0.0
    """What is left of the changeover to the machine it has; 0 when that one is computing."""
    spot_available: bool = False
    """Whether spot can be had now. Where nobody can tell while on demand, True tries it, and costs about what the
    paper's greedy policy does; False stays to the end, and costs a tenth more (bench/spot_policies.py)."""

    @property
    def slack(self) -> float:
        """Seconds that may still be spent without computing."""
        return self.time_left - self.work_left


@dataclass(frozen=True)
class Decision:
    """What to be on now, and why."""

    choice: Choice
    reason: str
    late_by: float = 0.0
    """Seconds after the deadline at which the run ends at the earliest; 0 while the deadline may be met."""


def decide(terms: Terms, now: Now) -> Decision:
    """What the run should be on from now until the next look.

    As long as work and changeover take no longer than estimated, and on demand can be had, following it from the start
    of a run that can be in time at all (time >= work + changeover) is in time, whatever happens to spot.
    """
    if now.work_left <= 0:
        return Decision(Choice.WAIT, "nothing is left to do")
    match now.on:
        case Machine.SPOT:
            return _on_spot(terms, now)
        case Machine.ON_DEMAND:
            return _on_demand(terms, now)
        case Machine.NONE:
            return _idle(terms, now)


def must_leave_spot_by(terms: Terms, now: Now) -> float:
    """Seconds from now at which on demand must be bought if nothing more is committed until then; 0 for at once.

    A promise for whoever cannot watch all the time: looking again by then is early enough. Each second that is
    committed moves it away by a second.
    """
    return max(0.0, now.slack - terms.changeover - terms.look)


def check_deadline(terms: Terms) -> None:
    """Whether the deadline can be met at all, on a machine that is never taken away.

    Raises:
        BadInput: it cannot.
    """
    needs = terms.work + terms.changeover
    if terms.time < needs:
        raise BadInput(
            f"the deadline is {_span(terms.time)} away, and the run needs {_span(needs)} even on demand: "
            f"{_span(terms.work)} of training and {_span(terms.changeover)} to start",
            hint="set a later deadline, train fewer epochs, or take a faster --gpu",
        )


def _on_spot(terms: Terms, now: Now) -> Decision:
    if now.slack < terms.changeover:
        reason = f"too late to change: {_span(now.slack)} of slack, and a changeover takes {_span(terms.changeover)}"
        return Decision(Choice.SPOT, reason, _late(terms, now))
    if now.slack < now.starting + terms.changeover + terms.look:
        reason = f"{_span(now.slack)} of slack: the last moment at which on demand is in time"
        return Decision(Choice.ON_DEMAND, reason)
    return Decision(Choice.SPOT, "spot is kept until it is taken away")


def _on_demand(terms: Terms, now: Now) -> Decision:
    if now.slack < terms.spot_needs:
        reason = f"{_span(now.slack)} of slack is too little for spot, which needs {_span(terms.spot_needs)}"
        return Decision(Choice.ON_DEMAND, reason, _late(terms, now))
    if not _ahead(terms, now):
        return Decision(Choice.ON_DEMAND, "catching up with the schedule")
    if not now.spot_available:
        return Decision(Choice.ON_DEMAND, "spot cannot be had")
    if (now.work_left + terms.changeover) * terms.price_ratio >= now.work_left:
        return Decision(Choice.ON_DEMAND, "what is left costs less here than a changeover to spot")
    return Decision(Choice.SPOT, "ahead of the schedule by two changeovers, and spot can be had")


def _idle(terms: Terms, now: Now) -> Decision:
    if now.slack < terms.spot_needs:
        reason = f"{_span(now.slack)} of slack: spot needs {_span(terms.spot_needs)}, so on demand until the end"
        return Decision(Choice.ON_DEMAND, reason, _late(terms, now))
    if now.spot_available:
        return Decision(Choice.SPOT, "spot can be had")
    if now.work_left > terms.pace * now.time_left * (1 + _ROUNDING):
        behind = now.work_left - terms.pace * now.time_left
        return Decision(Choice.ON_DEMAND, f"no spot, and {_span(behind)} of work behind the schedule")
    return Decision(Choice.WAIT, f"no spot, and ahead of the schedule, with {_span(now.slack)} of slack")


def _ahead(terms: Terms, now: Now) -> bool:
    """Hysteresis: progress is at least what the schedule asks for two changeovers from now."""
    return now.work_left <= terms.pace * (now.time_left - 2 * terms.changeover)


def _late(terms: Terms, now: Now) -> float:
    until_computing = terms.changeover
    if now.on is not Machine.NONE:
        # A machine that computes may have done up to `lost` more than its last commit says.
        until_computing = min(now.starting or -terms.lost, terms.changeover)
    return max(0.0, until_computing - now.slack)


def _span(seconds: float) -> str:
    """ "14 min", "3.2 h"."""
    return f"{seconds / 60:.0f} min" if abs(seconds) < 5400 else f"{seconds / 3600:.1f} h"
