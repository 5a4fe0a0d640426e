"""Creates runs, and takes up runs that stand still. Dying between any two steps leaves nothing, or a run that
`ftjob status` explains and `ftjob launch --run` goes on with."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from job.contract.environ import JobEnviron
from job.contract.errors import AccessRefused, AlreadyExists, BadInput, FtjobError, RunExists
from job.contract.layout import RunLayout, check_run_id
from job.contract.records import RunRecord
from job.contract.status import Status
from job.contract.submission import Submission
from job.storage import Store
from launch.backend import Backend
from launch.home import Remembered, forget, note_submission, recall, remember
from launch.plan import Plan
from launch.resolve import Resolved, check_same_recipe, check_unchanged
from launch.runs import Describes, RunReader, newest_submission, read_run, submitted
from launch.settings import ftjob_version

MAY_LIVE_SECONDS: Final = 120.0
"""A run that nobody here can ask about is left alone for so long after its last sign of life: eight heartbeats."""
MAY_START_SECONDS: Final = 15 * 60.0
"""And for so long after it was handed over, if there was no sign of life since: a machine is looked for, boots, and
fetches the image."""

_LONGEST_STEM: Final = 63 - len("-20260101-000000-abcd")


def new_run_id(stem: str, *, now: datetime, token: str) -> str:
    """<stem>-<yyyymmdd-hhmmss>-<token>: sorts by time for one recipe, and two people do not meet.

    Args:
        stem: of the recipe's file name; whatever a run id may not hold becomes "-".
        token: 4 hex digits, drawn by the caller.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower())[:_LONGEST_STEM].strip("-") or "run"
    return check_run_id(f"{slug}-{now.astimezone(UTC):%Y%m%d-%H%M%S}-{token}")


def new_record(resolved: Resolved, *, run_id: str, now: datetime) -> RunRecord:
    """The record of a run that does not exist yet."""
    return RunRecord(
        run_id=check_run_id(run_id),
        created_at=now,
        recipe=resolved.recipe,
        recipe_digest=resolved.recipe.digest(),
        train=resolved.train,
        held_out=resolved.held_out,
        tokens_sha256=resolved.check.supervision.tokens_sha256 if resolved.check.supervision is not None else None,
        ftjob=ftjob_version(),
    )


def create_run(home: Path, store: Store, record: RunRecord, *, backend: str) -> None:
    """Write recipe.json: from here on the run exists.

    Raises:
        RunExists: the id is taken, in this bucket or on this machine.
        BadInput: the bucket cannot be written.
        StorageError: the bucket is out of reach for now.
    """
    known = recall(home, record.run_id)
    if known is not None:
        check_same_bucket(known, store)
    ours = remember(home, Remembered(run_id=record.run_id, bucket=store.uri, backend=backend))
    try:
        store.put_new(RunLayout(record.run_id).recipe, record.to_bytes())
    except FtjobError as error:
        if ours:
            forget(home, record.run_id)
        if isinstance(error, AlreadyExists):
            raise RunExists(
                f"run {record.run_id} exists already in {store.uri}",
                hint=f"`ftjob launch --run {record.run_id}` goes on with it; leave --name out for a new one",
            ) from error
        if isinstance(error, AccessRefused):
            raise BadInput(f"bucket {store.uri} cannot be written: {error.message}", hint=error.hint) from error
        raise


def check_same_bucket(known: Remembered, store: Store) -> None:
    """A run's id names its folder on this machine, so two buckets cannot each have a run of that id here.

    Raises:
        RunExists: this machine launched a run of that id into another bucket.
    """
    if known.bucket != store.uri:
        raise RunExists(
            f"this machine has a run {known.run_id} in {known.bucket}, which is another than one in {store.uri}",
            hint="choose another --name, or leave --bucket out",
        )


def next_submission(store: Store, run_id: str) -> int:
    """The number that a launch of the run takes, if no other launcher is faster. Asked before anything else about the
    run: whatever is decided then holds for as long as the number is free. Raises StorageError."""
    return max(submitted(store, run_id), default=0) + 1


