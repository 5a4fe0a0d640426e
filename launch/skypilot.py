"""SkyPilot, as plain data. The only importer of it, and only inside functions: it takes seconds to load.

Written against 0.14.1. What SkyPilot raises becomes Unreachable (nobody answered) or FtjobError (it answered no). What
it prints goes to stderr, since stdout is for answers.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from job.contract.errors import BadInput, FtjobError, Unreachable
from launch.prices import Listed

SELLERS: Final = ("aws", "azure", "gcp", "lambda", "nebius", "runpod")
"""Clouds that sell A100 or H100 and are asked when nobody names one; `--infra` names any other that SkyPilot knows."""
_HISTORY_DAYS: Final = 30


@dataclass(frozen=True)
class ManagedJob:
    """A managed job, as SkyPilot's queue has it."""

    job_id: int
    status: str
    """One of SkyPilot's ManagedJobStatus."""
    recoveries: int
    detail: str
    submitted_at: float
    """Seconds since 1970; 0 for one that never got as far as looking for a machine."""


class SkyPilot:
    """What ftjob asks of SkyPilot."""

    def check_installed(self) -> None:
        """Raises BadInput when it is not: `import sky` would find this project's own folder of that name."""
        try:
            version("skypilot")
        except PackageNotFoundError:
            raise BadInput(
                "launching on a cloud needs SkyPilot, which is not installed",
                hint="pip install 'ftjob[launch]', or train on this machine: --infra local",
            ) from None

    def check_clouds(self, names: Sequence[str]) -> None:
        """Raises BadInput for a name that is no cloud of SkyPilot's."""
        if not names:
            return
        with _quietly():
            from sky.utils.registry import CLOUD_REGISTRY

            for name in names:
                if name not in CLOUD_REGISTRY:
                    known = ", ".join(sorted(str(cloud) for cloud in CLOUD_REGISTRY))
                    raise BadInput(f"--infra: SkyPilot knows no cloud {name!r}", hint=f"local, or of: {known}")

    def catalogs(self) -> tuple[str, ...]:
        """The sellers whose prices are on this machine."""
        with _quietly():
            from sky.catalog import common

            return tuple(name for name in SELLERS if Path(common.get_catalog_path(f"{name}/vms.csv")).is_file())

    def listed(self, clouds: Sequence[str]) -> tuple[Listed, ...]:
        """Every GPU machine in the catalogs of these clouds, in every region.

        Raises:
            Unreachable: a catalog is not here and cannot be fetched.
        """
        found: list[Listed] = []
        for cloud in clouds:  # one by one, since SkyPilot does not say which of several failed
            with _quietly(), _errors(f"the prices of {cloud}"):
                from sky import catalog

                try:
                    rows = catalog.list_accelerators(gpus_only=True, clouds=[cloud], all_regions=True)
                except (OSError, ConnectionError) as error:
                    raise Unreachable(
                        f"the prices of {cloud} are not on this machine and cannot be fetched: {error}",
                        hint=f"with a network, `sky gpus list --infra {cloud}` fetches them to ~/.sky/catalogs; "
                        "--infra names other clouds",
                    ) from error
                found += [_listed(row) for infos in rows.values() for row in infos]
        return tuple(found)

    def dearest_spot(self, instance_type: str, region: str) -> float | None:
        """Dollars an hour of spot in the dearest zone of an AWS region, where the catalog tells. On AWS each zone has a
        price of its own, up to five times another's (H100:8 in us-east-1, 2026-11), and SkyPilot goes from one to the
        next until one has a machine. `listed` has the cheapest.
        """
        with _quietly(), _errors("the prices of aws"):
            from sky import catalog

            regions = catalog.get_region_zones_for_instance_type(instance_type, use_spot=True, clouds="aws")
            zones = [zone.name for each in regions if each.name == region for zone in each.zones or ()]
            prices = [catalog.get_hourly_cost(instance_type, True, region, zone, clouds="aws") for zone in zones]
            return max(prices, default=None)

    def enabled_clouds(self) -> tuple[str, ...]:
        """The clouds that SkyPilot has working credentials for. Starts the API server if it is not running."""
        with _quietly(), _errors("which clouds are enabled"):
            from sky.client import sdk

            return tuple(sorted(str(name).lower() for name in sdk.get(sdk.enabled_clouds())))

    def check_task(self, task: Mapping[str, Any]) -> None:
        """Have SkyPilot read a task. Raises FtjobError when it cannot."""
        with _quietly(), _errors("the task"):
            self._task(task, {})

    def launch(self, task: Mapping[str, Any], secrets: Mapping[str, str]) -> int:
        """Hand over a managed job; its id. Returns once SkyPilot has it for good."""
        with _quietly(), _errors("the launch"):
            import sky
            from sky import jobs

            ids, _ = sky.get(jobs.launch(self._task(task, secrets), name=task["name"]))
            if not ids:
                raise FtjobError("SkyPilot took the job and gave it no id", hint="look with `sky jobs queue`")
            return int(ids[0])

    def jobs(self, name: str) -> tuple[ManagedJob, ...]:
        """The managed jobs of exactly this name, newest first."""
        with _quietly(), _errors("the queue of jobs"):
            import sky
            from sky import jobs

            fields = ["job_id", "job_name", "status", "recovery_count", "failure_reason", "details", "submitted_at"]
            records, *_ = sky.get(jobs.queue_v2(refresh=True, all_users=True, name_match=name, fields=fields))
            found = [
                ManagedJob(
                    job_id=record.job_id,
                    status=record.status.value if record.status else "PENDING",
                    recoveries=record.recovery_count or 0,
                    detail=record.failure_reason or record.details or "",
                    submitted_at=record.submitted_at or 0.0,
                )
                for record in records
                if record.job_name == name and record.job_id is not None
            ]
            return tuple(sorted(found, key=lambda job: job.job_id, reverse=True))

    def cancel(self, job_ids: Sequence[int]) -> None:
        """End jobs. Each gets SIGTERM as its machine is taken away.

        Not with SkyPilot's `graceful`: that ends the job's driver first, and the job with SIGKILL (seen on Slurm); its
        timeout is for mounts that are written through a cache.
        """
        with _quietly(), _errors("the cancellation"):
            import sky
            from sky import jobs

            sky.get(jobs.cancel(job_ids=list(job_ids)))

    def logs(self, job_id: int, *, follow: bool) -> Iterator[str]:
        """What a job wrote, in pieces of any length."""
        with _quietly(), _errors("the logs"):
            from sky import jobs

            pieces = iter(jobs.tail_logs(job_id=job_id, follow=follow, preload_content=False))
        while True:
            # Not around the yield: whoever prints the piece would print it to stderr.
            with _quietly(), _errors("the logs"):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def machines_of(self, name: str, job_ids: Sequence[int]) -> tuple[str, ...]:
        """The clusters of these jobs that SkyPilot does not know to be gone."""
        with _quietly(), _errors("the machines that are left"):
            import sky
            from sky.jobs import utils

            clusters = {utils.generate_managed_job_cluster_name(name, job_id) for job_id in job_ids}
            rows = sky.get(sky.cost_report(days=_HISTORY_DAYS))
            return tuple(sorted({row["name"] for row in rows if row["name"] in clusters and row["status"] is not None}))

    @staticmethod
    def _task(task: Mapping[str, Any], secrets: Mapping[str, str]) -> Any:
        from copy import deepcopy

        import sky

        # A copy: SkyPilot takes its configuration apart while it reads it. The secrets are filled in only here.
        return sky.Task.from_yaml_config(deepcopy(dict(task)), secrets_overrides=list(secrets.items()))


