"""The backend that buys GPUs: SkyPilot's managed jobs, on clouds, Kubernetes and Slurm."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

from job.contract.environ import JobEnviron
from job.contract.errors import BadInput, FtjobError, RunUnknown
from job.contract.layout import Uri
from job.contract.records import RunRecord
from job.contract.status import BackendState
from job.contract.submission import OWN, Offer
from job.storage.s3_account import ENDPOINT
from launch.backend import Described, Shopping
from launch.home import recall
from launch.plan import (
    MOST_OFFERS,
    Place,
    Plan,
    affordable,
    check_image,
    check_priced,
    check_reachable,
    disk_gb,
    mounts_of,
    usable,
    way_of,
)
from launch.prices import Choice, Listed, choose, nobody_sells, offers_of, parse_gpus
from launch.settings import Settings
from launch.skypilot import SELLERS, ManagedJob, SkyPilot
from launch.task import job_name, read_template, task_of

WORKDIR: Final = "/ftjob/work"
"""In the image; sky/train.yaml sets another where there is no image."""
GRACE_SECONDS: Final = 25.0
"""From SIGTERM to SIGKILL SkyPilot leaves 30 s."""
FRESH_SECONDS: Final = 120.0
"""How long after a submission SkyPilot's queue may not show it yet."""
ASK_SECONDS: Final = 15.0
"""Between two questions to SkyPilot: one costs it seconds, and its own look at a job comes every 15 s."""

_STATES: Final[Mapping[str, BackendState]] = {
    "PENDING": BackendState.QUEUED,
    "SUBMITTED": BackendState.QUEUED,
    "STARTING": BackendState.QUEUED,
    "RUNNING": BackendState.ALIVE,
    "WINDING_DOWN": BackendState.ALIVE,
    "RECOVERING": BackendState.RECOVERING,
    "CANCELLING": BackendState.ALIVE,
    "SUCCEEDED": BackendState.GONE,
    "CANCELLED": BackendState.CANCELLED,
    "FAILED": BackendState.FAILED,
    "FAILED_SETUP": BackendState.FAILED,
    "FAILED_PRECHECKS": BackendState.FAILED,
    # Neither is the job's fault, and another day it may go on.
    "FAILED_NO_RESOURCE": BackendState.GONE,
    "FAILED_CONTROLLER": BackendState.GONE,
}
"""SkyPilot's word for a managed job -> ours. A test holds it to SkyPilot's own list."""


class Sky(Protocol):
    """What this backend needs of SkyPilot; launch.skypilot.SkyPilot says what each does, and raises."""

    def check_installed(self) -> None: ...
    def check_clouds(self, names: Sequence[str]) -> None: ...
    def catalogs(self) -> tuple[str, ...]: ...
    def listed(self, clouds: Sequence[str]) -> tuple[Listed, ...]: ...
    def dearest_spot(self, instance_type: str, region: str) -> float | None: ...
    def enabled_clouds(self) -> tuple[str, ...]: ...
    def check_task(self, task: Mapping[str, Any]) -> None: ...
    def launch(self, task: Mapping[str, Any], secrets: Mapping[str, str]) -> int: ...
    def jobs(self, name: str) -> tuple[ManagedJob, ...]: ...
    def cancel(self, job_ids: Sequence[int]) -> None: ...
    def logs(self, job_id: int, *, follow: bool) -> Iterator[str]: ...
    def machines_of(self, name: str, job_ids: Sequence[int]) -> tuple[str, ...]: ...


