"""Promise: chaos kills all over a run, and its certificate is clean only for a job that resumes exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.chaos import LAST_MOMENT, MOMENTS, Planned, plan_kills
from tests.job.running import write_rows

counts = st.integers(0, 200)
seeds = st.integers(-(2**31), 2**31)

# --------------------------------------------------------------------------------------------------------- the plan


@given(counts, seeds)
def test_there_are_as_many_kills_as_were_asked_for_and_the_same_for_the_same_seed(count: int, seed: int) -> None:
    plan = plan_kills(count, seed=seed)
    assert len(plan) == count
    assert plan == plan_kills(count, seed=seed)


@given(counts, seeds)
def test_kills_are_spread_evenly_over_the_moments_and_the_publishing_comes_last(count: int, seed: int) -> None:
    moments = [kill.moment for kill in plan_kills(count, seed=seed)]
    before = [moment for moment in moments if moment != LAST_MOMENT]
    assert moments == before + [LAST_MOMENT] * (count - len(before))
    assert set(before) <= set(MOMENTS)
    found = Counter(dict.fromkeys(MOMENTS, 0))
    found.update(before)
    assert max(found.values()) - min(found.values()) <= 1
    # The publishing is a moment like the others, and gets a kill however few there are.
    assert len(moments) - len(before) >= min(count, 1)
    assert abs((count - len(before)) - count / (len(MOMENTS) + 1)) <= 1


@given(st.integers(1, 200), seeds)
def test_a_kill_comes_within_its_moment(count: int, seed: int) -> None:
    for kill in plan_kills(count, seed=seed):
        assert kill.signal in (Signals.SIGKILL, Signals.SIGTERM)
        # Loading takes seconds and says nothing meanwhile; whatever else happens is over in a blink.
        assert 0 <= kill.delay_seconds <= (4.0 if kill.moment == "load" else 0.05)


def test_seeds_differ_in_moments_signals_and_delays() -> None:
    plans = [plan_kills(20, seed=seed) for seed in range(5)]
    for part in ("moment", "signal", "delay_seconds"):
        assert len({tuple(getattr(kill, part) for kill in plan) for plan in plans}) == 5


# --------------------------------------------------------------------------------------------------------- for real

KILLS = 4


def seed_that(holds: Any) -> int:
    """The first seed whose plan is as a test needs it."""
    return next(seed for seed in range(1000) if holds(plan_kills(KILLS, seed=seed)))


def ends_a_step_by_sigterm(plan: list[Planned]) -> bool:
    return any(kill.moment == "step" and kill.signal is Signals.SIGTERM for kill in plan)


def chaos(tmp_path: Path, *, seed: int, **variables: str) -> tuple[int, dict[str, Any], str]:
    """`ftjob chaos --json` of a small recipe with dropout: exit code, answer, and what was said meanwhile."""
    write_rows(tmp_path / "rows.jsonl", 24)
    recipe = {
        "base_model": {"id": "builtin:tiny"},
        "dataset": {"train": "rows.jsonl", "held_out": 0.2},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {"epochs": 3, "learning_rate": 0.003, "gradient_accumulation": 2, "max_length": 64},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "launch.cli", "chaos", "--json", "--kills", str(KILLS), "--seed", str(seed)]
    done = subprocess.run(
        [*command, str(tmp_path / "recipe.json")],
        env=os.environ | {"FTJOB_HOME": str(tmp_path / "home")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(done.stdout.splitlines()) == 1, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_certificate_of_the_job_is_clean_under_real_kills(tmp_path: Path) -> None:
    code, found, said = chaos(tmp_path, seed=seed_that(ends_a_step_by_sigterm))
    assert code == 0, said
    assert all(check["holds"] for check in found["certificate"]["checks"])
    assert found["planned"] == KILLS
    # A kill may meet a process that has just ended by itself.
    assert len(found["kills"]) >= KILLS - 1
    assert found["attempts"] == len(found["kills"]) + 1
    assert {kill["attempt"] for kill in found["kills"]} <= set(range(1, found["attempts"]))
    assert said.count(" kills left") == len(found["kills"])
    assert found["folder"] is None
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # both runs are gone


# Makes every job of this process's children forget the random state of the checkpoint that it resumes from.
FORGETFUL = """
import importlib.abc, importlib.util, sys

class Forgetful(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "job.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def then_forget(module):
            load(module)
            module.set_random_state = lambda state: None
        spec.loader.exec_module = then_forget
        return spec

sys.meta_path.insert(0, Forgetful())
"""


@pytest.mark.slow
def test_a_job_that_resumes_with_another_random_state_is_caught(tmp_path: Path) -> None:
    """With dropout, the steps after a resume differ then: the smallest mistake that a resume can make."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(FORGETFUL)
    code, found, said = chaos(tmp_path, seed=seed_that(ends_a_step_by_sigterm), PYTHONPATH=str(broken))
    assert code == 1, said
    failed = {check["claim"] for check in found["certificate"]["checks"] if not check["holds"]}
    assert {"every training loss is equal", "adapter_model.safetensors is equal, byte for byte"} <= failed
    # The order of the rows is a function of seed and epoch, and needs no random state.
    assert "each row was trained exactly once an epoch" not in failed
    assert list(Path(found["folder"]).glob("runs/killed/log.jsonl"))  # kept, for whoever wants to look
