"""What the deadline rule saves, and whether it is ever late: replays of spot availability against the best possible.

    python bench/spot_policies.py [--cases 1200] [--seed 1] [--traces FOLDER] [--json]

A case is a job, a deadline, a changeover, a pair of prices and a trace of when spot could be had, all drawn by the
seed. Every policy meets the same cases. The optimum knows the whole trace beforehand (section 5.3 of the paper that
launch/deadline.py implements); nobody can be cheaper and in time. Costs are relative to running on demand only;
those of jobs that were late are what they had cost when they were done, or after four times the time they had.

Where the traces come from:

- synthetic: spot comes and goes at random (two-state Markov), mean times of a grid. Invented.
- fitted: the same, with the mean times of 17 measured traces (AWS, one machine of V100 or K80, 2022 and 2023; the
  paper's own: https://github.com/skypilot-org/spot-traces, availability/1-node, commit 221da1a). The means are
  computed from those files; that spot comes and goes at random with them is our simplification.
- rarely interrupted: AWS publishes how many spot machines of a type it took back within 30 days (Spot Instance
  Advisor, 2026-02: p4d 5-10 %, p5 15-20 %). The middle of the band is the chance of an interruption in 30 days; AWS
  does not say how long spot is then away: 2 h is our guess.
- measured: with --traces, the files themselves (a clone of that repository's availability folder).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from launch.deadline import Choice, Machine, Now, Terms, decide

STEP: Final = 360
"""Seconds between two decisions, and the grain of everything: 0.1 h."""
PRICES: Final = {"H100": (1.25, 2.49), "A100-80GB": (0.44, 3.67)}
"""Cheapest spot and cheapest on demand in SkyPilot's catalog, 2026-11, in dollars an hour."""
JOBS_HOURS: Final = (4, 8, 12, 24, 48, 72)
DEADLINES: Final = (1.1, 1.25, 1.5, 2.0)
"""Time to the deadline, over the job's computing time."""
CHANGEOVERS: Final = (1, 3)
"""Steps: 6 min for a small model, 18 min for a 70B one (the paper's: 12 min; in its prototype 11 to 18)."""
SYNTHETIC: Final = tuple((f"{up}h up {down}h down", up, down) for up in (1.0, 4.0, 12.0) for down in (0.5, 2.0, 8.0))
FITTED: Final = (
    ("us-east-1a v100 2023", 0.72, 3.58),
    ("us-east-1c v100 2023", 1.48, 1.69),
    ("us-east-1d v100 2023", 1.66, 2.05),
    ("us-east-1f v100 2023", 2.26, 1.56),
    ("us-east-2a v100 2023", 5.68, 1.80),
    ("us-east-2b v100 2023", 4.26, 1.98),
    ("us-west-2a v100 2023", 6.06, 0.81),
    ("us-west-2b v100 2023", 10.40, 1.10),
    ("us-west-2c v100 2023", 6.81, 0.84),
    ("us-west-2a k80 2022", 4.36, 0.53),
    ("us-west-2a 8xk80 2022", 1.57, 3.22),
    ("us-west-2a v100 2022", 4.05, 1.07),
    ("us-west-2a 8xv100 2022", 1.16, 1.25),
    ("us-west-2b k80 2022", 1.61, 12.20),
    ("us-west-2b 8xk80 2022", 1.08, 1.56),
    ("us-west-2b v100 2022", 2.70, 1.07),
    ("us-west-2b 8xv100 2022", 0.76, 0.87),
)
"""Trace, mean hours that spot could be had without a break, mean hours that it could not."""
RARE: Final = tuple(
    (f"aws {name} {band:.1%}", -720 / math.log(1 - band), 2.0) for name, band in (("p4d", 0.075), ("p5", 0.175))
)

Trace = npt.NDArray[np.bool_]
"""Whether spot can be had in each step."""


@dataclass(frozen=True)
class Case:
    """One job on one trace. Steps; prices in dollars a step."""

    source: str
    hours: int
    deadline: float
    trace: Trace
    work: int
    time: int
    changeover: int
    spot: float
    on_demand: float

    @property
    def terms(self) -> Terms:
        return Terms(
            work=self.work * STEP,
            time=self.time * STEP,
            changeover=self.changeover * STEP,
            price_ratio=self.spot / self.on_demand,
            # As in the paper: what is lost is part of the changeover, and a changeover is no shorter than a step.
            lost=0,
            look=0,
        )


@dataclass(frozen=True)
class Paid:
    """What a policy cost, in dollars, and whether the job was done in time."""

    cost: float
    in_time: bool


Policy = Callable[[Terms], Callable[[Now], Choice]]


