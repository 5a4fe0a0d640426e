"""Promise: SkyPilot takes the machine away in the middle of an epoch, and the adapter is that of a run left alone.

SkyPilot is real, and so are its managed jobs and their recovery: they run on a Slurm cluster of one host that this
module brings up and takes down. Only the GPUs are pretended. The same recipe, run on this machine and left alone, says
what every byte of the adapter should be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import pytest

from job.contract.passport import Passport
from launch.task import job_name
from tests.e2e.slurm.apiserver import ManagedJob
from tests.e2e.slurm.host import SlurmHost, slurm_host
from tests.e2e.slurm.processes import wait_until
from tests.machine import require_disposable_machine
from tests.s3server import BUCKET, S3Server

pytestmark = [pytest.mark.machine, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT: Final = Path(__file__).parents[2]
FTJOB: Final = Path(sys.executable).with_name("ftjob")
STEPS_PER_EPOCH: Final = 15
TAKEN_AT: Final = STEPS_PER_EPOCH + 5
"""The step after which the node goes: in the middle of the second of three epochs."""
USD_PER_HOUR: Final = 3600.0
"""Of the cluster, pretended: a dollar a second."""
PATIENCE: Final = 600.0
"""For anything that SkyPilot does; each takes it 10 to 60 s on an idle machine of two cores."""
COMPARED: Final = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Person:
    """Somebody who types commands: their settings, their SkyPilot, their bucket."""

    folder: Path
    environ: dict[str, str]

    def command(self, *arguments: str | Path) -> list[str | Path]:
        return [FTJOB, *arguments]

    def ask(self, *arguments: str | Path) -> Any:
        """What a command answers to --json, by its only line on stdout."""
        done = subprocess.run(
            self.command(*arguments, "--json"), env=self.environ, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        return json.loads(line)

    @contextlib.contextmanager
    def watching(self, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on while other things happen; it is ended with the test."""
        with (self.folder / f"{uuid.uuid4().hex}.stderr").open("w+") as said:
            process = subprocess.Popen(
                self.command(*arguments),
                env=self.environ,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def adapter(self, run_id: str) -> dict[str, str]:
        """The digests of the fetched files that hold the adapter."""
        folder = Path(self.ask("fetch", run_id, f"{run_id}-adapter")["folder"])
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}

    def passport(self, run_id: str) -> Passport:
        """Of an adapter that was fetched."""
        path = self.folder / f"{run_id}-adapter" / "passport.json"
        return Passport.from_bytes(path.read_bytes(), name=path.name)


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmHost]:
    require_disposable_machine()
    logs = tmp_path_factory.mktemp("slurm-logs")
    failed_before = request.session.testsfailed
    with slurm_host(logs) as up:
        yield up
        if request.session.testsfailed > failed_before:
            up.save_logs(logs)


