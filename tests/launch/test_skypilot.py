"""Promise: real SkyPilot, with its real catalog and no network, answers as the rest of ftjob expects.

Each test is a process of its own: SkyPilot decides at import where its files are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.examples import SHA
from tests.launch.kit import make_recipe

CATALOG = Path(__file__).parent / "catalog"
NOWHERE = "http://127.0.0.1:9"
"""The discard port: nothing answers."""

pytestmark = pytest.mark.slow


class Desk:
    """A person with SkyPilot's catalog on the disk, and nothing else."""

    def __init__(self, root: Path, *, catalog: bool = True) -> None:
        self.home = root / "home"
        (self.home / "ftjob").mkdir(parents=True)
        settings = f'bucket = "s3://mine/ftjob"\nimage = "registry.example/ftjob@sha256:{SHA}"\n'
        (self.home / "ftjob" / "settings.toml").write_text(settings)
        if catalog:
            (self.home / ".sky").mkdir()
            shutil.copytree(CATALOG, self.home / ".sky" / "catalogs")
        self.recipe = make_recipe(root / "recipes")

    def ftjob(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SKYPILOT_")}
        # Without bytecode every import of SkyPilot costs 12 s; and no test talks to anybody.
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        variables |= {"HOME": str(self.home), "FTJOB_HOME": str(self.home / "ftjob")}
        variables |= {"SKYPILOT_API_SERVER_ENDPOINT": NOWHERE, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        variables |= {"https_proxy": NOWHERE, "http_proxy": NOWHERE}
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            env=variables,
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def plan(self, *arguments: str) -> dict[str, Any]:
        done = self.ftjob("plan", str(self.recipe), "--json", *arguments)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1, "stdout is for the answer alone"
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def first(plan: dict[str, Any]) -> tuple[Any, ...]:
    offer = plan["places"][0]["offer"]
    return offer["cloud"], offer["region"], offer["instance_type"], offer["spot"], offer["usd_per_hour"]


def test_the_real_catalog_gives_the_cheapest_h100(tmp_path: Path) -> None:
    plan = Desk(tmp_path).plan("--gpu", "H100")
    assert first(plan) == ("nebius", "eu-north1", "gpu-h100-sxm_1gpu-16vcpu-200gb", True, 1.25)
    assert plan["places"][0]["offer"]["memory_gib"] == 200
    prices = [place["offer"]["usd_per_hour"] for place in plan["places"]]
    assert prices == sorted(prices)
    assert max(prices) < 2.49, "spot that costs as much as the cheapest on-demand offer is no bargain"


def test_the_real_catalog_gives_the_cheapest_machine_of_eight_a100(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert first(desk.plan("--gpu", "A100-80GB:8")) == ("azure", "eastus", "Standard_ND96amsr_A100_v4", True, 3.6047)
    # GCP lists the machine and its GPUs apart; SkyPilot's own functions add them.
    gcp = first(desk.plan("--gpu", "A100-80GB:8", "--infra", "gcp", "--no-spot"))
    assert gcp[3:] == (False, pytest.approx(23.57, abs=0.01))


def test_spot_on_aws_is_priced_by_the_dearest_zone_and_only_the_machine_shown_is_bought(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    plan = desk.plan("--gpu", "H100:8", "--infra", "aws", "--region", "us-west-2")
    assert first(plan)[2:] == ("p5.48xlarge", True, 16.1301)  # 12.6935 in the cheapest zone
    # In us-east-1 one zone asks for 10.24 and another for as much as on demand: no bargain that can be promised.
    assert first(desk.plan("--gpu", "H100:8", "--infra", "aws", "--region", "us-east-1"))[3:] == (False, 55.04)
    for infra in ("gcp", "lambda", "nebius", "azure"):
        shown = desk.ftjob("plan", "--gpu", "H100", "--infra", infra, "--show-task", str(desk.recipe))
        assert shown.returncode == 0, shown.stderr
        assert "instance_type: " in shown.stdout, infra


def test_a_gpu_that_nobody_sells_is_exit_2_with_the_nearest_names(tmp_path: Path) -> None:
    done = Desk(tmp_path).ftjob("plan", "--gpu", "H1000", str(make_recipe(tmp_path / "r")))
    assert done.returncode == 2
    assert "nobody sells H1000" in done.stderr
    assert "did you mean H100" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_catalog_it_says_how_to_get_one(tmp_path: Path) -> None:
    desk = Desk(tmp_path, catalog=False)
    done = desk.ftjob("plan", "--gpu", "H100", "--infra", "aws", str(desk.recipe))
    assert done.returncode == 1
    assert "the prices of aws are not on this machine" in done.stderr
    assert "~/.sky/catalogs" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_api_server_that_does_not_answer_is_told_as_that(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    recipe = json.loads(desk.recipe.read_text()) | {"output": {"bucket": (tmp_path / "bucket").as_uri()}}
    desk.recipe.write_text(json.dumps(recipe))
    (desk.home / "ftjob" / "settings.toml").write_text('slurm_python = "/v/bin/python"\n')
    done = desk.ftjob("launch", "--infra", "slurm", "--gpu", "H100", "--yes", "--name", "my-run", str(desk.recipe))
    assert done.returncode == 1
    assert "SkyPilot could not be asked" in done.stderr
    assert "Traceback" not in done.stderr
    status = desk.ftjob("status", "my-run", "--bucket", (tmp_path / "bucket").as_uri(), "--json")
    assert json.loads(status.stdout)["status"] == "unknown", "nobody could be asked, so nothing is known"


def test_every_status_of_skypilot_has_one_of_ours(tmp_path: Path) -> None:
    script = (
        "from sky.jobs.state import ManagedJobStatus as S\n"
        "from launch.cloud import _STATES\n"
        "assert {s.value for s in S} == set(_STATES), {s.value for s in S} ^ set(_STATES)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
