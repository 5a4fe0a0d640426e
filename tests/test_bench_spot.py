"""Promise: what bench/spot_policies.py prints is so. Its optimum is the optimum, and nobody beats it or is late."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.deadline import Choice
from tests.benchmarks import load_bench

SCRIPT = Path(__file__).parents[1] / "bench" / "spot_policies.py"


bench = load_bench("spot_policies")


@example(trace=[False, False, False, True, True, True], work=4, changeover=0, spot=0.1)
@example(trace=[True, False, True, True, True, True], work=4, changeover=2, spot=0.1)
@settings(max_examples=25, deadline=None)
@given(
    trace=st.lists(st.booleans(), min_size=6, max_size=6),
    work=st.integers(1, 4),
    changeover=st.integers(0, 2),
    spot=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_the_optimum_is_the_cheapest_of_all_plans_tried_one_by_one(
    trace: list[bool], work: int, changeover: int, spot: float
) -> None:
    case = bench.Case("tiny", 1, 1.0, np.array(trace), work, 6, changeover, spot, 1.0)
    costs = []
    for plan in itertools.product(Choice, repeat=6):
        paid = bench.replay(case, lambda _, plan=plan: lambda now: plan[6 - int(now.time_left) // bench.STEP])
        if paid.in_time:
            costs.append(paid.cost)
    assert bench.optimum(case) == pytest.approx(min(costs, default=float("inf")))


def test_the_table_shows_no_miss_of_the_rule_and_nobody_cheaper_than_the_optimum() -> None:
    command = [sys.executable, str(SCRIPT), "--cases", "60", "--seed", "5", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1])
    rows = {row["policy"]: row for row in json.loads(shown.stdout) if row["group"] == "all"}
    assert set(rows) == {*bench.POLICIES, "optimum (knows the future)"}
    assert rows.pop("spot only")["misses"] > 0
    assert {row["misses"] for row in rows.values()} == {0}
    assert {row["cases"] for row in rows.values()} == {60}
    assert min(row["optimum_ratio"] for row in rows.values()) == pytest.approx(1)
    assert rows["on demand only"]["cost"] == pytest.approx(1)
    assert rows["uniform progress"]["cost"] < rows["  never back to spot"]["cost"] < 1


def test_the_same_seed_draws_the_same_cases_and_another_does_not() -> None:
    first, again, other = ([case.trace.tolist() for case in bench.draw_cases(seed, 9)] for seed in (1, 1, 2))
    assert first == again != other


def test_a_random_trace_has_the_mean_times_that_were_asked_for() -> None:
    trace = bench.markov(random.Random(1), 400_000, 4.0, 1.0)
    stretches = [(up, len(list(group)) * bench.STEP / 3600) for up, group in itertools.groupby(trace.tolist())]
    for up, hours in ((True, 4.0), (False, 1.0)):
        assert np.mean([length for state, length in stretches if state is up]) == pytest.approx(hours, rel=0.05)


def test_a_measured_step_counts_only_where_every_probe_of_it_found_all_machines(tmp_path: Path) -> None:
    file = tmp_path / "zone.json"
    file.write_text(json.dumps({"metadata": {"gap_seconds": bench.STEP // 2}, "data": [4, 4, 4, 3, 0, 4] * 2}))

    class First(random.Random):
        """Begins every trace at its beginning."""

        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            return 0

    assert bench.measured(First(), 6, file).tolist() == [True, False, False] * 2
