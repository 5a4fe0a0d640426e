"""Machines as they are paid for in truth, and the records that attempts on them leave: a history, made by hand or at
random. Seconds of true time; no record ever sees it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from job.contract.budget import Budget
from job.contract.ledger import Ledger, ledger_of
from job.contract.metrics import MetricLine, Restored, Step
from job.contract.outcome import Outcome
from job.contract.records import AttemptClaim, AttemptEnd
from job.contract.submission import OWN, Offer, Submission
from tests.contract.examples import GPU, START, heartbeat, step

_DECADES: Final = datetime(2000, 1, 1, tzinfo=UTC)


def offer(region: str, usd_per_hour: float | None = 1.5, *, cloud: str = "aws", spot: bool = True) -> Offer:
    return Offer(cloud=cloud, region=region, gpu="H100", gpus=1, spot=spot, usd_per_hour=usd_per_hour)


def calendar(days: float) -> datetime:
    """What some machine's clock says; it may say anything."""
    return _DECADES + timedelta(days=days)


@dataclass
class Machine:
    """One that is paid for from its boot on, or, where it was there before, while an attempt lives on it."""

    id: str
    offer: Offer
    booted: float
    lives: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What has to be paid in truth."""
        if self.offer.cloud not in OWN:
            return max(died for _, died in self.lives) - self.booted
        paid, until = 0.0, -1e18
        for began, died in sorted(self.lives):
            paid += max(died - max(began, until), 0.0)
            until = max(until, died)
        return paid

    @property
    def usd(self) -> float:
        assert self.offer.usd_per_hour is not None
        return self.seconds / 3600 * self.offer.usd_per_hour


class Look(NamedTuple):
    """What the ledger said at some moment, and the truth."""

    ledger_usd: float
    true_usd: float
    intervals_usd: float
    """One heartbeat of each attempt that was killed."""


@dataclass
class Fleet:
    """All machines of a run, and all records."""

    offers: tuple[Offer, ...]
    machines: list[Machine] = field(default_factory=list)
    claims: dict[int, AttemptClaim] = field(default_factory=dict)
    ends: dict[int, AttemptEnd] = field(default_factory=dict)
    lines: dict[int, list[MetricLine]] = field(default_factory=lambda: defaultdict(list))
    killed: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def buy(self, offer: Offer, at: float) -> Machine:
        machine = Machine(f"boot-{len(self.machines)}", offer, at)
        self.machines.append(machine)
        return machine

    def claim(self, machine: Machine, at: float, *, heartbeat_seconds: float = 15.0, days: float = 0.0) -> int:
        """An attempt begins; returns its number."""
        number = len(self.claims) + 1
        place = {"cloud": machine.offer.cloud, "region": machine.offer.region or ""}
        self.claims[number] = AttemptClaim(
            attempt=number,
            nonce="n",
            claimed_at=calendar(days),
            pid=1,
            host="host",
            infra=place,
            submission=1,
            machine_id=machine.id,
            up_seconds=at - machine.booted,
            heartbeat_seconds=heartbeat_seconds,
        )
        return number

    def beat(self, attempt: int, elapsed: float, days: float = 0.0) -> None:
        self._write(attempt, heartbeat("training"), elapsed, days)

    def restored(self, attempt: int, number: int, elapsed: float, days: float = 0.0) -> None:
        line = Restored(
            at=START, step=number, checkpoint=None, total_steps=99, epochs=1, train_rows=9, hardware=GPU, elapsed=0
        )
        self._write(attempt, line, elapsed, days)

    def step(self, attempt: int, number: int, seconds: float, elapsed: float, days: float = 0.0) -> None:
        line: Step = step(number).model_copy(update={"seconds": seconds})
        self._write(attempt, line, elapsed, days)

    def _write(self, attempt: int, line: MetricLine, elapsed: float, days: float) -> None:
        self.lines[attempt].append(line.model_copy(update={"elapsed": elapsed, "at": calendar(days)}))

    def die(self, machine: Machine, attempt: int, at: float, *, outcome: Outcome | None = None) -> None:
        """An attempt's end; without an outcome it is killed, and nobody writes anything."""
        began = machine.booted + self.claims[attempt].up_seconds
        machine.lives.append((began, at))
        if outcome is None:
            self.killed.append(attempt)
            return
        self.ends[attempt] = AttemptEnd(
            attempt=attempt,
            nonce="n",
            ended_at=START,
            outcome=outcome,
            step=0,
            message="said",
            elapsed=max(at - began, 0.0),  # a difference of large numbers may be a little less
        )

    def ledger(self, running: int | None = None) -> Ledger:
        bought = Submission(
            submission=1,
            nonce="n",
            submitted_at=START,
            backend="skypilot",
            offers=self.offers,
            image=None,
            last_attempt=None,
            budget=Budget(),
        )
        return ledger_of(self.claims, self.ends, self.lines, [bought], running=running)

    def look(self) -> None:
        """Ask the ledger now, and note it beside the truth."""
        ledger = self.ledger()
        assert ledger.usd is not None
        intervals = sum(
            self.claims[charge.attempt].heartbeat_seconds / 3600 * (charge.usd_per_hour or 0.0)
            for charge in ledger.charges
            if charge.attempt in self.killed
        )
        self.looks.append(Look(ledger.usd, self.usd, intervals))

    @property
    def usd(self) -> float:
        """The truth."""
        return sum(machine.usd for machine in self.machines if machine.lives)