class CloudBackend:
    """Runs jobs where GPUs are sold.

    Args:
        settings: the person's.
        sky: SkyPilot.
        clock: seconds since 1970.
    """

    name: Final = "skypilot"

    def __init__(self, settings: Settings, sky: Sky | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._sky: Sky = sky or SkyPilot()
        self._clock = clock
        self._asked: dict[str, tuple[float, Described]] = {}

    def check_ready(self) -> None:
        self._sky.check_installed()

    def plan(
        self, run: RunRecord, *, bucket: Uri, shopping: Shopping, max_restarts: int, base_bytes: int | None = None
    ) -> Plan:
        settings = self._settings
        self._sky.check_clouds(shopping.clouds)
        if shopping.gpu is None:
            raise BadInput("which GPU?", hint="--gpu H100, or any of several: --gpu H100,A100-80GB:8")
        image = shopping.image or settings.image
        for each in (image, settings.inside_image):
            if each is not None:
                check_image(each)
        check_reachable(run, bucket, shopping.clouds)
        offers, left_out = usable(self._offers(shopping), settings, image=image)
        offers = affordable(offers, shopping.budget)
        choice = self._choose(offers, shopping)
        check_priced(choice.order, shopping.budget)
        places = tuple(Place(offer=offer, way=way_of(offer.cloud)) for offer in choice.order[:MOST_OFFERS])
        datasets = [each for each in (run.train, run.held_out) if each is not None]
        return Plan.of(
            run,
            bucket=bucket,
            backend=self.name,
            max_restarts=max_restarts,
            places=places,
            why=choice.why,
            notes=(*choice.notes, *left_out, *_idle_gpus(places[0].offer), *_shown_secrets(places, shopping)),
            image=image,
            inside_image=settings.inside_image,
            python=settings.slurm_python,
            mounts=mounts_of(datasets, places, custom_endpoint=ENDPOINT in shopping.variables),
            variables=dict(shopping.variables),
            secrets=tuple(shopping.secrets),
            disk_gb=disk_gb(base_bytes),
            budget=shopping.budget,
        )

    def _offers(self, shopping: Shopping) -> tuple[Offer, ...]:
        """Everywhere that has the GPU, cheapest first."""
        gpus = parse_gpus(shopping.gpu or "")
        own = [cloud for cloud in shopping.clouds if cloud in OWN]
        if own:
            return tuple(
                Offer(
                    cloud=cloud,
                    region=shopping.region,
                    gpu=gpu.name,
                    gpus=gpu.count,
                    spot=False,
                    usd_per_hour=self._settings.usd_per_hour.get(cloud),
                )
                for cloud in own
                for gpu in gpus
            )
        clouds = shopping.clouds or self._sky.catalogs() or SELLERS
        if shopping.enabled_only:
            clouds = self._enabled(clouds, named=bool(shopping.clouds))
        listed = self._sky.listed(clouds)
        offers = offers_of(listed, gpus, region=shopping.region)
        if not offers:
            where = ", ".join(clouds) + (f", region {shopping.region}" if shopping.region else "")
            raise nobody_sells(gpus, listed, where=where)
        return tuple(self._in_its_dearest_zone(offer) for offer in offers)

    def _in_its_dearest_zone(self, offer: Offer) -> Offer:
        """What is spent may be over-counted, never under-counted: nobody knows in which zone it will be."""
        if not offer.spot or offer.cloud != "aws" or offer.instance_type is None or offer.region is None:
            return offer
        dearest = self._sky.dearest_spot(offer.instance_type, offer.region)
        return offer.model_copy(update={"usd_per_hour": max(dearest or 0.0, offer.usd_per_hour or 0.0)})

    def _choose(self, offers: Sequence[Offer], shopping: Shopping) -> Choice:
        if any(offer.is_own for offer in offers):
            return Choice(order=tuple(offers), why="a cluster of your own; SkyPilot looks for the GPU there")
        return choose(offers, shopping.policy)

    def _enabled(self, clouds: Sequence[str], *, named: bool) -> tuple[str, ...]:
        enabled = self._sky.enabled_clouds()
        usable = tuple(cloud for cloud in clouds if cloud in enabled)
        if usable:
            return usable
        have = (
            f"SkyPilot has credentials for: {', '.join(enabled)}" if enabled else "SkyPilot has no cloud enabled here"
        )
        asked = f"none of {', '.join(clouds)} is enabled" if named else "no cloud that sells GPUs is enabled"
        raise BadInput(
            f"{asked}; {have}",
            hint=f"`sky check {clouds[0]}` says what it needs (AWS: `aws configure`; GCP: `gcloud auth "
            "application-default login`); or train on this machine: --infra local",
        )

    def environ(self, run: RunRecord, *, bucket: Uri, git_commit: str | None) -> JobEnviron:
        return JobEnviron(
            run_id=run.run_id,
            bucket=bucket,
            workdir=WORKDIR,
            grace_seconds=GRACE_SECONDS,
            threads=self._settings.threads,
            git_commit=git_commit,
            infra={"infra": self.name},
        )

    def task(self, plan: Plan, environ: JobEnviron) -> dict[str, Any]:
        """The task of a plan, as SkyPilot will get it, less the secrets' values.

        Raises:
            FtjobError: SkyPilot cannot read it.
        """
        task = task_of(plan, environ, read_template())
        self._sky.check_task(task)
        return task

    def submit(self, plan: Plan, environ: JobEnviron, secrets: Mapping[str, str]) -> None:
        self._sky.launch(self.task(plan, environ), secrets)

    def describe(self, run_id: str) -> Described:
        at, described = self._asked.get(run_id, (float("-inf"), None))
        if described is None or self._clock() - at >= ASK_SECONDS:
            described = self._describe(run_id)
            self._asked[run_id] = (self._clock(), described)
        return described

    def _describe(self, run_id: str) -> Described:
        try:
            self._sky.check_installed()
            jobs = self._sky.jobs(job_name(run_id))
        except FtjobError as error:
            return Described(BackendState.UNREACHABLE, error.message)
        known = recall(self._settings.home, run_id)
        if known is not None and known.backend != self.name:
            known = None
        handed = known.submitted_at if known is not None else None
        if jobs:
            job = jobs[0]
            state = _STATES.get(job.status)
            fresh = self._just_handed_over(handed, after=job.submitted_at) if job.submitted_at else None
            if fresh is not None and not _is_alive(job):
                return fresh
            if state is None:
                return Described(
                    BackendState.UNREACHABLE, f"SkyPilot says {job.status}, which this ftjob does not know"
                )
            return Described(state, _detail(job))
        if known is None:
            return Described(BackendState.UNREACHABLE, "this machine's SkyPilot does not know it: launched elsewhere")
        if handed is None:
            return Described(BackendState.GONE, "it was never handed to SkyPilot")
        return self._just_handed_over(handed) or Described(BackendState.GONE, "SkyPilot has no job of it")

    def _just_handed_over(self, handed: datetime | None, *, after: float = 0.0) -> Described | None:
        """What to say while SkyPilot's queue may not show yet what it was given here, or else None. The end of the job
        before must not be taken for this one's: whoever goes on then buys a second machine.

        Args:
            handed: when this machine gave it the run.
            after: seconds since 1970; what was given before then is no news.
        """
        if handed is None or handed.timestamp() <= after:
            return None
        since = self._clock() - handed.timestamp()
        if since >= FRESH_SECONDS:
            return None
        return Described(BackendState.QUEUED, f"handed to SkyPilot {since:.0f} s ago")

    def cancel(self, run_id: str) -> bool:
        self._asked.pop(run_id, None)
        alive = [job.job_id for job in self._sky.jobs(job_name(run_id)) if _is_alive(job)]
        if alive:
            self._sky.cancel(alive)
        return bool(alive)

    def logs(self, run_id: str, *, follow: bool) -> Iterator[str]:
        jobs = self._sky.jobs(job_name(run_id))
        if not jobs:
            raise RunUnknown(
                f"this machine's SkyPilot has no job of run {run_id}", hint="it keeps logs where it was launched"
            )
        return _lines(piece for job in reversed(jobs) for piece in self._sky.logs(job.job_id, follow=follow))

    def left(self, run_id: str) -> tuple[str, ...]:
        name = job_name(run_id)
        return self._sky.machines_of(name, [job.job_id for job in self._sky.jobs(name)])


def _is_alive(job: ManagedJob) -> bool:
    return _STATES.get(job.status) in (BackendState.QUEUED, BackendState.ALIVE, BackendState.RECOVERING)


def _detail(job: ManagedJob) -> str:
    told = {"CANCELLING": "it is being cancelled", "STARTING": "SkyPilot is looking for a machine"}.get(job.status, "")
    recovered = f"recovered {job.recoveries} times" if job.recoveries else ""
    return "; ".join(part for part in (told, job.detail, recovered) if part)


def _idle_gpus(offer: Offer) -> tuple[str, ...]:
    if offer.gpus == 1:
        return ()
    return (f"ftjob trains on one GPU: {offer.gpus - 1} of {offer.gpu}:{offer.gpus} would be paid for and idle",)


def _shown_secrets(places: Sequence[Place], shopping: Shopping) -> tuple[str, ...]:
    if not shopping.secrets or all(place.offer.cloud != "slurm" for place in places):
        return ()
    return (
        "on Slurm SkyPilot 0.14 puts secrets into command lines, where other users of the node see them; with "
        "credentials in a file on the cluster, `slurm_secrets = false` in settings.toml sends none",
    )


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Whole lines, without what SkyPilot writes before each."""
    pending = ""
    for piece in pieces:
        *whole, pending = (pending + piece).split("\n")
        yield from (_without_prefix(line) for line in whole)
    if pending:
        yield _without_prefix(pending)


_PREFIX: Final = re.compile(r"^(?:\x1b\[[0-9;]*m)*\([^()]*, pid=\d+\)(?:\x1b\[[0-9;]*m)* (?={)")
"""What SkyPilot writes before each line, "(name, pid=123) {...}", in colour or not. Ours are JSON."""


def _without_prefix(line: str) -> str:
    return _PREFIX.sub("", line.rstrip("\r"))
