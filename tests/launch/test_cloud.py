"""Promise: what SkyPilot says of a run becomes what a person is told of it; what it cannot say is never made up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job.contract.errors import BadInput, FtjobError, RunUnknown, Unreachable
from job.contract.layout import Uri
from job.contract.records import RunRecord
from job.contract.status import BackendState
from launch.backend import Shopping
from launch.cloud import ASK_SECONDS, FRESH_SECONDS, CloudBackend
from launch.home import Remembered, note_submission
from launch.plan import Plan
from launch.settings import Settings
from launch.skypilot import ManagedJob
from launch.task import job_name
from tests.contract.examples import SHA, run_record
from tests.launch.fake_sky import FakeSky

IMAGE = f"registry.example/ftjob@sha256:{SHA}"
BUCKET = Uri("s3://mine/ftjob")
NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture
def sky(tmp_path: Path) -> FakeSky:
    return FakeSky(tmp_path / "sky")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", bucket=BUCKET, image=IMAGE)


@pytest.fixture
def backend(sky: FakeSky, settings: Settings) -> CloudBackend:
    return CloudBackend(settings, sky, clock=NOW.timestamp)


def record() -> RunRecord:
    run = run_record()
    train = run.train.model_copy(update={"uri": "s3://mine/rows.jsonl"})
    return run.model_copy(update={"run_id": "my-run", "train": train, "held_out": None})


def plan(backend: CloudBackend, shopping: Shopping, run: RunRecord | None = None, bucket: Uri = BUCKET) -> Plan:
    return backend.plan(run or record(), bucket=bucket, shopping=shopping, max_restarts=20)


def submitted(settings: Settings, *, seconds_ago: float | None, backend: str = "skypilot") -> None:
    at = None if seconds_ago is None else NOW - timedelta(seconds=seconds_ago)
    note_submission(settings.home, Remembered(run_id="my-run", bucket=BUCKET, backend=backend, submitted_at=at))


# ------------------------------------------------------------------------------------------------------------ the plan


def test_the_plan_buys_the_cheapest_that_can_be_used(backend: CloudBackend) -> None:
    made = plan(backend, Shopping(gpu="H100"))
    assert [(p.offer.cloud, p.offer.spot) for p in made.places] == [("nebius", True), ("gcp", True)]
    # RunPod would be the cheapest on demand, and there is no image for it: it must not push spot offers out.
    assert "$2.49/h on demand (lambda/us-east-1)" in made.why
    assert "runpod is left out: it needs an image of the target `inside`: `inside_image` in settings.toml" in made.notes
    assert made.image == IMAGE
    assert [mount.how for mount in made.mounts] == ["copy"]


def test_a_spot_offer_costs_what_the_dearest_zone_of_its_region_does(backend: CloudBackend, sky: FakeSky) -> None:
    """SkyPilot goes from zone to zone, and a ledger that counts the cheapest would let the budget be overspent."""
    [place] = plan(backend, Shopping(gpu="A100-80GB:8")).places
    assert (place.offer.spot, place.offer.usd_per_hour) == (True, 8.65)
    sky.dearest = {("p4de.24xlarge", "us-east-1"): 9.97}
    [place] = plan(backend, Shopping(gpu="A100-80GB:8")).places
    assert (place.offer.spot, place.offer.usd_per_hour) == (True, 9.97)
    sky.dearest = {("p4de.24xlarge", "us-east-1"): 27.45}
    [place] = plan(backend, Shopping(gpu="A100-80GB:8")).places
    assert (place.offer.spot, place.offer.usd_per_hour) == (False, 27.45)


def test_only_enabled_clouds_are_bought_from(backend: CloudBackend, sky: FakeSky) -> None:
    sky.enabled = ("gcp",)
    made = plan(backend, Shopping(gpu="H100", enabled_only=True))
    assert {place.offer.cloud for place in made.places} == {"gcp"}


@pytest.mark.parametrize(("enabled", "says"), [((), "no cloud enabled here"), (("oci",), "credentials for: oci")])
def test_without_a_usable_cloud_it_says_which_are_enabled_and_how_to_enable_one(
    backend: CloudBackend, sky: FakeSky, enabled: tuple[str, ...], says: str
) -> None:
    sky.enabled = enabled
    with pytest.raises(BadInput, match=says) as caught:
        plan(backend, Shopping(gpu="H100", enabled_only=True))
    assert "sky check" in caught.value.hint
    assert "--infra local" in caught.value.hint


@pytest.mark.parametrize(
    ("shopping", "says"),
    [
        (Shopping(), "which GPU"),
        (Shopping(gpu="H1000"), "nobody sells H1000"),
        (Shopping(gpu="H100", region="mars-1"), "mars-1"),
        (Shopping(gpu="H100", image="registry.example/ftjob:latest"), "not named by its digest"),
        (Shopping(gpu="H100", clouds=("runpod",)), "inside_image"),
        (Shopping(gpu="H100", clouds=("slurm",)), "slurm_python"),
    ],
)
def test_what_cannot_be_bought_is_refused(backend: CloudBackend, shopping: Shopping, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan(backend, shopping)


@pytest.mark.parametrize("what", ["dataset", "bucket", "model"])
def test_what_is_only_on_this_machine_is_refused(backend: CloudBackend, what: str) -> None:
    run, bucket = record(), BUCKET
    if what == "dataset":
        run = run.model_copy(update={"train": run.train.model_copy(update={"uri": "file:///rows.jsonl"})})
    elif what == "bucket":
        bucket = Uri("file:///bucket")
    else:
        model = run.recipe.base_model.model_copy(update={"id": "/models/mine", "revision": None})
        run = run.model_copy(update={"recipe": run.recipe.model_copy(update={"base_model": model})})
    with pytest.raises(BadInput, match="on this machine, and a rented one cannot read it"):
        plan(backend, Shopping(gpu="H100"), run, bucket)


def test_a_slurm_cluster_needs_neither_price_nor_image_and_may_share_files(sky: FakeSky, settings: Settings) -> None:
    backend = CloudBackend(settings.model_copy(update={"image": None, "slurm_python": "/v/bin/python"}), sky)
    made = plan(backend, Shopping(gpu="H100", clouds=("slurm",)), bucket=Uri("file:///shared"))
    assert [(p.offer.infra, p.offer.kind, p.way.value) for p in made.places] == [("slurm", "your own", "host")]
    assert made.mounts == ()


def test_gpus_that_would_idle_are_named(backend: CloudBackend) -> None:
    made = plan(backend, Shopping(gpu="A100-80GB:8"))
    assert any("7 of A100-80GB:8 would be paid for and idle" in note for note in made.notes)


def test_a_custom_endpoint_is_mounted_by_nobody_and_fetched_by_the_job(backend: CloudBackend) -> None:
    made = plan(backend, Shopping(gpu="H100", variables={"FTJOB_S3_ENDPOINT": "https://s3.example"}))
    assert made.mounts == ()
    assert made.variables == {"FTJOB_S3_ENDPOINT": "https://s3.example"}


# ---------------------------------------------------------------------------------------------------------- the status


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("PENDING", BackendState.QUEUED),
        ("RUNNING", BackendState.ALIVE),
        ("RECOVERING", BackendState.RECOVERING),
        ("CANCELLING", BackendState.ALIVE),
        ("CANCELLED", BackendState.CANCELLED),
        ("SUCCEEDED", BackendState.GONE),
        ("FAILED", BackendState.FAILED),
        ("FAILED_NO_RESOURCE", BackendState.GONE),
        ("SOMETHING_NEW", BackendState.UNREACHABLE),
    ],
)
def test_skypilots_word_becomes_ours(backend: CloudBackend, sky: FakeSky, status: str, state: BackendState) -> None:
    sky.set_jobs(ManagedJob(1, "FAILED", 0, "", 0), ManagedJob(2, status, 3, "why", 0), name=job_name("my-run"))
    described = backend.describe("my-run")
    assert described.state is state
    if state is not BackendState.UNREACHABLE:
        assert "why" in described.detail
        assert "recovered 3 times" in described.detail


def test_a_server_that_does_not_answer_is_not_an_end(backend: CloudBackend, sky: FakeSky) -> None:
    sky.broken = Unreachable("SkyPilot could not be asked")
    assert backend.describe("my-run").state is BackendState.UNREACHABLE


@pytest.mark.parametrize(
    ("seconds_ago", "state"),
    [(None, BackendState.GONE), (FRESH_SECONDS - 1, BackendState.QUEUED), (FRESH_SECONDS + 1, BackendState.GONE)],
)
def test_a_run_that_was_submitted_here_and_is_in_no_queue(
    backend: CloudBackend, settings: Settings, seconds_ago: float | None, state: BackendState
) -> None:
    submitted(settings, seconds_ago=seconds_ago)
    assert backend.describe("my-run").state is state


@pytest.mark.parametrize(
    ("seconds_ago", "state"), [(FRESH_SECONDS - 1, BackendState.QUEUED), (FRESH_SECONDS + 1, BackendState.CANCELLED)]
)
def test_the_end_of_the_job_before_is_not_the_end_of_the_one_just_handed_over(
    backend: CloudBackend, sky: FakeSky, settings: Settings, seconds_ago: float, state: BackendState
) -> None:
    submitted(settings, seconds_ago=seconds_ago)
    before = NOW.timestamp() - 1000
    sky.set_jobs(ManagedJob(1, "CANCELLED", 0, "", before), name=job_name("my-run"))
    assert backend.describe("my-run").state is state


def test_a_job_that_ends_at_once_is_told_at_once(backend: CloudBackend, sky: FakeSky, settings: Settings) -> None:
    submitted(settings, seconds_ago=10)
    sky.set_jobs(ManagedJob(1, "FAILED", 0, "", NOW.timestamp() - 9), name=job_name("my-run"))
    assert backend.describe("my-run").state is BackendState.FAILED


def test_a_run_of_another_machine_that_this_skypilot_does_not_know_is_not_taken_for_gone(
    backend: CloudBackend, settings: Settings
) -> None:
    assert backend.describe("my-run").state is BackendState.UNREACHABLE
    submitted(settings, seconds_ago=1000, backend="local")
    assert CloudBackend(settings, FakeSky(settings.home / "s")).describe("my-run").state is BackendState.UNREACHABLE


def test_skypilot_is_not_asked_at_every_look(sky: FakeSky, settings: Settings) -> None:
    now = [0.0]
    backend = CloudBackend(settings, sky, clock=lambda: now[0])
    sky.set_jobs(ManagedJob(1, "RUNNING", 0, "", 0), name=job_name("my-run"))
    assert backend.describe("my-run").state is BackendState.ALIVE
    sky.set_jobs(ManagedJob(1, "RECOVERING", 0, "", 0), name=job_name("my-run"))
    assert backend.describe("my-run").state is BackendState.ALIVE
    now[0] += ASK_SECONDS
    assert backend.describe("my-run").state is BackendState.RECOVERING


# ------------------------------------------------------------------------------------------ cancel, logs, what is left


def test_cancel_stops_every_job_of_the_run_that_lives(backend: CloudBackend, sky: FakeSky) -> None:
    assert backend.cancel("my-run") is False
    states = ["FAILED", "RUNNING", "RECOVERING", "SUCCEEDED", "PENDING"]
    sky.set_jobs(*(ManagedJob(n, s, 0, "", 0) for n, s in enumerate(states)), name=job_name("my-run"))
    assert backend.cancel("my-run") is True
    assert sorted(sky.cancelled) == [1, 2, 4]


def test_logs_are_whole_lines_without_skypilots_prefix(sky: FakeSky, backend: CloudBackend) -> None:
    sky.log = ['(ftjob-my-run, pid=7) {"ev', 'ent": "a"}\nplain (x) {y}\r\n', "last"]
    sky.set_jobs(ManagedJob(1, "RUNNING", 0, "", 0), name=job_name("my-run"))
    assert list(backend.logs("my-run", follow=False)) == ['{"event": "a"}', "plain (x) {y}", "last"]


def test_logs_of_a_run_that_skypilot_does_not_know_are_not_an_empty_answer(backend: CloudBackend) -> None:
    with pytest.raises(RunUnknown):
        backend.logs("my-run", follow=False)


def test_what_is_left_is_what_skypilot_knows_to_live(backend: CloudBackend, sky: FakeSky) -> None:
    assert backend.left("my-run") == ()
    sky.machines = ("ftjob-my-run-1",)
    assert backend.left("my-run") == ("ftjob-my-run-1",)
    sky.broken = Unreachable("no answer")
    with pytest.raises(FtjobError):
        backend.left("my-run")
