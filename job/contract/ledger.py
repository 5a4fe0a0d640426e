"""The Ledger: what all attempts of a run have cost. Pure arithmetic over the attempts' own records.

Only durations that a monotonic clock measured are counted: how long a machine was up when the attempt claimed, and how
long the attempt lived. What a machine's calendar says is for people to read, and can be wrong by any amount.

    |-- the machine starts --|-- claim ---- last heartbeat --|..one interval..|
    |      up_seconds        |          lived_seconds        |   if killed    |

What no record tells is not here: a machine that was taken away before its attempt had claimed, and a machine's last
seconds after the end of its last attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from pydantic import AwareDatetime, Field

from job.contract.metrics import MetricLine, Restored, Step
from job.contract.records import AttemptClaim, AttemptEnd, Part
from job.contract.submission import OWN, Offer, Submission

BOUGHT_LATER: Final = frozenset({"", *OWN})
"""Clouds whose machines were up before they were ours: there the bill of every attempt begins with its claim."""


class Charge(Part):
    """What one attempt cost. Seconds of machine time; dollars at the price of the offer that it ran on."""

    attempt: int
    offer: Offer | None
    """Where it ran; None when nobody sold it."""
    usd_per_hour: float | None
    """None when the price is unknown."""
    started_at: AwareDatetime
    """The claim, by that machine's calendar."""
    ended: str
    """An outcome; "killed" when it never said; "running" while it may be."""
    provisioning_seconds: float = Field(ge=0)
    """The first attempt on a machine: it was paid for and the attempt had not begun. Boot and image."""
    idle_seconds: float = Field(default=0.0, ge=0)
    """A later attempt on a machine: it was paid for after the attempt before had ended."""
    loading_seconds: float = Field(ge=0)
    """From the claim to the first step: dataset, weights, restore."""
    useful_seconds: float = Field(ge=0)
    """Optimizer steps whose result the run kept."""
    repeated_seconds: float = Field(ge=0)
    """Optimizer steps whose result was lost with the attempt: another has done them again, or has to."""
    other_seconds: float = Field(ge=0)
    """Everything else: evaluations, saves that blocked, publishing, waiting, the last interval of a killed attempt."""

    @property
    def seconds(self) -> float:
        return (
            self.provisioning_seconds
            + self.idle_seconds
            + self.loading_seconds
            + self.useful_seconds
            + self.repeated_seconds
            + self.other_seconds
        )

    @property
    def usd(self) -> float | None:
        return None if self.usd_per_hour is None else self.seconds / 3600 * self.usd_per_hour


class Ledger(Part):
    """All charges, in the order of the attempts."""

    charges: tuple[Charge, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(charge.seconds for charge in self.charges)

    @property
    def usd(self) -> float | None:
        """None when any price is unknown: a sum that leaves something out would be a lie."""
        costs = [charge.usd for charge in self.charges]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    @property
    def restart_seconds(self) -> float:
        """The longest that it took to get an attempt to its first step, provisioning included; 0 before any began."""
        return max((charge.provisioning_seconds + charge.loading_seconds for charge in self.charges), default=0.0)


def ledger_of(
    claims: Mapping[int, AttemptClaim],
    ends: Mapping[int, AttemptEnd],
    lines: Mapping[int, Sequence[MetricLine]],
    submissions: Iterable[Submission],
    *,
    running: int | None = None,
) -> Ledger:
    """The ledger of a run, from its records.

    An attempt without an end record lived until its last heartbeat, and may have lived one interval longer: that one is
    counted. Two attempts on one machine share its bill: every second of it is counted once, for the earlier attempt.

    Args:
        running: number of the attempt that may still live.
    """
    by_number = {submission.submission: submission for submission in submissions}
    kept = _kept_steps(lines)
    covered: dict[str, float] = {}  # machine -> until which second of its life it is paid for
    charges = []
    for attempt in sorted(claims):
        claim, end, own = claims[attempt], ends.get(attempt), lines.get(attempt, ())
        lived = _lived(claim, end, own)
        offer = offer_of(claim, by_number.get(claim.submission))
        machine = claim.machine_id or f"attempt {attempt}"
        begun = claim.up_seconds
        bought_later = offer is None or offer.cloud in BOUGHT_LATER
        paid_until = covered.get(machine, 0.0)
        # Until it claims again a machine that one has anyway works for others.
        waited = 0.0 if bought_later else max(begun - paid_until, 0.0)
        shared = max(paid_until - begun, 0.0)  # seconds of this life that an attempt before it paid for
        charges.append(
            Charge(
                attempt=attempt,
                offer=offer,
                usd_per_hour=offer.usd_per_hour if offer is not None else None,
                started_at=claim.claimed_at,
                ended=end.outcome.value if end else "running" if attempt == running else "killed",
                provisioning_seconds=0.0 if machine in covered else waited,
                idle_seconds=waited if machine in covered else 0.0,
                **_parts(own, kept, attempt, max(lived - shared, 0.0)),
            )
        )
        covered[machine] = max(paid_until, begun + lived)
    return Ledger(charges=tuple(charges))


def offer_of(claim: AttemptClaim, submission: Submission | None) -> Offer | None:
    """The offer that an attempt runs on. Where several fit, spot and on demand in one region say, the dearest: what is
    spent may be over-counted, never under-counted."""
    offers = submission.offers if submission is not None else ()
    fitting = [offer for offer in offers if offer.is_place_of(claim.infra)] or list(offers)
    return max(fitting, key=lambda offer: offer.usd_per_hour or 0.0, default=None)


def _lived(claim: AttemptClaim, end: AttemptEnd | None, lines: Sequence[MetricLine]) -> float:
    """Seconds from the claim to the end; never too few while heartbeats arrive, nor too many by more than one."""
    seen = max((line.elapsed for line in lines), default=0.0)
    if end is not None:
        return max(end.elapsed, seen)
    return seen + claim.heartbeat_seconds


def _kept_steps(lines: Mapping[int, Sequence[MetricLine]]) -> dict[int, int]:
    """Step -> the attempt whose result the run kept: the last that did it, unless a later one began before it."""
    kept: dict[int, int] = {}
    for attempt in sorted(lines):
        for line in lines[attempt]:
            if isinstance(line, Restored):
                kept = {step: by for step, by in kept.items() if step <= line.step}
            elif isinstance(line, Step):
                kept[line.step] = attempt
    return kept


def _parts(lines: Sequence[MetricLine], kept: Mapping[int, int], attempt: int, seconds: float) -> dict[str, float]:
    """How the seconds of a life were spent; they add up to it exactly."""
    steps = [line for line in lines if isinstance(line, Step)]
    useful = sum(line.seconds for line in steps if kept.get(line.step) == attempt)
    repeated = sum(line.seconds for line in steps if kept.get(line.step) != attempt)
    began = next((line.elapsed for line in lines if isinstance(line, Restored)), None)
    loading = seconds if began is None else began
    # In this order they are cut to what is left, so that a strange record makes a strange part and never a wrong sum.
    parts = {}
    for name, wanted in (("loading", loading), ("useful", useful), ("repeated", repeated)):
        parts[f"{name}_seconds"] = min(max(wanted, 0.0), seconds)
        seconds -= parts[f"{name}_seconds"]
    return {**parts, "other_seconds": max(seconds, 0.0)}
