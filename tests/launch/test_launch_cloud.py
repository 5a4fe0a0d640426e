"""Promise: a launch asks before it buys, says what it does, and can die between any two of its steps."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from job.contract.errors import DatasetInvalid, NotFound, Unreachable
from job.contract.layout import RunLayout, Uri, dataset_key
from job.contract.submission import Submission
from job.storage import open_store
from launch.cli import cli
from launch.cloud import FRESH_SECONDS, CloudBackend
from launch.plan import Upload
from launch.settings import Settings
from launch.skypilot import ManagedJob
from launch.task import job_name
from launch.upload import put_dataset
from tests.launch.fake_sky import FakeSky
from tests.launch.kit import make_recipe

DYING = Path(__file__).parent / "dying_ftjob.py"
ON_SLURM = ("--infra", "slurm", "--gpu", "H100")


class Desk:
    """A person with a Slurm cluster."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "ftjob"
        self.home.mkdir(parents=True)
        self.bucket = (root / "bucket").as_uri()
        (self.home / "settings.toml").write_text(f'bucket = "{self.bucket}"\nslurm_python = "/v/bin/python"\n')
        self.recipe = make_recipe(root / "recipes")
        self.sky = FakeSky(root / "sky")
        self.later = 0.0

    def ftjob(self, *arguments: str | Path, stdin: str | None = None) -> Result:
        def maker(settings: Settings, _name: str) -> CloudBackend:
            return CloudBackend(settings, self.sky, clock=lambda: time.time() + self.later)

        make: Callable[[Settings, str], CloudBackend] = maker
        return CliRunner(mix_stderr=False).invoke(
            cli, [str(a) for a in arguments], obj=make, input=stdin, env={"FTJOB_HOME": str(self.home)}
        )

    def dying(self, number: int, *arguments: str | Path) -> int:
        """Run a command that is killed at its N-th write; its exit code."""
        return subprocess.run(
            [sys.executable, str(DYING), str(number), str(self.root), *map(str, arguments)],
            env=os.environ | {"FTJOB_HOME": str(self.home), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            check=False,
        ).returncode

    def status(self) -> str | None:
        """The run's status; None when it does not exist."""
        done = self.ftjob("status", "my-run", "--json")
        assert done.exit_code in (0, 2), done.stderr + str(done.exception)
        return str(json.loads(done.stdout)["status"]) if done.exit_code == 0 else None


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_nothing_is_bought_unasked(desk: Desk) -> None:
    done = desk.ftjob("launch", *ON_SLURM, desk.recipe)
    assert done.exit_code == 2
    assert "--yes buys without asking" in done.stderr
    assert desk.sky.launched() == []
    assert not (desk.root / "bucket").exists()


def launched(desk: Desk) -> RunLayout:
    assert desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe).exit_code == 0
    return RunLayout("my-run")


def test_where_skypilot_cannot_be_asked_a_cancel_reaches_the_job_through_the_bucket(desk: Desk) -> None:
    layout = launched(desk)
    desk.sky.broken = Unreachable("SkyPilot could not be asked")
    done = desk.ftjob("cancel", "my-run")
    assert done.exit_code == 0, done.stderr
    assert open_store(desk.bucket).get(layout.stop(1))
    assert "its machine may stay" in done.stderr
    # The job ended, was started again, and then asked for no other attempt.
    desk.sky.broken = None
    desk.later = 2 * FRESH_SECONDS
    desk.sky.set_jobs(ManagedJob(1, "FAILED", 0, "", time.time()), name=job_name("my-run"))
    assert desk.status() == "cancelled"


def test_any_machine_that_can_write_the_bucket_can_stop_a_run(desk: Desk, tmp_path: Path) -> None:
    layout = launched(desk)
    done = Desk(tmp_path / "other").ftjob("cancel", "my-run", "--bucket", desk.bucket)
    assert done.exit_code == 0, done.stderr
    assert open_store(desk.bucket).get(layout.stop(1))
    assert "its machine may stay" in done.stderr


def test_a_run_that_is_over_is_not_asked_to_stop(desk: Desk) -> None:
    layout = launched(desk)
    desk.sky.set_jobs(ManagedJob(1, "FAILED", 0, "", 0), name=job_name("my-run"))
    desk.later = 2 * FRESH_SECONDS
    assert "nothing of it runs here" in desk.ftjob("cancel", "my-run").stderr
    with pytest.raises(NotFound):
        open_store(desk.bucket).get(layout.stop(1))
    assert desk.status() == "failed"


