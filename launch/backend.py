"""What runs jobs. A backend starts them, restarts them, and tells how they are; records in the bucket tell the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from job.contract.budget import Budget
from job.contract.environ import JobEnviron
from job.contract.layout import Uri
from job.contract.records import RunRecord
from job.contract.status import BackendState
from launch.plan import Plan
from launch.prices import Policy

DEFAULT_MAX_RESTARTS: Final = 20
"""Far more than a healthy run meets, and an end to a machine that kills every attempt."""


@dataclass(frozen=True)
class Described:
    """What a backend says of a run."""

    state: BackendState
    detail: str = ""
    """For people: why it is in that state, where the backend knows. May be empty."""
    exit_code: int | None = None
    """Of the newest attempt that ended, where the backend knows; negative for a signal."""


@dataclass(frozen=True)
class Shopping:
    """What a person asked to buy, and what the job will be given there."""

    gpu: str | None = None
    """As written: "H100:1,A100-80GB:8"."""
    clouds: tuple[str, ...] = ()
    """None named: every one that sells."""
    region: str | None = None
    policy: Policy = Policy.SPOT
    image: str | None = None
    budget: Budget = field(default_factory=Budget)
    """Of the run, over all its attempts."""
    enabled_only: bool = False
    """Only clouds that there are credentials for; to find out takes SkyPilot some seconds."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For the job; nothing secret."""
    secrets: tuple[str, ...] = ()
    """Names of variables for the job whose values no plan holds."""


class Backend(Protocol):
    """Runs jobs as processes or clusters. Methods may be called from any launcher, not only the one that submitted."""

    @property
    def name(self) -> str:
        """How people choose it: `--infra NAME`."""
        ...

    def check_ready(self) -> None:
        """Refuse now what would fail after something was created.

        Raises:
            BadInput: what is missing here, and how to get it.
        """
        ...

    def environ(self, run: RunRecord, *, bucket: Uri, git_commit: str | None) -> JobEnviron:
        """What the job is to be told where this backend runs it."""
        ...

    def plan(
        self, run: RunRecord, *, bucket: Uri, shopping: Shopping, max_restarts: int, base_bytes: int | None = None
    ) -> Plan:
        """What a launch of this run would do. Creates nothing.

        Args:
            base_bytes: size of the base model; None when nobody knows.

        Raises:
            BadInput: it cannot be done, and why.
            Unreachable: what it takes to say so cannot be asked.
        """
        ...

    def submit(self, plan: Plan, environ: JobEnviron, secrets: Mapping[str, str]) -> None:
        """Start the job of a run whose record is in the bucket; returns once the backend has it for good.

        The backend restarts the job after exit 75 and after a death without an exit code, at most
        `plan.max_restarts` times, and never after another exit code.

        Args:
            secrets: the values of `plan.secrets`.

        Raises:
            BadInput: the run is still running.
            FtjobError: the backend could not start it.
        """
        ...

    def describe(self, run_id: str) -> Described:
        """How the run is. Never raises because a backend is out of reach: that is BackendState.UNREACHABLE."""
        ...

    def cancel(self, run_id: str) -> bool:
        """Ask the run to stop: the job saves and ends, and is not restarted. Returns at once; `describe` tells when.

        False when nothing was running. Idempotent.
        """
        ...

    def logs(self, run_id: str, *, follow: bool) -> Iterator[str]:
        """The lines that the job and its keeper wrote, without line ends; with `follow` until the run stops.

        Raises:
            RunUnknown: this backend has none.
        """
        ...

    def left(self, run_id: str) -> tuple[str, ...]:
        """Names of what still lives, or costs money, of a run that is over.

        Raises:
            FtjobError: the backend could not be asked: nobody knows.
        """
        ...
