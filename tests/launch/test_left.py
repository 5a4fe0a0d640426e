"""Promise: a machine that carries a run's label and still costs money is named; who could not be asked is named too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest

from job.contract.errors import FtjobError, Unreachable
from job.contract.layout import RunLayout
from job.contract.submission import Offer
from job.storage import FileStore
from launch.cloud import CloudBackend
from launch.ec2 import instances_labelled
from launch.left import left_of
from launch.settings import Settings
from launch.task import RUN_LABEL
from tests.contract.examples import submission
from tests.launch.fake_sky import FakeSky
from tests.s3server import S3Server

REGION = "us-east-1"
RUNNING = {"Name": "instance-state-name", "Values": ["running"]}


@pytest.fixture
def ec2(s3_server: S3Server) -> Any:
    """moto's EC2, with the instances of two runs in it; one of ours is gone."""
    client: Any = boto3.client("ec2", region_name=REGION)
    for run_id, count in (("my-run", 2), ("other-run", 1)):
        tags = [{"ResourceType": "instance", "Tags": [{"Key": RUN_LABEL, "Value": run_id}]}]
        client.run_instances(ImageId="ami-12345678", MinCount=count, MaxCount=count, TagSpecifications=tags)
    mine = [{"Name": f"tag:{RUN_LABEL}", "Values": ["my-run"]}]
    # moto remembers the terminated ones of other tests.
    found = client.describe_instances(Filters=[*mine, RUNNING])["Reservations"][0]["Instances"]
    client.terminate_instances(InstanceIds=[found[0]["InstanceId"]])
    yield found[1]["InstanceId"]
    client.terminate_instances(
        InstanceIds=[i["InstanceId"] for r in client.describe_instances()["Reservations"] for i in r["Instances"]]
    )
    client.close()


def test_instances_that_live_are_named_by_the_runs_label(ec2: str) -> None:
    (found,) = instances_labelled("my-run", REGION)
    assert found.startswith(ec2)
    assert instances_labelled("nobodys-run", REGION) == []


def test_a_cloud_that_cannot_be_asked_is_an_error_and_not_nothing(s3_server: S3Server) -> None:
    s3_server.cut()
    with pytest.raises(FtjobError):
        instances_labelled("my-run", REGION)


def test_everybody_is_asked_and_whoever_could_not_be_is_named(ec2: str, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "bucket")
    store.put_new(RunLayout("my-run").submission(1), submission().to_bytes())
    sky = FakeSky(tmp_path / "sky", machines=["ftjob-my-run-1"])
    backend = CloudBackend(Settings(home=tmp_path / "home", bucket=store.uri), sky)
    left = left_of(backend, store, "my-run")
    assert left.names[0] == "ftjob-my-run-1"
    assert left.names[1].startswith(ec2)
    assert left.asked == ("skypilot", "aws us-east-1")
    sky.broken = Unreachable("nobody answers")
    left = left_of(backend, store, "my-run")
    assert left.not_asked == ("skypilot: nobody answers",)


def test_what_an_earlier_launch_bought_elsewhere_is_asked_for_too(ec2: str, tmp_path: Path) -> None:
    store, layout = FileStore(tmp_path / "bucket"), RunLayout("my-run")
    store.put_new(layout.submission(1), submission().to_bytes())
    later = Offer(cloud="gcp", region="us-central1", gpu="H100", gpus=1, spot=False, usd_per_hour=5.38)
    store.put_new(
        layout.submission(2), submission().model_copy(update={"submission": 2, "offers": (later,)}).to_bytes()
    )
    left = left_of(CloudBackend(Settings(home=tmp_path, bucket=store.uri), FakeSky(tmp_path / "sky")), store, "my-run")
    assert left.names[0].startswith(ec2)
    assert left.asked == ("skypilot", "aws us-east-1")
    assert "gcp" in left.not_asked[0]
