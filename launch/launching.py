"""From what a person asks for to a run. `prepare` decides everything and creates nothing; `start` does it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from job.contract.budget import Budget
from job.contract.environ import JobEnviron
from job.contract.errors import BadInput
from job.contract.recipe import TINY_MODEL
from job.contract.records import RunRecord
from job.storage import Store, open_store
from launch.access import Given, check_bucket, given_to_the_job
from launch.backend import Backend, Shopping
from launch.begin import create_run, new_record, new_run_id, next_submission, submit_run, take_up
from launch.here import Here
from launch.local import LocalBackend
from launch.plan import Plan, Upload, shares_files
from launch.precision import check_precision, with_precision
from launch.quoted import with_quote
from launch.recipe_file import read_recipe
from launch.resolve import Resolved, commit_of, resolve
from launch.spending import budget_and_spent
from launch.upload import into_bucket, put_dataset
from launch.visible import visible
from launch.wish import Wish

_WARNINGS: Final = 3
"""Of a check, that a plan tells: one of each kind."""


@dataclass(frozen=True)
class Prepared:
    """A launch with everything decided."""

    backend: Backend
    store: Store
    record: RunRecord
    plan: Plan
    environ: JobEnviron
    submission: int
    """Number that the launch takes in the run's bucket, if no other launcher takes it first."""
    is_new: bool
    refused: BadInput | None
    """Why the quote speaks against it; to be raised once the plan was shown."""
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
    resolved = read(wish.recipe, here, wish.bucket, anyway=wish.anyway) if wish.recipe is not None else None
    record, store, submission = _run_of(here, wish, resolved)
    uploads: tuple[Upload, ...] = ()
    if wish.backend != LocalBackend.name and not shares_files(wish.clouds) and wish.run_id is None:
        record, uploads = into_bucket(record, store)
    budget, spent = budget_and_spent(
        record, store, wish, given=resolved.recipe.budget if resolved is not None else None
    )
    model, longest = (resolved.model, resolved.lengths[0].longest) if resolved is not None else (None, None)
    check_precision(record.recipe, model, longest=longest)
    if for_launch:
        check_bucket(store)
    given = _given(here, wish, record, store)
    plan = backend.plan(
        record,
        bucket=store.uri,
        shopping=_shopping(wish, budget, given, enabled_only=for_launch),
        max_restarts=wish.max_restarts,
        base_bytes=_base_bytes(record, resolved),
    )
    plan = with_precision(plan, own_gpu=_has_own_gpu(plan))
    told = (*_notes_of(resolved), *_without_effect(resolved, record)) if resolved is not None else ()
    notes = (*plan.notes, *given.notes, *told)
    plan = plan.model_copy(update={"notes": notes, "uploads": uploads, "spent_usd": spent})
    refused = None
    if resolved is not None and not _has_own_gpu(plan):
        plan, refused = with_quote(plan, resolved, here)
    commit = commit_of(wish.recipe.absolute().parent) if wish.recipe is not None else None
    return Prepared(
        backend=backend,
        store=store,
        record=record,
        plan=plan,
        refused=None if wish.anyway else refused,
        environ=backend.environ(record, bucket=store.uri, git_commit=commit),
        submission=submission,
        is_new=wish.run_id is None,
        secrets=given.secrets,
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
        number=prepared.submission,
        secrets=prepared.secrets,
    )


def _run_of(here: Here, wish: Wish, resolved: Resolved | None) -> tuple[RunRecord, Store, int]:
    """The record of the run to go on with, or of a new one, the bucket that it lives in, and the number that the launch
    takes there.

    Raises:
        BadInput: neither is named, or as `take_up`.
    """
    if wish.run_id is not None:
        store = here.store(wish.run_id, wish.bucket)
        submission = next_submission(store, wish.run_id)
        asked = here.who_describes(wish.run_id, store)
        taken = take_up(here.settings.home, store, wish.run_id, asked, given=resolved, recipe_name=str(wish.recipe))
        return taken, store, submission
    if wish.recipe is None or resolved is None:
        raise BadInput("nothing to launch", hint="name a RECIPE, or a run with --run RUN")
    now = datetime.now(UTC)
    run_id = wish.name or new_run_id(wish.recipe.stem, now=now, token=secrets.token_hex(2))
    return new_record(resolved, run_id=run_id, now=now), open_store(resolved.bucket), 1


def _given(here: Here, wish: Wish, record: RunRecord, store: Store) -> Given:
    """What travels with the job: nothing to this machine, and no secrets to a Slurm where others could see them."""
    if wish.backend == LocalBackend.name:
        return Given()
    given = given_to_the_job(record, store)
    if shares_files(wish.clouds) and not here.settings.slurm_secrets:
        return Given(variables=given.variables)
    return given


def _shopping(wish: Wish, budget: Budget, given: Given, *, enabled_only: bool) -> Shopping:
    return Shopping(
        gpu=wish.gpu,
        clouds=wish.clouds,
        region=wish.region,
        policy=wish.policy,
        image=wish.image,
        budget=budget,
        enabled_only=enabled_only,
        variables=given.variables,
        secrets=tuple(given.secrets),
    )


def _has_own_gpu(plan: Plan) -> bool:
    """Whether the job would run on a GPU of this machine, of which the quote knows nothing."""
    return not plan.buys and Path("/dev/nvidia0").exists()


def read(path: Path, here: Here, bucket: str | None, *, anyway: bool = False) -> Resolved:
    """The recipe in a file, resolved.

    Args:
        bucket: what is said on the command line comes before what is written.
        anyway: as `resolve` has it.
    """
    recipe = read_recipe(path)
    if bucket is not None:
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"bucket": bucket})})
    folder, settings = path.absolute().parent, here.settings
    return resolve(recipe, folder=folder, bucket=settings.bucket, cache=settings.cache, anyway=anyway)


def _notes_of(resolved: Resolved) -> list[str]:
    """The warnings of a check, what was not checked, and what is to be known of the base model."""
    check = resolved.check
    warnings = [problem for problem in check.problems if problem.severity == "warning"]
    first = list({problem.code: problem for problem in reversed(warnings)}.values())[::-1]
    count = sum(check.times(problem.code) for problem in first)
    notes = [visible(problem.text) for problem in first[:_WARNINGS]]
    if count > len(notes):
        notes.append(f"{count:,} warnings of the check: `ftjob check RECIPE` shows all of them, and what they mean")
    if check.not_checked:
        notes.append(check.not_checked)
    if resolved.base_model.caveat:
        notes.append(resolved.base_model.caveat)
    return notes


def _without_effect(resolved: Resolved, record: RunRecord) -> list[str]:
    """What a recipe that is named together with its run says otherwise, and changes nothing by it."""
    said, holds = resolved.recipe.checkpoints, record.recipe.checkpoints
    return [
        f"checkpoints.{name} of the recipe ({value}) has no effect: the run keeps what it was launched with "
        f"({getattr(holds, name)})"
        for name, value in said
        if value != getattr(holds, name)
    ]


def _base_bytes(record: RunRecord, resolved: Resolved | None) -> int | None:
    """Size of the base model's files; None when nobody knows."""
    if record.recipe.base_model.id == TINY_MODEL:
        return 0
    return (resolved.base_model.bytes or None) if resolved else None
