"""What runs jobs. A backend starts them, restarts them, and tells how they are; records in the bucket tell the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from job.contract.environ import JobEnviron
from job.contract.layout import Uri
from job.contract.records import RunRecord
from job.contract.status import BackendState

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

    def submit(self, run: RunRecord, environ: JobEnviron, *, max_restarts: int = DEFAULT_MAX_RESTARTS) -> None:
        """Start the job of a run whose record is in the bucket; returns once the backend has it for good.

        The backend restarts the job after exit 75 and after a death without an exit code, at most `max_restarts`
        times, and never after another exit code.

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
