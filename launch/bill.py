"""One offer's bill: the seconds of a run, item by item, and what may make them more. Pure.

p50 is as likely exceeded as not; p90 is exceeded one time in ten. Both come from LAUNCHES imagined launches with a
fixed seed: speed, tokens, start-up and the rate of interruptions vary by their spreads, interruptions are a Poisson
process, and each one costs a start-up and the work that is repeated.
"""

from __future__ import annotations

import math
import random
from functools import cache
from statistics import NormalDist
from typing import Final, NamedTuple

from job.contract.recipe import Recipe
from job.contract.records import Part
from job.contract.submission import Offer
from launch.interruptions import Rate, repeated_seconds
from launch.speeds import Pace
from launch.startup import Startup
from launch.steps import Work

LAUNCHES: Final = 400
"""Imagined ones. Stratified, so that p50 and p90 move by about 1 % with another seed."""
_P90: Final = NormalDist().inv_cdf(0.9)
INTERRUPTED: Final = "interruptions"
ONCE: Final = frozenset({"provisioning", "image", "weights", "loading"})
WORTH_A_LINE: Final = 0.05
"""Seconds."""


class Range(Part):
    """Half of the time at most p50, nine times of ten at most p90."""

    p50: float
    p90: float


class Item(Part):
    """A part of the bill. Items are skewed: their p50 add up to a little less than the p50 of all."""

    name: str
    seconds: Range
    usd: Range | None
    basis: str


class Bill(NamedTuple):
    """One offer's arithmetic."""

    recipe: Recipe
    work: Work
    pace: Pace
    startup: Startup
    rate: Rate
    every: float
    blocking: float
    offer: Offer | None

    @property
    def price(self) -> float | None:
        return self.offer.usd_per_hour if self.offer else None

    @property
    def training(self) -> float:
        """Seconds in steps, at the median."""
        # The last step of an epoch may hold fewer micro-batches: micro-batches are counted, not steps.
        batches = math.ceil(self.work.sequences / self.recipe.training.batch_size) * self.recipe.training.epochs
        own = self.pace.step - self.recipe.training.gradient_accumulation * self.pace.micro_batch
        return batches * self.pace.micro_batch + self.work.steps * own

    @property
    def evaluating(self) -> float:
        return self.recipe.training.epochs * self.work.evaluated_batches * self.pace.evaluated_micro_batch

    @property
    def saving(self) -> float:
        return self.blocking * (self.recipe.training.epochs + self.training / self.every)

    @property
    def spread(self) -> float:
        return math.hypot(self.pace.spread, self.work.spread)

    def lines(self) -> list[tuple[str, Range, str]]:
        """Everything but interruptions: name, seconds, basis."""
        training = self.recipe.training
        how = f"{self.pace.how}, " if self.pace.how else ""
        computed = [
            (
                "training",
                self.training,
                f"{self.work.steps} steps, {self.pace.step:.3g} s each, {how}{self.pace.basis}",
            ),
            ("evaluating", self.evaluating, f"{training.epochs} times {self.work.evaluated_batches} batches"),
            (
                "saving",
                self.saving,
                f"every {self.every / 60:.1f} min and each epoch, {self.blocking:.2f} s of waiting",
            ),
        ]
        worse = math.exp(_P90 * self.spread)
        return [
            *((phase.name, Range(p50=phase.p50, p90=phase.p90), phase.basis) for phase in self.startup.phases),
            *((name, Range(p50=seconds, p90=seconds * worse), basis) for name, seconds, basis in computed),
        ]

    def totals(self) -> tuple[Range, Range, float]:
        """(all seconds, those that interruptions cost, the expected number of interruptions)."""
        work = self.training + self.evaluating + self.saving
        repeated = repeated_seconds(self.offer.cloud, self.every) if self.offer else 0.0
        everything, lost, number = [], [], 0.0
        for draw in _launches():
            start = self.startup.seconds(draw.start)
            busy = work * math.exp(self.pace.spread * draw.speed + self.work.spread * draw.tokens)
            mean = (start + busy) / 3600 * self.rate.an_hour(draw.rate)
            again = _poisson(mean, draw.luck) * (start + repeated)
            everything.append(start + busy + again)
            lost.append(again)
            number += mean / LAUNCHES
        return _range(everything), _range(lost), number

    def why_interrupted(self, expected: float) -> str:
        cloud = self.offer.cloud if self.offer else ""
        repeated = repeated_seconds(cloud, self.every)
        again = f"{repeated / 60:.1f} min of work" if repeated else "no work: the notice is answered"
        return f"{expected:.2f} expected; {self.rate.basis}; each costs a start-up and repeats {again}"


class _Draw(NamedTuple):
    """One imagined launch: standard normal numbers, and one in 0..1 for the number of interruptions."""

    speed: float
    tokens: float
    start: float
    rate: float
    luck: float


@cache
def _launches() -> tuple[_Draw, ...]:
    """Latin hypercube: each of the five takes every one of LAUNCHES equally likely values once (McKay et al. 1979)."""
    generator = random.Random(1979)
    even = [(i + 0.5) / LAUNCHES for i in range(LAUNCHES)]
    normal = [NormalDist().inv_cdf(each) for each in even]
    columns = [generator.sample(each, LAUNCHES) for each in (normal, normal, normal, normal, even)]
    return tuple(_Draw(*each) for each in zip(*columns, strict=True))


def _poisson(mean: float, luck: float) -> int:
    """The quantile `luck` of a Poisson distribution."""
    number, probability = 0, math.exp(-mean)
    total = probability
    while total < luck and number < 1000:
        number += 1
        probability *= mean / number
        total += probability
    return number


def _range(values: list[float]) -> Range:
    ordered = sorted(values)
    return Range(p50=ordered[len(ordered) // 2], p90=ordered[len(ordered) * 9 // 10])


def dollars(seconds: Range, usd_per_hour: float | None) -> Range | None:
    if usd_per_hour is None:
        return None
    return Range(p50=seconds.p50 * usd_per_hour / 3600, p90=seconds.p90 * usd_per_hour / 3600)
