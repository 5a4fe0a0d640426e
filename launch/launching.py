"""From what a person asks for to a run. `prepare` decides everything and creates nothing; `start` does it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from job.contract.budget import Budget
from job.contract.environ import JobEnviron
from job.contract.errors import BadInput
from job.contract.recipe import TINY_MODEL, read_recipe
from job.contract.records import RunRecord, utc
from job.contract.submission import Offer
from job.storage import Store, open_store
from launch.access import check_bucket, job_credentials, job_variables
from launch.backend import DEFAULT_MAX_RESTARTS, Backend, Shopping
from launch.begin import create_run, new_record, new_run_id, next_submission, submit_run, take_up
from launch.cloud import CloudBackend
from launch.here import Elsewhere, Here
from launch.hub import Hub
from launch.local import LocalBackend
from launch.plan import Plan, Upload, shares_files
from launch.precision import check_precision, refuse_without_gpu, with_fp8
from launch.prices import Policy
from launch.quote import Quote, make_quote, refusal
from launch.resolve import Resolved, commit_of, resolve
from launch.runs import RunReader
from launch.spending import budget_for
from launch.upload import into_bucket, put_dataset
from launch.visible import visible

_WARNINGS: Final = 3
"""Of a check, that a plan tells: one of each kind."""


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
    budget: str | None = None
    """Dollars: "40", or "+20"."""
    by: str | None = None
    bucket: str | None = None
    anyway: bool = False
    """Launch although the quote speaks against it."""
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
    submission = 1
    if wish.run_id is not None:
        store = here.store(wish.run_id, wish.bucket)
        submission = next_submission(store, wish.run_id)
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
    budget, spent = budget_of(record, store, wish, given=resolved.recipe.budget if resolved is not None else None)
    _check_precision(record, resolved)
    if for_launch:
        check_bucket(store)
    given, notes, variables = _given_to_the_job(record, store) if wish.backend != LocalBackend.name else ({}, (), {})
    if shares_files(wish.clouds) and not here.settings.slurm_secrets:
        given, notes = {}, ()
    shopping = Shopping(
        gpu=wish.gpu,
        clouds=wish.clouds,
        region=wish.region,
        policy=wish.policy,
        image=wish.image,
        budget=budget,
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
    plan = _with_precision(plan)
    if resolved is not None:
        notes = (*notes, *_said_of_check(resolved), *filter(None, [resolved.base_model.caveat]))
    plan = plan.model_copy(update={"notes": (*plan.notes, *notes), "uploads": uploads, "spent_usd": spent})
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
        number=prepared.submission,
        secrets=prepared.secrets,
    )


def _too_little_here(plan: Plan, quote: Quote, left: float | None) -> BadInput | None:
    """The same for this machine, of which the quote knows the hours and not the price."""
    price = plan.chosen.usd_per_hour if plan.chosen is not None and not plan.buys else None
    if left is None or price is None or quote.chosen.seconds is None:
        return None
    expected = quote.chosen.seconds.p50 / 3600 * price
    if expected <= left:
        return None
    return BadInput(
        f"${left:.2f} will not do: the run is expected to cost ${expected:.2f} (p50) here",
        hint=f"--budget {expected * 1.5:.2f}, or --anyway: it lands when the budget ends, and more of it goes on",
    )


def _has_own_gpu(plan: Plan) -> bool:
    """Whether the job would run on a GPU of this machine, of which the quote knows nothing."""
    return not plan.buys and Path("/dev/nvidia0").exists()


def _check_precision(record: RunRecord, resolved: Resolved | None) -> None:
    if resolved is None:
        check_precision(record.recipe, None)
    else:
        check_precision(record.recipe, resolved.model, longest=resolved.lengths[0].longest)


def _with_precision(plan: Plan) -> Plan:
    """The plan without places whose GPU cannot do what the recipe asks for. Raises BadInput where none can."""
    if not plan.buys:
        if not _has_own_gpu(plan):
            refuse_without_gpu(plan.recipe)
        return plan
    places, notes = with_fp8(plan.recipe, plan.places)
    return plan.model_copy(update={"places": places, "notes": (*plan.notes, *notes)})


def with_quote(plan: Plan, resolved: Resolved, here: Here) -> tuple[Plan, BadInput | None]:
    """The plan with what it is expected to take; and why it will not fit into the GPU's memory, or into the budget.

    Fallbacks whose memory is too small are left out: to be offered them would be no help.
    """
    offers: tuple[Offer | None, ...] = plan.offers if plan.buys else (None,)
    quote = make_quote(plan.recipe, resolved.facts, offers, threads=here.settings.threads)
    left = None if plan.budget.max_usd is None else plan.budget.max_usd - plan.spent_usd
    refused = refusal(quote, max_usd=left) or _too_little_here(plan, quote, left)
    notes = plan.notes if refused is None else (*plan.notes, refused.message)
    fits = [index for index, each in enumerate(quote.offers) if not index or each.memory.verdict != "does not fit"]
    if dropped := len(quote.offers) - len(fits):
        notes = (*notes, f"{dropped} fallbacks are left out: their GPU's memory is too small")
    kept = {
        "places": tuple(plan.places[index] for index in fits),
        "quote": quote.model_copy(update={"offers": tuple(quote.offers[index] for index in fits)}),
    }
    return plan.model_copy(update={**kept, "notes": notes}), refused


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


def _said_of_check(resolved: Resolved) -> list[str]:
    """The warnings of a check, and what was not checked."""
    check = resolved.check
    warnings = [problem for problem in check.problems if problem.severity == "warning"]
    first = list({problem.code: problem for problem in reversed(warnings)}.values())[::-1]
    count = sum(check.times(problem.code) for problem in first)
    notes = [visible(problem.text) for problem in first[:_WARNINGS]]
    if count > len(notes):
        notes.append(f"{count:,} warnings of the check: `ftjob check RECIPE` shows all of them, and what they mean")
    if check.not_checked:
        notes.append(check.not_checked)
    return notes


def budget_of(record: RunRecord, store: Store, wish: Wish, *, given: Budget | None = None) -> tuple[Budget, float]:
    """What the run may cost, as said now, else as its last submission said, else as its recipe says; and what it has
    cost.

    Args:
        given: of the recipe that is named together with a run. What was written into it since the launch is said now.

    Raises:
        BadInput: it is used up.
        Unreachable: its records cannot be read for now, so that nobody knows what holds.
    """
    now, base = datetime.now(UTC), record.recipe.budget
    if wish.run_id is None:
        return budget_for(base, dollars=wish.budget, by=wish.by, now=now), 0.0
    view = RunReader(store, record.run_id, Elsewhere("")).poll(now).certain
    written = (
        {} if given is None else {name: value for name, value in given if value not in (None, getattr(base, name))}
    )
    holds = view.budget.model_copy(update=written)
    budget = budget_for(holds, dollars=wish.budget, by=wish.by, now=now)
    if budget.max_usd is not None and view.spent_usd is not None and view.spent_usd >= budget.max_usd:
        raise BadInput(
            f"run {record.run_id} has spent ${view.spent_usd:.2f} of its ${budget.max_usd:.2f}",
            hint="--budget +20 allows so much more",
        )
    return budget, view.spent_usd or 0.0


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
