"""Promise: a task says exactly what its plan says; SkyPilot reads it; nothing a person wrote becomes shell text."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from job.contract.budget import Budget
from job.contract.environ import JobEnviron
from job.contract.layout import Uri
from job.contract.records import DatasetDigest, RunRecord
from job.contract.submission import Offer, Way
from launch.plan import COPY_BYTES, GUARD_SECONDS, Place, Plan, mounts_of, way_of
from launch.skypilot import SkyPilot
from launch.task import as_yaml, read_template, task_of
from tests.contract.examples import SHA, run_record

GOLDEN = Path(__file__).parent / "golden"
IMAGE = f"registry.example/ftjob@sha256:{SHA}"
INSIDE = f"registry.example/ftjob-inside@sha256:{SHA}"
BUCKET = Uri("s3://mine/ftjob")
NEBIUS = Offer(cloud="nebius", region="eu-north1", gpu="H100", gpus=1, spot=True, usd_per_hour=1.25)
RUNPOD = Offer(cloud="runpod", region="US", gpu="H100", gpus=1, spot=False, usd_per_hour=2.39)
SLURM = Offer(cloud="slurm", gpu="H100", gpus=1, spot=False)


def a_run(size: int = 1000) -> RunRecord:
    train = DatasetDigest(uri="s3://mine/data/rows é.jsonl", sha256=SHA, size=size, rows=10)
    return run_record().model_copy(update={"run_id": "my-run", "train": train, "held_out": None})


def a_plan(*offers: Offer, size: int = 1000, **more: Any) -> Plan:
    places = tuple(Place(offer=offer, way=way_of(offer.cloud)) for offer in offers)
    run = a_run(size)
    bought = {
        "places": places,
        "image": IMAGE,
        "inside_image": INSIDE,
        "mounts": mounts_of([run.train], places, custom_endpoint=False),
        "secrets": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        "variables": {"AWS_REGION": "eu-west-1"},
        **more,
    }
    return Plan.of(run, bucket=BUCKET, backend="skypilot", max_restarts=20, **bought)


def environ() -> JobEnviron:
    return JobEnviron(
        run_id="my-run", bucket=BUCKET, workdir="/ftjob/work", last_attempt=21, infra={"infra": "skypilot"}
    )


PLANS = {
    "vm_and_container_clouds": a_plan(NEBIUS, RUNPOD, disk_gb=300),
    "large_dataset_is_mounted": a_plan(NEBIUS, size=COPY_BYTES + 1),
    "slurm": a_plan(SLURM, image=None, inside_image=None, python="/shared/venv/bin/python"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_becomes_this_task(name: str) -> None:
    template = read_template()
    text = as_yaml({**task_of(PLANS[name], environ(), template), "run": "(as in sky/train.yaml)\n"})
    golden = GOLDEN / f"{name}.yaml"
    if os.environ.get("FTJOB_WRITE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PLANS)
def test_skypilots_own_parser_reads_it(name: str) -> None:
    SkyPilot().check_task(task_of(PLANS[name], environ(), read_template()))


@pytest.mark.parametrize(("sold_as", "asked"), [("a3-highgpu-1g", "a3-highgpu-1g"), ("(attachable)", None)])
def test_only_the_machine_whose_price_was_shown_is_bought(sold_as: str, asked: str | None) -> None:
    """Where it is sold out SkyPilot would take the next dearer one with such a GPU: Lambda's at $3.29 for $2.49."""
    offer = Offer(cloud="gcp", region="us-central1", instance_type=sold_as, gpu="H100", gpus=1, spot=True)
    task = task_of(a_plan(offer), environ(), read_template())
    assert task["resources"]["any_of"][0].get("instance_type") == asked


@pytest.mark.parametrize("name", PLANS)
def test_the_script_is_the_templates_whatever_the_plan_holds(name: str) -> None:
    template = read_template()
    assert task_of(PLANS[name], environ(), template)["run"] == template["run"]


