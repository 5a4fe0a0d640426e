"""Promise: a launch with a deadline leaves spot for on demand while that is still in time, and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job.contract.layout import Uri
from job.contract.status import BackendState, Status
from launch.backend import Described
from launch.prices import Policy
from launch.runs import Poll
from launch.switching import LOOK_SECONDS, Course
from launch.view import Commit, RunView
from tests.contract.examples import SHA, START, at
from tests.launch.fake_sky import FakeSky
from tests.launch.kit import make_recipe

COMMAND = Path(__file__).parent / "dying_ftjob.py"
HOUR = 3600.0


def course(*, hours: float, work: float = 10.0) -> Course:
    """A run of ten hours that began at START."""
    return Course(
        deadline=at(hours * HOUR),
        began=START,
        work_seconds=work * HOUR,
        changeover_seconds=600,
        lost_seconds=300,
        price_ratio=0.5,
    )


def poll(state: BackendState, *, status: Status = Status.RECOVERING, step: int | None = None) -> Poll:
    view = RunView(run_id="my-run", status=status, bucket=Uri("s3://b"), step=step, total_steps=100)
    return Poll(view, Described(state))


def test_with_time_to_spare_it_waits_for_spot() -> None:
    one = course(hours=30)
    assert not one.look(poll(BackendState.RECOVERING), at(HOUR))
    assert one.wanted is None


def test_behind_schedule_without_spot_it_goes_on_demand() -> None:
    one = course(hours=12)
    assert one.look(poll(BackendState.RECOVERING), at(HOUR))
    assert one.wanted is Policy.ON_DEMAND
    assert "behind the schedule" in one.reason


def test_nobody_to_ask_changes_nothing() -> None:
    one = course(hours=12)
    assert not one.look(poll(BackendState.UNREACHABLE), at(HOUR))
    assert not one.look(poll(BackendState.GONE, status=Status.SUCCEEDED), at(HOUR + 2 * LOOK_SECONDS))


def test_it_is_not_asked_at_every_look_of_the_watcher() -> None:
    one = course(hours=12)
    assert not one.look(poll(BackendState.UNREACHABLE), at(HOUR))
    assert not one.look(poll(BackendState.RECOVERING), at(HOUR + 1))
    assert one.look(poll(BackendState.RECOVERING), at(HOUR + LOOK_SECONDS))


def test_what_is_committed_counts() -> None:
    one = course(hours=12)
    found = poll(BackendState.RECOVERING, step=90)
    commit = Commit(checkpoint="c", step=90, at=START, age_seconds=0, is_old=False)
    ahead = Poll(found.view.model_copy(update={"last_commit": commit}), found.described)
    assert not one.look(ahead, at(HOUR)), "one hour of work left of ten, and eleven to do it in"


@pytest.fixture
def person(tmp_path: Path, s3_uri: str) -> tuple[Path, Path, str]:
    home = tmp_path / "ftjob"
    home.mkdir()
    (home / "settings.toml").write_text(f'bucket = "{s3_uri}"\nimage = "r.example/ftjob@sha256:{SHA}"\n')
    return tmp_path, make_recipe(tmp_path / "recipes"), s3_uri


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(COMMAND), "0", str(root), *arguments],
        env=os.environ | {"FTJOB_HOME": str(root / "ftjob"), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def needs(root: Path, recipe: Path) -> tuple[float, float]:
    """What the quote says of a run: seconds of work, and of a changeover at worst."""
    with start(root, "plan", str(recipe), "--gpu", "H100", "--json") as planned:
        answer = json.loads(planned.communicate()[0])
    items = {item["name"]: item["seconds"] for item in answer["quote"]["offers"][0]["items"]}
    once = [items.pop(name) for name in ("provisioning", "image", "weights", "loading") if name in items]
    items.pop("interruptions", None)
    return sum(each["p50"] for each in items.values()), sum(each["p90"] for each in once)


def iso(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.slow
def test_too_late_for_spot_is_on_demand_from_the_start_and_later_than_that_is_refused(
    person: tuple[Path, Path, str],
) -> None:
    root, recipe, _ = person
    work, changeover = needs(root, recipe)
    launch = ("launch", str(recipe), "--gpu", "H100", "--yes", "--detach", "--name")
    with start(root, *launch, "late", "--by", iso(work + 1.5 * changeover)) as launched:
        assert "on demand" in launched.communicate()[1]
    assert launched.returncode == 0
    [task] = [each["task"] for each in FakeSky(root / "sky").launched()]
    assert {offer["use_spot"] for offer in task["resources"]["any_of"]} == {False}
    with start(root, *launch, "never", "--by", iso(work + changeover / 2)) as refused:
        assert "even on demand" in refused.communicate()[1]
    assert refused.returncode == 2


@pytest.mark.slow
def test_a_watched_launch_that_runs_late_stops_looking_for_spot_and_buys_on_demand(
    person: tuple[Path, Path, str],
) -> None:
    root, recipe, _ = person
    work, changeover = needs(root, recipe)
    # Just enough for spot now, and no more by the second look, a minute later.
    slack = 2 * changeover + LOOK_SECONDS + 60 + 40
    sky = FakeSky(root / "sky")
    command = ("launch", str(recipe), "--gpu", "H100", "--yes", "--name", "late", "--by", iso(work + slack))
    with start(root, *command) as launched:
        try:
            deadline = time.monotonic() + 200
            while len(sky.launched()) < 2:
                assert time.monotonic() < deadline, "it never changed"
                assert launched.poll() is None, launched.communicate()[1]
                time.sleep(0.2)
        finally:
            launched.kill()
        said = launched.communicate()[1]
    first, second = (each["task"]["resources"]["any_of"] for each in sky.launched())
    assert {offer["use_spot"] for offer in first} == {True}
    assert {offer["use_spot"] for offer in second} == {False}
    assert "changes to on-demand" in said