def replay(case: Case, policy: Policy) -> Paid:
    """The policy on the trace, to the end of the job or of the trace. A changeover is paid at the new machine's price.

    Spot that cannot be had in a step is taken away at its beginning. What an interruption loses is part of the
    changeover, as in the paper.
    """
    choose, left, cost = policy(case.terms), case.work, 0.0
    on, starting = Machine.NONE, 0
    for step, available in enumerate(case.trace.tolist()):
        if left == 0:
            return Paid(cost, step <= case.time)
        if on is Machine.SPOT and not available:
            on, starting = Machine.NONE, 0
        choice = choose(Now(left * STEP, (case.time - step) * STEP, on, starting * STEP, available))
        wanted = Machine.NONE if choice is Choice.WAIT else Machine(choice.value)
        if wanted is Machine.SPOT and not available:
            wanted = Machine.NONE
        if wanted is not on:
            on, starting = wanted, case.changeover
        if on is Machine.NONE:
            continue
        cost += case.spot if on is Machine.SPOT else case.on_demand
        if starting:
            starting -= 1
        else:
            left -= 1
    return Paid(cost, left == 0 and len(case.trace) <= case.time)


def optimum(case: Case) -> float:
    """The least that the job can cost in time, knowing the trace: dynamic programming over time, machine and work left.

    A machine is begun only where it lives through its changeover: otherwise having none is cheaper, and no slower.
    Infinite where the job cannot be in time.
    """
    d, size = case.changeover, case.work + 1
    never = np.full(size, np.inf)
    done = never.copy()
    done[0] = 0.0
    # idle[t][c], spot[t][c], owned[t][c]: the least cost from step t on with c steps of work left, on that machine.
    idle, spot, owned = ([*[done] * (case.time + 1), *[never] * d] for _ in range(3))
    # Steps of spot from here without a break.
    lasts = 0
    for t in range(case.time - 1, -1, -1):
        lasts = lasts + 1 if case.trace[t] else 0
        start_spot = d * case.spot + spot[t + d] if lasts >= max(d, 1) else never
        start_owned = d * case.on_demand + owned[t + d]
        none = np.minimum(idle[t + 1], np.minimum(start_spot, start_owned)) if d else idle[t + 1]
        on_spot = _computing(spot[t + 1], case.spot) if case.trace[t] else never
        on_owned = _computing(owned[t + 1], case.on_demand)
        if not d:
            none = np.minimum(none, np.minimum(on_spot, on_owned))
        none[0] = 0.0
        idle[t], spot[t], owned[t] = none, np.minimum(on_spot, none), np.minimum(on_owned, none)
    return float(idle[0][case.work])


def _computing(later: npt.NDArray[np.float64], price: float) -> npt.NDArray[np.float64]:
    cost = np.empty_like(later)
    cost[0] = 0.0
    cost[1:] = later[:-1] + price
    return cost


def _rule(terms: Terms) -> Callable[[Now], Choice]:
    return lambda now: decide(terms, now).choice


def _never_back(terms: Terms) -> Callable[[Now], Choice]:
    """The rule of a launcher that stays on demand to the end, because it cannot ask for spot from there."""
    return lambda now: Choice.ON_DEMAND if now.on is Machine.ON_DEMAND else decide(terms, now).choice


def _blind(terms: Terms) -> Callable[[Now], Choice]:
    """The rule of a launcher that cannot ask for spot while it is on demand, and tries it whenever it may."""

    def choose(now: Now) -> Choice:
        if now.on is not Machine.ON_DEMAND:
            return decide(terms, now).choice
        choice = decide(terms, replace(now, spot_available=True)).choice
        return Choice.WAIT if choice is Choice.SPOT and not now.spot_available else choice

    return choose


POLICIES: Final[dict[str, Policy]] = {
    "on demand only": lambda _: lambda now: Choice.ON_DEMAND,
    "spot only": lambda _: lambda now: Choice.SPOT if now.spot_available else Choice.WAIT,
    # Above 1 nothing is ever behind the schedule; what remains is the paper's greedy policy (3.4).
    "greedy": lambda terms: _rule(terms.model_copy(update={"tight": 2.0})),
    "uniform progress": _rule,
    "  schedule from the start": lambda terms: _rule(terms.model_copy(update={"tight": 0.0})),
    "  tries spot blindly": _blind,
    "  never back to spot": _never_back,
}