def _listed(row: Any) -> Listed:
    return Listed(
        cloud=row.cloud.lower(),
        region=row.region,
        instance_type=row.instance_type,
        gpu=row.accelerator_name,
        gpus=float(row.accelerator_count),
        on_demand=_dollars(row.price),
        spot=_dollars(row.spot_price),
        memory_gib=_gib(row.memory),
    )


def _dollars(price: Any) -> float | None:
    """None for a price that is absent: the catalog has NaN there, and 0 for what is not for sale."""
    return None if price is None or math.isnan(price) or price <= 0 else float(price)


def _gib(memory: Any) -> float | None:
    """None where the catalog has none, or NaN (GCP's machines whose GPUs are listed by themselves)."""
    return None if memory is None or math.isnan(memory) or memory <= 0 else float(memory)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """SkyPilot writes to stdout, and warns of its own code."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except FtjobError:
        raise
    except Exception as error:  # SkyPilot's errors have no common root, and its server passes on any
        if type(error).__name__ in _NOBODY_ANSWERS or isinstance(error, OSError):
            raise Unreachable(
                f"SkyPilot could not be asked for {what}: {_first_line(error)}",
                hint="`sky api status` shows its API server, `sky api start` starts it",
            ) from error
        raise FtjobError(
            f"SkyPilot refused {what}: {_first_line(error)}", hint="`sky api logs` has the rest"
        ) from error


_NOBODY_ANSWERS: Final = frozenset(
    {
        *("ApiServerConnectionError", "ApiServerAuthenticationError", "APIVersionMismatchError", "NetworkError"),
        *("ServerTemporarilyUnavailableError", "RequestInterruptedError", "RequestCancelled", "ClusterNotUpError"),
        *("KubeAPIUnreachableError", "ConcurrentWorkerExhaustedError", "SkyletUnavailableError"),
    }
)
"""Errors of SkyPilot that say nothing about what was asked. By name: importing their classes takes seconds."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