def test_no_value_of_a_secret_is_in_a_task() -> None:
    task = task_of(PLANS["slurm"], environ(), read_template())
    assert task["secrets"] == {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


def test_the_template_is_left_as_it_was() -> None:
    template = read_template()
    task_of(PLANS["slurm"], environ(), template)
    assert template == read_template()


@pytest.mark.parametrize(("cloud", "way"), [("aws", Way.DOCKER), ("runpod", Way.INSIDE), ("slurm", Way.HOST)])
def test_each_cloud_runs_the_job_in_the_way_that_it_can(cloud: str, way: Way) -> None:
    assert way_of(cloud) is way


# ------------------------------------------------------------------------------- the script itself, run by a real bash


def run_script(tmp_path: Path, variables: dict[str, str], docker: str = "") -> subprocess.CompletedProcess[str]:
    """Run sky/train.yaml's script with a `docker` that writes down what it is asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"docker": docker, "sleep": "", "sudo": 'shift; exec "$@"'}.items():
        path = tools / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        ["/bin/bash", "-c", read_template()["run"]],
        env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(home), "ASKED": str(tmp_path / "asked"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


SAY = r'printf "%q " "$@" >>"$ASKED"; echo >>"$ASKED"; '


def test_a_machine_of_ones_own_runs_the_image_and_passes_variables_by_name(tmp_path: Path) -> None:
    (tmp_path / "home" / "ftjob-data").mkdir(parents=True)
    secret = "s3cret; $(touch pwned) 'x"
    variables = {"FTJOB_IMAGE": IMAGE, "FTJOB_RUN_ID": "my-run", "AWS_SECRET_ACCESS_KEY": secret, "OTHER": "x"}
    done = run_script(tmp_path, variables, docker=SAY + '[ "$1" != run ] || { echo "$FTJOB_IMAGE_DIGEST"; exit 75; }')
    assert done.returncode == 75, done.stderr  # the job's own code
    assert done.stdout.strip() == f"sha256:{SHA}"
    asked = [shlex.split(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert [words[0] for words in asked] == ["info", "pull", "rm", "run"]
    run = asked[-1]
    assert run[-1] == IMAGE
    passed = {run[i + 1] for i, word in enumerate(run) if word == "--env"}
    assert {"FTJOB_IMAGE", "FTJOB_RUN_ID", "FTJOB_IMAGE_DIGEST", "AWS_SECRET_ACCESS_KEY"} <= passed
    assert "OTHER" not in passed
    assert secret not in (tmp_path / "asked").read_text()
    assert f"{tmp_path}/home/ftjob-data:/ftjob-data:ro" in run
    assert "no-new-privileges" in run


def test_an_image_that_cannot_be_pulled_fails_and_is_not_tried_for_ever(tmp_path: Path) -> None:
    done = run_script(tmp_path, {"FTJOB_IMAGE": IMAGE}, docker=SAY + '[ "$1" != pull ]')
    assert done.returncode == 1
    assert "cannot be pulled" in done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len([line for line in asked if line.startswith("pull")]) == 3
    assert not [line for line in asked if line.startswith("run")]


def test_docker_is_asked_as_root_where_the_user_may_not(tmp_path: Path) -> None:
    done = run_script(tmp_path, {"FTJOB_IMAGE": IMAGE}, docker=SAY + '[ "$1" != info ]')
    assert done.returncode == 0, done.stderr
    assert "run" in (tmp_path / "asked").read_text()


def test_no_attempt_lives_longer_than_the_budget_pays_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ntrap 'exit 75' TERM\nwhile true; do read -t 0.1 <> <(:); done\n")
    python.chmod(0o755)
    done = run_script(tmp_path, {"FTJOB_PYTHON": str(python), "FTJOB_RUN_ID": "my-run", "FTJOB_MAX_SECONDS": "1"})
    assert done.returncode == 124, "not 75: SkyPilot would begin again"


def uptime() -> int:
    return int(float(Path("/proc/uptime").read_text().split()[0]))


@pytest.mark.parametrize("hangs", ["pull", "run"])
def test_a_machine_is_not_held_longer_than_the_budget_pays_for_all_of_its_life(tmp_path: Path, hangs: str) -> None:
    hang = f'[ "$1" != {hangs} ] || exec /bin/sleep 60'
    variables = {"FTJOB_IMAGE": IMAGE, "FTJOB_MAX_SECONDS": str(uptime() + 2)}
    started = time.monotonic()
    done = run_script(tmp_path, variables, docker=SAY + hang)
    assert time.monotonic() - started < 30
    assert done.returncode in (1, 124), "not 75: SkyPilot would begin again"


def test_a_machine_that_the_budget_no_longer_pays_starts_nothing(tmp_path: Path) -> None:
    """Attempts that never reached the bucket are in no ledger; but the machine has lived for as long."""
    done = run_script(tmp_path, {"FTJOB_IMAGE": IMAGE, "FTJOB_MAX_SECONDS": str(max(uptime() - 5, 1))}, docker=SAY)
    assert done.returncode == 1
    assert "pays for no more" in done.stderr
    assert (tmp_path / "asked").read_text().split() == ["info"]


def test_a_pull_is_given_up_when_it_hangs_also_without_a_budget(tmp_path: Path) -> None:
    pull = """[ "$1" != pull ] || tr '\\0' ' ' <"/proc/$PPID/cmdline" >>"$ASKED" """
    assert run_script(tmp_path, {"FTJOB_IMAGE": IMAGE}, docker=pull).returncode == 0
    assert (tmp_path / "asked").read_text().startswith("timeout --kill-after=60 1200 docker pull")


def test_the_guard_leaves_the_budgets_whole_to_the_cheapest_offer() -> None:
    plan = a_plan(NEBIUS, RUNPOD, budget=Budget(max_usd=10), spent_usd=5.0)
    assert plan.max_seconds == 5 / 1.25 * 3600 + GUARD_SECONDS
    assert task_of(plan, environ(), read_template())["envs"]["FTJOB_MAX_SECONDS"] == str(plan.max_seconds)
    assert a_plan(NEBIUS).max_seconds is None
    assert a_plan(NEBIUS, budget=Budget(max_usd=1.7e308)).max_seconds == 1e9 + GUARD_SECONDS


def test_a_cluster_of_ones_own_runs_the_prepared_python(tmp_path: Path) -> None:
    python = tmp_path / "my python"
    python.write_text('#!/bin/bash\necho "$FTJOB_WORKDIR" "$@"; exit 3\n')
    python.chmod(0o755)
    done = run_script(tmp_path, {"FTJOB_PYTHON": str(python), "FTJOB_RUN_ID": "my-run"})
    assert done.returncode == 3
    assert done.stdout.split() == [f"{tmp_path}/home/.ftjob/my-run", "-P", "-m", "job"]