def markov(random_: random.Random, steps: int, up_hours: float, down_hours: float) -> Trace:
    """Spot that comes and goes at random: a two-state chain, begun in its long-run share."""
    up, down = max(up_hours * 3600 / STEP, 1.0), max(down_hours * 3600 / STEP, 1.0)
    here = random_.random() < up / (up + down)
    trace: list[bool] = []
    while len(trace) < steps:
        mean = up if here else down
        # A geometric length: each step it ends with probability 1 / mean.
        length = 1 if mean <= 1 else math.ceil(math.log(1 - random_.random()) / math.log(1 - 1 / mean))
        trace += [here] * min(max(length, 1), steps - len(trace))
        here = not here
    return np.array(trace)


def measured(random_: random.Random, steps: int, file: Path) -> Trace:
    """A part of a measured trace, begun at random: a step counts where every probe of it found all machines."""
    stored = json.loads(file.read_text())
    gap, counts = stored["metadata"]["gap_seconds"], np.array(stored["data"])
    found = counts >= counts.max()
    # Long jobs wrap around: the longest trace has 45 days, the longest case 24.
    start = random_.randrange(len(found))
    edges = (np.arange(steps + 1) * STEP / gap).astype(int)
    return np.array(
        [found[np.arange(start + a, start + max(b, a + 1)) % len(found)].all() for a, b in pairwise(edges.tolist())]
    )


def draw_cases(seed: int, number: int, traces: Path | None = None) -> Iterator[Case]:
    """The cases, equally many of each source. Traces are four times as long as the time to the deadline."""
    random_ = random.Random(seed)
    files = sorted(traces.rglob("*.json")) if traces else []
    sources = ["synthetic", "fitted", "rarely interrupted", *(["measured"] if files else [])]
    for index in range(number):
        source = sources[index % len(sources)]
        hours, deadline = random_.choice(JOBS_HOURS), random_.choice(DEADLINES)
        changeover = random_.choice(CHANGEOVERS)
        work = hours * 3600 // STEP
        time = max(round(work * deadline), work + changeover)
        spot, on_demand = random_.choice(list(PRICES.values()))
        if source == "measured":
            trace = measured(random_, time * 4, random_.choice(files))
        else:
            grid = {"synthetic": SYNTHETIC, "fitted": FITTED, "rarely interrupted": RARE}[source]
            _, up, down = random_.choice(grid)
            trace = markov(random_, time * 4, up, down)
        hour = STEP / 3600
        yield Case(source, hours, deadline, trace, work, time, changeover, spot * hour, on_demand * hour)


@dataclass(frozen=True)
class Row:
    """One line of the table. Ratios; `optimum_ratio` over the cases in time only, None where there is none."""

    group: str
    policy: str
    cases: int
    cost: float
    optimum_ratio: float | None
    worst_ratio: float | None
    misses: int


def run_cases(cases: Sequence[Case]) -> list[Row]:
    """All policies on all cases, and their rows: over all, by source and by deadline."""
    best = [optimum(case) for case in cases]
    alone = [(case.work + case.changeover) * case.on_demand for case in cases]
    groups: dict[str, list[int]] = {"all": list(range(len(cases)))}
    for index, case in enumerate(cases):
        length = "a day or longer" if case.hours >= 24 else "shorter than a day"
        for group in (f"traces: {case.source}", f"deadline: x{case.deadline}", f"job: {length}"):
            groups.setdefault(group, []).append(index)
    paid = {name: [replay(case, policy) for case in cases] for name, policy in POLICIES.items()}
    paid["optimum (knows the future)"] = [Paid(cost, True) for cost in best]
    rows = []
    for group, members in sorted(groups.items()):
        for name, outcomes in paid.items():
            ratios = [outcomes[i].cost / best[i] for i in members if outcomes[i].in_time]
            rows.append(
                Row(
                    group=group,
                    policy=name,
                    cases=len(members),
                    cost=statistics.fmean(outcomes[i].cost / alone[i] for i in members),
                    optimum_ratio=statistics.fmean(ratios) if ratios else None,
                    worst_ratio=max(ratios, default=None),
                    misses=sum(not outcomes[i].in_time for i in members),
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--traces", type=Path, help="folder of measured traces, JSON files")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = run_cases(list(draw_cases(arguments.seed, arguments.cases, arguments.traces)))
    if arguments.json:
        print(json.dumps([vars(row) for row in rows]))
        return
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group]
        print(f"\n{group}: {mine[0].cases} cases")
        print(f"  {'policy':28} {'cost':>6} {'saved':>6} {'/ optimum':>9} {'worst':>6} {'misses':>6}")
        for row in mine:
            ratio, worst = (f"{x:.2f}" if x is not None else "-" for x in (row.optimum_ratio, row.worst_ratio))
            print(f"  {row.policy:28} {row.cost:6.3f} {1 - row.cost:6.0%} {ratio:>9} {worst:>6} {row.misses:>6}")


if __name__ == "__main__":
    main()
