"""From what a person asks for to a run. `prepare` decides everything and creates nothing; `start` does it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from job.contract.environ import JobEnviron
from job.contract.errors import BadInput
from job.contract.recipe import TINY_MODEL, read_recipe
from job.contract.records import RunRecord, utc
from job.storage import Store, open_store
from launch.access import check_bucket, job_credentials, job_variables
from launch.backend import DEFAULT_MAX_RESTARTS, Backend, Shopping
from launch.begin import create_run, new_record, new_run_id, submit_run, take_up
from launch.cloud import CloudBackend
from launch.here import Here
from launch.hub import Hub
from launch.local import LocalBackend
from launch.plan import Plan, Upload, shares_files
from launch.prices import Policy
from launch.resolve import Resolved, commit_of, resolve
from launch.upload import into_bucket, put_dataset


@dataclass(frozen=True)
class Wish:
    """What a person asks for."""

    recipe: Path | None = None
    run_id: str | None = None
    """A run to go on with."""
    name: str | None = None
    """Of a new run."""
    infra: str | None = None
    gpu: str | None = None
    region: str | None = None
    policy: Policy = Policy.SPOT
    image: str | None = None
    bucket: str | None = None
    max_restarts: int = DEFAULT_MAX_RESTARTS

    @property
    def backend(self) -> str:
        """This machine, unless something else is named or a GPU is to be bought."""
        local = self.infra == LocalBackend.name or (self.infra is None and self.gpu is None)
        return LocalBackend.name if local else CloudBackend.name

    @property
    def clouds(self) -> tuple[str, ...]:
        if self.infra is None or self.backend == LocalBackend.name:
            return ()
        return tuple(dict.fromkeys(part.strip().lower() for part in self.infra.split(",") if part.strip()))


@dataclass(frozen=True)
class Prepared:
    """A launch with everything decided."""

    backend: Backend
    store: Store
    record: RunRecord
    plan: Plan
    environ: JobEnviron
    is_new: bool
    secrets: Mapping[str, str] = field(repr=False)


def prepare(here: Here, wish: Wish, *, for_launch: bool) -> Prepared:
    """Everything that a launch decides.

    Args:
        for_launch: also find out whether the bucket can be used, and which clouds are enabled. A plan works offline.

    Raises:
        FtjobError: it could not be launched, and why.
    """
    backend = here.backend(here.settings, wish.backend)
    backend.check_ready()
    resolved = read(wish.recipe, here, wish.bucket) if wish.recipe is not None else None
    if wish.run_id is not None:
        store = here.store(wish.run_id, wish.bucket)
        asked = here.who_describes(wish.run_id, store)
        record = take_up(here.settings.home, store, wish.run_id, asked, given=resolved, recipe_name=str(wish.recipe))
    elif wish.recipe is not None and resolved is not None:
        now = datetime.now(UTC)
        run_id = wish.name or new_run_id(wish.recipe.stem, now=now, token=secrets.token_hex(2))
        record, store = new_record(resolved, run_id=run_id, now=now), open_store(resolved.bucket)
    else:
        raise BadInput("nothing to launch", hint="name a RECIPE, or a run with --run RUN")
    uploads: tuple[Upload, ...] = ()
    if wish.backend != LocalBackend.name and not shares_files(wish.clouds) and wish.run_id is None:
        record, uploads = into_bucket(record, store)
    if for_launch:
        check_bucket(store)
    given, notes, variables = _given_to_the_job(record, store) if wish.backend != LocalBackend.name else ({}, (), {})
    shopping = Shopping(
        gpu=wish.gpu,
        clouds=wish.clouds,
        region=wish.region,
        policy=wish.policy,
        image=wish.image,
        enabled_only=for_launch,
        variables=variables,
        secrets=tuple(given),
    )
    plan = backend.plan(
        record,
        bucket=store.uri,
        shopping=shopping,
        max_restarts=wish.max_restarts,
        base_bytes=_base_bytes(record, resolved),
    )
    if resolved is not None and resolved.base_model.caveat:
        notes = (*notes, resolved.base_model.caveat)
    commit = commit_of(wish.recipe.absolute().parent) if wish.recipe is not None else None
    return Prepared(
        backend=backend,
        store=store,
        record=record,
        plan=plan.model_copy(update={"notes": (*plan.notes, *notes), "uploads": uploads}),
        environ=backend.environ(record, bucket=store.uri, git_commit=commit),
        is_new=wish.run_id is None,
        secrets=given,
    )


def start(here: Here, prepared: Prepared) -> None:
    """Create the run, if it is new, and submit it. Dying between any two steps leaves nothing, or a run that
    `ftjob status` explains and `ftjob launch --run` goes on with.

    Raises:
        FtjobError: as `create_run` and `submit_run`.
    """
    for upload in prepared.plan.uploads:
        put_dataset(upload)
    if prepared.is_new:
        create_run(here.settings.home, prepared.store, prepared.record, backend=prepared.backend.name)
    submit_run(
        here.settings.home,
        prepared.store,
        prepared.plan,
        prepared.environ,
        prepared.backend,
        secrets=prepared.secrets,
    )


def read(path: Path, here: Here, bucket: str | None) -> Resolved:
    """The recipe in a file, resolved.

    Args:
        bucket: what is said on the command line comes before what is written.
    """
    recipe = read_recipe(path)
    if bucket is not None:
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"bucket": bucket})})
    return resolve(recipe, folder=path.absolute().parent, bucket=here.settings.bucket)


def _base_bytes(record: RunRecord, resolved: Resolved | None) -> int | None:
    """Size of the base model's files; None when nobody knows."""
    if record.recipe.base_model.id == TINY_MODEL:
        return 0
    return (resolved.base_model.bytes or None) if resolved else None


def _given_to_the_job(record: RunRecord, store: Store) -> tuple[dict[str, str], tuple[str, ...], dict[str, str]]:
    """What a job elsewhere needs to reach buckets and hub: secrets, warnings about them, and plain variables."""
    given: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    places = (store.uri, record.train.uri, record.recipe.base_model.id)
    if any(place.startswith("s3://") for place in places):
        credentials = job_credentials()
        given |= credentials.variables
        variables = job_variables()
        if credentials.are_temporary:
            end = utc(credentials.expires_at) if credentials.expires_at else "a time that nobody tells"
            notes = (
                f"the credentials for S3 end at {end}: a run that is not over by then stops; "
                "long-lived ones, of a user of its own, do not",
            )
    if "HF_ENDPOINT" in os.environ:
        variables = variables | {"HF_ENDPOINT": os.environ["HF_ENDPOINT"]}
    token = Hub.of(os.environ).token if record.recipe.base_model.is_on_hub else None
    if token:
        given["HF_TOKEN"] = token
    return given, notes, variables
