"""A stand-in for SkyPilot, behind our own protocol (launch.cloud.Sky). What it was given lies in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.contract.errors import FtjobError
from launch.cloud import CloudBackend
from launch.prices import Listed
from launch.settings import Settings
from launch.skypilot import ManagedJob

H100 = (
    Listed("aws", "us-east-1", "p5.4xlarge", "H100", 1, 6.88, None),
    Listed("aws", "eu-west-2", "p5.4xlarge", "H100", 1, 8.94, 8.94),
    Listed("gcp", "us-central1", "a3-highgpu-1g", "H100", 1, 5.38, 1.54),
    Listed("nebius", "eu-north1", "gpu-h100-sxm", "H100", 1, 2.95, 1.25),
    Listed("lambda", "us-east-1", "gpu_1x_h100", "H100", 1, 2.49, None),
    Listed("runpod", "US", "1x_H100_SECURE", "H100", 1, 2.39, 2.39),
    Listed("aws", "us-east-1", "p4de.24xlarge", "A100-80GB", 8, 27.45, 8.65),
)


class FakeSky:
    """SkyPilot as a folder.

    Args:
        folder: launched.json (tasks), jobs.json (the queue).
        rows: the catalog.
        enabled: the clouds with credentials.
        dearest: the spot price of the dearest zone, by instance type and region.
        broken: raised by every question to the API server.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: Sequence[Listed] = H100,
        enabled: Sequence[str] = ("aws", "gcp", "nebius", "lambda"),
        dearest: Mapping[tuple[str, str], float] | None = None,
        broken: FtjobError | None = None,
        log: Sequence[str] = (),
        machines: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows, self.enabled = folder, tuple(rows), tuple(enabled)
        self.broken, self.log, self.machines = broken, log, machines
        self.dearest = dict(dearest or {})
        self.cancelled: list[int] = []

    def check_installed(self) -> None:
        pass

    def check_clouds(self, names: Sequence[str]) -> None:
        pass

    def catalogs(self) -> tuple[str, ...]:
        return tuple(sorted({row.cloud for row in self.rows}))

    def listed(self, clouds: Sequence[str]) -> tuple[Listed, ...]:
        return tuple(row for row in self.rows if row.cloud in clouds)

    def dearest_spot(self, instance_type: str, region: str) -> float | None:
        return self.dearest.get((instance_type, region))

    def enabled_clouds(self) -> tuple[str, ...]:
        self._answer()
        return self.enabled

    def check_task(self, task: Mapping[str, Any]) -> None:
        json.dumps(dict(task))

    def launch(self, task: Mapping[str, Any], secrets: Mapping[str, str]) -> int:
        self._answer()
        launched = [*self.launched(), {"task": dict(task), "secrets": sorted(secrets)}]
        (self.folder / "launched.json").write_text(json.dumps(launched))
        self.set_jobs(*self.queue(), ManagedJob(len(launched), "PENDING", 0, "", time.time()), name=task["name"])
        return len(launched)

    def jobs(self, name: str) -> tuple[ManagedJob, ...]:
        self._answer()
        return tuple(sorted(self.queue(name), key=lambda job: job.job_id, reverse=True))

    def cancel(self, job_ids: Sequence[int]) -> None:
        self._answer()
        self.cancelled += job_ids
        path = self.folder / "jobs.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        for row in rows:
            row["status"] = "CANCELLED" if row["job_id"] in job_ids else row["status"]
        path.write_text(json.dumps(rows))

    def logs(self, job_id: int, *, follow: bool) -> Iterator[str]:
        yield from self.log

    def machines_of(self, name: str, job_ids: Sequence[int]) -> tuple[str, ...]:
        self._answer()
        return tuple(self.machines)

    # For tests.

    def launched(self) -> list[dict[str, Any]]:
        """Every task that was handed over, and the names of its secrets."""
        path = self.folder / "launched.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def queue(self, name: str | None = None) -> list[ManagedJob]:
        path = self.folder / "jobs.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        found = [row for row in rows if name in (None, row["name"])]
        return [ManagedJob(**{key: value for key, value in row.items() if key != "name"}) for row in found]

    def set_jobs(self, *jobs: ManagedJob, name: str) -> None:
        (self.folder / "jobs.json").write_text(json.dumps([asdict(job) | {"name": name} for job in jobs]))

    def _answer(self) -> None:
        if self.broken is not None:
            raise self.broken


def cloud_maker(sky: FakeSky) -> Callable[[Settings, str], CloudBackend]:
    """Every backend is this one."""
    return lambda settings, _name: CloudBackend(settings, sky)