def submit_run(
    home: Path,
    store: Store,
    plan: Plan,
    environ: JobEnviron,
    backend: Backend,
    *,
    number: int,
    secrets: Mapping[str, str],
) -> None:
    """Say in the bucket and on this machine who runs the run, and hand it over. In this order: a launcher that dies in
    between leaves a run of which `status` says that it never started, and not one that runs unknown to everybody.

    Args:
        number: of the submission, from `next_submission`. Of two launchers that go on with a run one gets it.

    Raises:
        BadInput: another launcher was faster.
        FtjobError: the backend could not start it.
        StorageError: the bucket is out of reach for now.
    """
    layout = RunLayout(plan.run_id)
    environ = environ.model_copy(update={"submission": number})
    if plan.buys:  # the backend restarts for ever, so the job has to know where it ends
        attempts = [layout.claimed_attempt(info.key) or 0 for info in store.list(layout.attempts)]
        last, paid = max(attempts, default=0) + 1 + plan.max_restarts, not plan.offers[0].is_own
        environ = environ.model_copy(update={"last_attempt": last, "gpu": paid})
    submission = Submission(
        submission=number,
        nonce=uuid.uuid4().hex,
        submitted_at=datetime.now(UTC),
        backend=backend.name,
        offers=plan.offers,
        image=plan.image,
        last_attempt=environ.last_attempt,
        budget=plan.budget,
    )
    try:
        store.put_new(layout.submission(number), submission.to_bytes())
    except AlreadyExists as error:
        raise BadInput(
            f"run {plan.run_id} was handed over by another launcher in the meantime",
            hint=f"watch it with `ftjob status {plan.run_id}`",
        ) from error
    known = Remembered(run_id=plan.run_id, bucket=store.uri, backend=backend.name, submitted_at=submission.submitted_at)
    note_submission(home, known)
    backend.submit(plan, environ, secrets)


def _check_stands_still(store: Store, run_id: str, sign: datetime | None, now: datetime) -> None:
    """Refuse to go on with a run that nobody here can ask about, for as long as it may live, or its machine may start.

    Raises:
        BadInput: it may.
    """
    if sign is not None and (silent := now - sign) < timedelta(seconds=MAY_LIVE_SECONDS):
        raise BadInput(
            f"run {run_id} may be running elsewhere: its last sign of life is {silent.total_seconds():.0f} s old",
            hint=f"stop it where it runs, or try again after {MAY_LIVE_SECONDS:.0f} s of silence",
        )
    newest = newest_submission(store, run_id)
    if newest is None or (sign is not None and sign > newest.submitted_at):
        return
    if (since := now - newest.submitted_at) < timedelta(seconds=MAY_START_SECONDS):
        raise BadInput(
            f"run {run_id} may be starting elsewhere: it was handed to {newest.backend} "
            f"{since.total_seconds() / 60:.0f} min ago",
            hint=f"cancel it where it was launched, or try again {MAY_START_SECONDS / 60:.0f} min after that",
        )


def take_up(
    home: Path, store: Store, run_id: str, backend: Describes, *, given: Resolved | None, recipe_name: str
) -> RunRecord:
    """The record of a run that may be submitted again: it exists, stands still, is not finished and has not changed.

    Args:
        backend: who is asked whether it stands still.
        given: the recipe named together with the run, which must be the run's own; None when none was.
        recipe_name: what errors call it.

    Raises:
        RunUnknown: there is no such run.
        BadInput: it is still running, or finished.
        IdentityMismatch: its dataset, or the recipe given, is another than at its launch.
        Unreachable: its records cannot be read for now, so that nobody knows whether it lives.
    """
    known = recall(home, run_id)
    if known is not None:
        check_same_bucket(known, store)
    record = read_run(store, run_id)
    if given is not None:
        check_same_recipe(record, given.recipe, name=recipe_name)
    now = datetime.now(UTC)
    poll = RunReader(store, run_id, backend).poll(now)
    view = poll.certain
    if view.status is Status.SUCCEEDED:
        raise BadInput(f"run {run_id} is finished", hint=f"`ftjob fetch {run_id}` brings its adapter here")
    if view.status in (Status.PENDING, Status.RUNNING, Status.RECOVERING):
        detail = f": {poll.described.detail}" if poll.described.detail else ""
        raise BadInput(
            f"run {run_id} is still running{detail}",
            hint=f"watch it with `ftjob status {run_id}`, or `ftjob cancel` it",
        )
    if view.status is Status.UNKNOWN:
        _check_stands_still(store, run_id, view.last_sign_of_life, now)
    check_unchanged(record)
    return record