@pytest.fixture(scope="module")
def recipe(s3_process: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 steps, each long enough that the middle of an epoch can be hit. The dataset is in the bucket."""
    rows = (ROOT / "examples" / "quickstart.jsonl").read_bytes()
    key = f"{uuid.uuid4().hex}/rows.jsonl"
    with boto3_client(s3_process) as client:
        client.put_object(Bucket=BUCKET, Key=key, Body=rows * 4)
    written = json.loads((ROOT / "examples" / "quickstart.json").read_bytes())
    written["dataset"]["train"] = f"s3://{BUCKET}/{key}"
    written["training"]["gradient_accumulation"] *= 4
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(json.dumps(written))
    return path


@contextlib.contextmanager
def boto3_client(server: S3Server) -> Iterator[Any]:
    given = server.environment
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=given["AWS_DEFAULT_REGION"],
        aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
    )
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="module")
def untouched(s3_process: S3Server, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the adapter is when nothing happens: the digests of its files, from a run on this machine."""
    require_disposable_machine()
    folder = tmp_path_factory.mktemp("untouched")
    person = Person(folder, os.environ | s3_process.environment | {"FTJOB_HOME": str(folder / "home")})
    answer = person.ask("launch", "--infra", "local", recipe)
    assert (answer["total_steps"], len(answer["attempts"])) == (3 * STEPS_PER_EPOCH, 1)
    return person.adapter(answer["run_id"])


@pytest.fixture(scope="module")
def person(host: SlurmHost, s3_process: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Person:
    folder = tmp_path_factory.mktemp("person")
    home = folder / "home"
    home.mkdir()
    bucket = s3_process.uri(uuid.uuid4().hex)
    settings = f'slurm_python = "{host.python}"\nbucket = "{bucket}"\n[usd_per_hour]\nslurm = {USD_PER_HOUR}\n'
    (home / "settings.toml").write_text(settings)
    environ = os.environ | host.environment | s3_process.environment | {"FTJOB_HOME": str(home)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # importing SkyPilot would take 12 s, each time
    return Person(folder, environ)


def cancelled_in_slurm(host: SlurmHost, job: int) -> None:
    """Slurm's own notice: SIGTERM, and ten seconds."""
    host.cluster.cancel(job)


def node_lost(host: SlurmHost, job: int) -> None:
    host.cluster.take_down(host.cluster.node_of(job))


def trainer_killed_then_node_lost(host: SlurmHost, job: int) -> None:
    (trainer,) = host.trainers()
    os.kill(trainer, signal.SIGKILL)
    node_lost(host, job)


@pytest.mark.parametrize("taken", [cancelled_in_slurm, node_lost, trainer_killed_then_node_lost])
def test_a_machine_taken_in_mid_epoch_changes_no_byte(
    taken: Callable[[SlurmHost, int], None],
    host: SlurmHost,
    person: Person,
    recipe: Path,
    untouched: dict[str, str],
) -> None:
    run_id = f"taken-{uuid.uuid4().hex[:8]}"
    name = job_name(run_id)
    launch = ("launch", "--infra", "slurm", "--gpu", "H100", "--yes", "--name", run_id, "--json", recipe)
    with person.watching(*launch) as watched:
        wait_for_step(host, run_id, TAKEN_AT, watched)
        (job,) = host.cluster.jobs()
        node = host.cluster.node_of(job)
        assert last_step(host, run_id) < 2 * STEPS_PER_EPOCH - 1
        try:
            taken(host, job)
            wait(host, lambda: host.server.managed_job(name).status == "RECOVERING", f"{name} is RECOVERING", watched)
            assert person.ask("status", run_id)["status"] == "recovering"
            answer, _ = watched.communicate(timeout=PATIENCE)
        finally:
            host.cluster.bring_up(node)
    assert watched.returncode == 0
    assert json.loads(answer)["status"] == "succeeded"
    # A run has succeeded when its adapter is published; SkyPilot learns it later, and gives the machine back.
    wait(host, lambda: host.server.managed_job(name) == ManagedJob("SUCCEEDED", recoveries=1), f"{name} is SUCCEEDED")
    wait(host, lambda: host.cluster.jobs() == [], "Slurm has no job any more")

    assert person.adapter(run_id) == untouched
    first, second = person.passport(run_id).attempts
    assert STEPS_PER_EPOCH <= second.restored_step < 2 * STEPS_PER_EPOCH
    assert second.restored_step + second.steps_done == 3 * STEPS_PER_EPOCH
    assert first.ended == ("preempted" if taken is cancelled_in_slurm else "killed")

    status = person.ask("status", run_id)
    assert status["status"] == "succeeded"
    assert status["left"]["names"] == []
    assert host.trainers() == []
    restored = [event["step"] for event in logged(person, run_id) if event["event"] == "attempt.restored"]
    assert restored[-1:] == [second.restored_step]  # SkyPilot keeps what the last machine said


def test_a_cancelled_run_saves_first_and_leaves_nothing(host: SlurmHost, person: Person, recipe: Path) -> None:
    run_id = f"cancelled-{uuid.uuid4().hex[:8]}"
    written = json.loads(recipe.read_bytes())
    written["training"]["epochs"] = 40  # SkyPilot takes half a minute to pass a cancellation on
    longer = person.folder / "longer.json"
    longer.write_text(json.dumps(written))
    person.ask("launch", "--infra", "slurm", "--gpu", "H100", "--yes", "--detach", "--name", run_id, longer)
    wait_for_step(host, run_id, 5)
    cancelled = person.ask("cancel", run_id)
    assert cancelled["status"] == "cancelled"
    (attempt,) = cancelled["attempts"]
    assert attempt["ended"] == "preempted"
    assert cancelled["last_commit"]["step"] == attempt["last_step"] >= 5
    wait(host, lambda: host.cluster.jobs() == [], "Slurm has no job any more")
    assert host.trainers() == []
    assert person.ask("status", run_id)["left"]["names"] == []


# ------------------------------------------------------------------------------------------------- what a run is doing


def test_a_budget_holds_over_a_preemption_and_more_of_it_finishes_exactly(
    host: SlurmHost, person: Person, recipe: Path, s3_process: S3Server, tmp_path: Path
) -> None:
    longer = json.loads(recipe.read_text())
    longer["training"]["epochs"] = 8
    path = tmp_path / "longer.json"
    path.write_text(json.dumps(longer))
    local = Person(tmp_path, os.environ | s3_process.environment | {"FTJOB_HOME": str(tmp_path / "home")})
    untouched = local.adapter(local.ask("launch", "--infra", "local", path)["run_id"])

    run_id = f"bounded-{uuid.uuid4().hex[:8]}"
    # --anyway: the quote knows what such a run takes on a real H100, and what that would cost at this price.
    bought = ("--infra", "slurm", "--gpu", "H100", "--yes", "--anyway", "--json")
    with person.watching("launch", *bought, "--name", run_id, "--budget", "60", path) as watched:
        wait_for_step(host, run_id, 10, watched)
        (job,) = host.cluster.jobs()
        host.cluster.cancel(job)
        answer, _ = watched.communicate(timeout=PATIENCE)
    landed = json.loads(answer)
    assert (watched.returncode, landed["status"]) == (3, "out_of_budget")
    assert len(landed["attempts"]) == 2
    assert landed["spent_usd"] <= 60 + USD_PER_HOUR / 3600 * 15, "a heartbeat over the ceiling at most"
    assert landed["step"] < 8 * STEPS_PER_EPOCH
    assert person.adapter(run_id) != untouched
    assert not person.passport(run_id).complete
    wait(host, lambda: host.cluster.jobs() == [], "Slurm has no job any more")

    person.ask("launch", "--run", run_id, *bought[:-1], "--budget", "+600")
    (person.folder / f"{run_id}-adapter").rename(person.folder / f"{run_id}-landed")
    assert person.adapter(run_id) == untouched
    assert person.passport(run_id).complete
    receipt = person.ask("receipt", run_id)
    assert receipt["cents"] == sum(row["cents"] for row in receipt["rows"])
    assert receipt["max_usd"] == 660


def last_step(host: SlurmHost, run_id: str) -> int:
    """The last step that the trainer said it did; 0 before the first."""
    return max((event["step"] for event in host.said(run_id) if event["event"] == "step"), default=0)


def wait_for_step(host: SlurmHost, run_id: str, step: int, watched: subprocess.Popen[str] | None = None) -> None:
    wait(host, lambda: last_step(host, run_id) >= step, f"run {run_id} does step {step}", watched)


def wait(host: SlurmHost, holds: Callable[[], bool], what: str, watched: subprocess.Popen[str] | None = None) -> None:
    """Look until it holds; a launch that ends meanwhile, or too long a wait, fails with the ends of all logs."""

    def looks() -> bool:
        if holds():
            return True
        if watched is not None and watched.poll() is not None:
            raise TimeoutError(f"the launch ended with {watched.returncode} before: {what}")
        return False

    try:
        wait_until(looks, what, seconds=PATIENCE)
    except TimeoutError as error:
        pytest.fail(f"{error}\n{host.report()}")


def logged(person: Person, run_id: str) -> list[dict[str, Any]]:
    """The job's events, as `ftjob logs` brings them."""
    done = subprocess.run(
        person.command("logs", run_id, "--json"), env=person.environ, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
