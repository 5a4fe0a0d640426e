"""AWS itself, asked for the machines of a run. SkyPilot's word is not enough: it can lose sight of an instance."""

from __future__ import annotations

from typing import Final

from job.contract.errors import FtjobError
from launch.task import RUN_LABEL

_LIVING: Final = ("pending", "running", "shutting-down", "stopping", "stopped")
"""States of an EC2 instance in which something of it is paid for (EC2's documentation, "Instance lifecycle")."""


def instances_labelled(run_id: str, region: str) -> list[str]:
    """The EC2 instances of a region that carry the run's label and are not gone.

    Raises:
        FtjobError: AWS could not be asked.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=5, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 2})
    filters = [{"Name": f"tag:{RUN_LABEL}", "Values": [run_id]}, {"Name": "instance-state-name", "Values": [*_LIVING]}]
    try:
        ec2 = boto3.session.Session().client("ec2", region_name=region, config=config)
        pages = list(ec2.get_paginator("describe_instances").paginate(Filters=filters))
    except (BotoCoreError, ClientError) as error:
        raise FtjobError(str(error)) from error
    return [
        f"{instance['InstanceId']} ({instance['State']['Name']}, aws {region})"
        for page in pages
        for reservation in page["Reservations"]
        for instance in reservation["Instances"]
    ]
