"""What is left of a run that is over: machines that still cost money. Asked, never assumed."""

from __future__ import annotations

from job.contract.errors import FtjobError
from job.contract.submission import OWN
from job.storage import Store
from launch.backend import Backend
from launch.ec2 import instances_labelled
from launch.runs import submissions_of
from launch.task import RUN_LABEL
from launch.view import Left


def left_of(backend: Backend, store: Store, run_id: str) -> Left:
    """Ask the backend, and AWS itself by the run's label: instances that SkyPilot has lost sight of keep billing
    (skypilot issues 4410, 10456)."""
    names: list[str] = []
    asked: list[str] = []
    not_asked: list[str] = []
    try:
        names += backend.left(run_id)
        asked.append(backend.name)
    except FtjobError as error:
        not_asked.append(f"{backend.name}: {error.message}")
    # Of every submission: what was lost sight of may be where an earlier one bought.
    offers = [offer for submission in submissions_of(store, run_id) for offer in submission.offers]
    for region in sorted({offer.region for offer in offers if offer.cloud == "aws" and offer.region}):
        try:
            names += instances_labelled(run_id, region)
            asked.append(f"aws {region}")
        except FtjobError as error:
            not_asked.append(f"aws {region}: {error.message}")
    others = {offer.cloud for offer in offers} - {"aws", *OWN}
    not_asked += [f"{cloud}: ftjob cannot ask it; look for the label {RUN_LABEL}={run_id}" for cloud in sorted(others)]
    return Left(names=tuple(names), asked=tuple(asked), not_asked=tuple(not_asked))
