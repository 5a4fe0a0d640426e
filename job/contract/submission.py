"""What a launcher handed to a backend: where the job may run, at what price, and in which image."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pydantic import AwareDatetime, Field

from job.contract.budget import Budget
from job.contract.records import Part, Record

OWN: Final = frozenset({"local", "slurm", "kubernetes"})
"""Places that sell nothing: whoever names one has it. What an hour costs there, if anything, is the owner's word."""


class Way(StrEnum):
    """How the job runs on the machine that an offer gives."""

    DOCKER = "docker"
    """`docker run` of the image as it was built: its user, its entrypoint. On machines of one's own (VM clouds)."""
    INSIDE = "inside"
    """SkyPilot moves into the image and starts the job in it, as root. On Kubernetes and RunPod."""
    HOST = "host"
    """In a prepared Python environment, without a container. On Slurm."""


class Offer(Part):
    """A place that sells the GPU, with its price. A cluster of one's own is an offer without one."""

    cloud: str
    """As SkyPilot spells it in lower case: "aws", "gcp", "slurm"."""
    region: str | None = None
    instance_type: str | None = None
    gpu: str
    gpus: int = Field(ge=1)
    spot: bool
    usd_per_hour: float | None = None
    """Of the whole machine; None where nobody asks for money."""
    on_demand_usd_per_hour: float | None = None
    """Of the same machine in the same place, if it were not spot; None when it is not sold so."""
    memory_gib: float | None = None
    """Of the machine, beside its GPUs'; None where nobody says."""

    @property
    def infra(self) -> str:
        """As SkyPilot's `infra` names the place: "aws/us-east-1"."""
        return f"{self.cloud}/{self.region}" if self.region else self.cloud

    @property
    def is_own(self) -> bool:
        """Whether nobody sells it: a machine or cluster that one has."""
        return self.cloud in OWN

    @property
    def kind(self) -> str:
        """spot, on demand, or your own."""
        return "your own" if self.is_own else "spot" if self.spot else "on demand"

    def is_place_of(self, infra: dict[str, str]) -> bool:
        """Whether an attempt that claimed with these words ran here."""
        same_region = self.region is None or self.region == infra.get("region")
        return self.cloud == infra.get("cloud", "").lower() and same_region


class Submission(Record):
    """submissions/0001.json: written before the backend is asked, so that any machine finds who runs the run."""

    submission: int = Field(ge=1)
    nonce: str
    submitted_at: AwareDatetime
    backend: str
    offers: tuple[Offer, ...]
    image: str | None
    last_attempt: int | None
    budget: Budget