def test_what_a_recipe_says_otherwise_and_changes_nothing_by_it_is_told(desk: Desk) -> None:
    launched(desk)
    desk.sky.set_jobs(ManagedJob(1, "FAILED", 0, "", 0), name=job_name("my-run"))
    desk.later = 2 * FRESH_SECONDS
    again = ("launch", "--run", "my-run", *ON_SLURM, "--dry-run")
    assert "no effect" not in desk.ftjob(*again, desk.recipe).stdout
    changed = make_recipe(desk.recipe.parent, checkpoints={"minutes": 5})
    done = desk.ftjob(*again, changed)
    assert done.exit_code == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert (
        "checkpoints.minutes of the recipe (5.0) has no effect: the run keeps what it was launched with (auto)" in told
    )


def test_a_dry_run_shows_everything_and_creates_nothing(desk: Desk) -> None:
    done = desk.ftjob("launch", *ON_SLURM, "--dry-run", "--show-task", desk.recipe)
    assert done.exit_code == 0, done.stderr
    assert "buys     H100:1 your own" in done.stdout
    assert "exec" in done.stdout
    assert desk.sky.launched() == []
    assert not (desk.root / "bucket").exists()


def test_a_launch_hands_the_run_over_and_says_so_in_the_bucket(desk: Desk) -> None:
    done = desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "my-run\n"
    [launched] = desk.sky.launched()
    assert launched["task"]["name"] == "ftjob-my-run"
    assert launched["task"]["envs"]["FTJOB_LAST_ATTEMPT"] == "21"
    data = open_store(desk.bucket).get(RunLayout("my-run").submission(1))
    submission = Submission.from_bytes(data, name="submission")
    assert (submission.backend, submission.last_attempt) == ("skypilot", 21)
    assert submission.offers[0].cloud == "slurm"
    assert desk.status() == "pending"


def test_a_launch_that_skypilot_refuses_leaves_a_run_that_can_be_taken_up(desk: Desk) -> None:
    desk.sky.broken = Unreachable("nobody answers")
    done = desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    assert done.exit_code == 1
    assert "nobody answers" in done.stderr
    desk.sky.broken, desk.later = None, FRESH_SECONDS
    assert desk.status() == "interrupted"
    again = desk.ftjob("launch", "--run", "my-run", *ON_SLURM, "--yes", "--detach")
    assert again.exit_code == 0, again.stderr
    assert len(desk.sky.launched()) == 1


