"""This person on this machine: whose settings, which buckets, and who runs which run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from job.contract.errors import BadInput, StorageError
from job.contract.status import BackendState
from job.storage import Store, open_store
from launch.backend import Backend, Described
from launch.begin import check_same_bucket
from launch.cloud import CloudBackend
from launch.home import recall, remembered_runs
from launch.local import LocalBackend
from launch.runs import Describes, newest_submission
from launch.settings import Settings


def open_backend(settings: Settings, name: str) -> Backend:
    """The backend of that name: "local", or SkyPilot's, which runs on everything else."""
    if name == LocalBackend.name:
        return LocalBackend(
            settings.home, threads=settings.threads, usd_per_hour=settings.usd_per_hour.get(LocalBackend.name)
        )
    return CloudBackend(settings)


@dataclass(frozen=True)
class Here:
    """Settings, and how backends are made."""

    settings: Settings
    backend: Callable[[Settings, str], Backend] = open_backend

    def store(self, run_id: str, bucket: str | None) -> Store:
        """The bucket named, else the one that this machine launched the run into, else the person's own."""
        remembered = recall(self.settings.home, run_id)
        return open_store(bucket or (remembered.bucket if remembered else self.settings.bucket))

    def stores(self, bucket: str | None) -> list[Store]:
        """The bucket named, else every one that this person's runs land in."""
        if bucket:
            return [open_store(bucket)]
        used = {remembered.bucket for remembered in remembered_runs(self.settings.home)}
        return [open_store(uri) for uri in sorted({self.settings.bucket, *used})]

    def backend_of(self, run_id: str, store: Store | None = None) -> Backend:
        """Who runs the run: by this machine's memory, else by the run's last submission, else the local backend.

        Raises:
            BadInput: this machine launched another run of that id, into another bucket than `store`.
        """
        remembered = recall(self.settings.home, run_id)
        if remembered is not None:
            if store is not None:
                check_same_bucket(remembered, store)
            return self.backend(self.settings, remembered.backend)
        name = LocalBackend.name
        if store is not None:
            try:
                submission = newest_submission(store, run_id)
            except StorageError:  # whoever reads the run next says so, and better
                submission = None
            name = submission.backend if submission else name
        return self.backend(self.settings, name)

    def who_describes(self, run_id: str, store: Store) -> Describes:
        """Who can say how a run is; for another machine's run of an id that is used here too, nobody."""
        try:
            return self.backend_of(run_id, store)
        except BadInput as error:
            return Elsewhere(error.message)


@dataclass(frozen=True)
class Elsewhere:
    """Says of a run that it cannot be asked, and why."""

    why: str

    def describe(self, run_id: str) -> Described:
        return Described(BackendState.UNREACHABLE, self.why)