@pytest.mark.slow
def test_a_launch_killed_at_any_write_leaves_nothing_or_a_run_that_goes_on(tmp_path: Path) -> None:
    stages = set()
    for number in count(1):
        desk = Desk(tmp_path / str(number))
        launch = ("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
        code = desk.dying(number, *launch)
        if code == 0:
            break
        assert code == -9
        handed_over = len(desk.sky.launched())
        status = desk.status()
        stages.add((status, handed_over))
        if handed_over:
            assert status == "pending"
            continue
        desk.later = FRESH_SECONDS  # by then SkyPilot's queue would show a job that it was given
        assert desk.status() in (None, "interrupted")
        resumed = ("launch", "--run", "my-run", *ON_SLURM, "--yes", "--detach")
        again = desk.ftjob(*(launch if desk.status() is None else resumed))
        assert again.exit_code == 0, again.stderr
        assert len(desk.sky.launched()) == 1
    assert stages == {(None, 0), ("interrupted", 0), ("pending", 0), ("pending", 1)}, "not every stage was met"


def test_a_run_that_may_live_is_not_launched_twice(desk: Desk) -> None:
    desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    again = desk.ftjob("launch", "--run", "my-run", *ON_SLURM, "--yes", "--detach")
    assert again.exit_code == 2
    assert "still running" in again.stderr
    assert len(desk.sky.launched()) == 1


def test_a_run_that_starts_from_another_machine_is_left_alone_until_it_must_have(desk: Desk, tmp_path: Path) -> None:
    """Its SkyPilot cannot be asked from here, and before the first attempt there is no sign of life to see."""
    desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    other = Desk(tmp_path / "other")
    again = ("launch", "--run", "my-run", "--bucket", desk.bucket, *ON_SLURM, "--yes", "--detach")
    refused = other.ftjob(*again)
    assert (refused.exit_code, other.sky.launched()) == (2, [])
    assert "may be starting elsewhere: it was handed to skypilot 0 min ago" in refused.stderr

    key, store = RunLayout("my-run").submission(1), open_store(desk.bucket)
    submission = Submission.from_bytes(store.get(key), name=key)
    store.delete(key)
    long_ago = submission.model_copy(update={"submitted_at": submission.submitted_at - timedelta(minutes=16)})
    store.put_new(key, long_ago.to_bytes())
    done = other.ftjob(*again)
    assert (done.exit_code, len(other.sky.launched())) == (0, 1), done.stderr


def test_a_machine_that_can_only_read_the_bucket_says_what_it_knows(desk: Desk, tmp_path: Path) -> None:
    desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    other = Desk(tmp_path / "other")
    done = other.ftjob("status", "my-run", "--bucket", desk.bucket, "--json")
    assert json.loads(done.stdout)["status"] == "unknown", "it could not ask, and does not make an end of that"
    assert "launched elsewhere" in json.loads(done.stdout)["message"]
    logs = other.ftjob("logs", "my-run", "--bucket", desk.bucket)
    assert logs.exit_code == 0
    assert "what its records in" in logs.stderr
    listed = other.ftjob("list", "--bucket", desk.bucket, "--json")
    assert [run["run_id"] for run in json.loads(listed.stdout)] == ["my-run"]


def test_the_end_of_a_run_says_what_is_left_of_it(desk: Desk) -> None:
    desk.ftjob("launch", *ON_SLURM, "--yes", "--detach", "--name", "my-run", desk.recipe)
    desk.sky.set_jobs(ManagedJob(1, "CANCELLED", 0, "", 0), name=job_name("my-run"))
    assert "0 left (asked skypilot)" in desk.ftjob("status", "my-run").stdout
    desk.sky.machines = ("ftjob-my-run-1",)
    told = desk.ftjob("status", "my-run").stdout
    assert "1 left" in told
    assert "ftjob-my-run-1" in told
    desk.sky.broken = Unreachable("no answer")
    assert json.loads(desk.ftjob("status", "my-run", "--json").stdout)["status"] == "unknown"


def test_a_dataset_of_this_machine_is_put_into_the_bucket_first(desk: Desk, s3_uri: str) -> None:
    digest = "sha256:" + "a" * 64
    bought = ("--gpu", "H100", "--image", f"r.example/ftjob@{digest}", "--bucket", s3_uri)
    done = desk.ftjob("launch", *bought, "--yes", "--detach", "--name", "my-run", desk.recipe)
    assert done.exit_code == 0, done.stderr
    [launched] = desk.sky.launched()
    assert launched["secrets"] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    store = open_store(s3_uri)
    [dataset] = [info.key for info in store.list("datasets/")]
    assert store.get(dataset) == (desk.recipe.parent / "rows.jsonl").read_bytes()
    record = json.loads(store.get(RunLayout("my-run").recipe))
    assert record["train"]["uri"] == record["recipe"]["dataset"]["train"] == f"{s3_uri}/{dataset}"


def test_a_dataset_that_changes_while_a_person_is_asked_is_not_uploaded_as_the_one_that_was_checked(
    tmp_path: Path, s3_uri: str
) -> None:
    """It would lie under the digest of the other for good, and refuse every launch of that one on a bought machine."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    checked = hashlib.sha256(rows.read_bytes()).hexdigest()
    upload = Upload(source=Uri(rows.as_uri()), uri=Uri(f"{s3_uri}/{dataset_key(checked)}"), sha256=checked)
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(DatasetInvalid, match="was changed after it was checked"):
        put_dataset(upload)
    assert list(open_store(s3_uri).list("datasets/")) == []
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    put_dataset(upload)
    assert open_store(s3_uri).get(dataset_key(checked)) == rows.read_bytes()


def test_local_launches_go_on_without_skypilot(tmp_path: Path) -> None:
    """`--infra local` must not so much as look for it: the import is made impossible."""
    script = (
        "import sys\n"
        "sys.modules['sky'] = None\n"
        "from launch.cli import cli\n"
        f"cli(['plan', '--infra', 'local', {str(make_recipe(tmp_path))!r}], prog_name='ftjob')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"FTJOB_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "on local" in done.stdout
