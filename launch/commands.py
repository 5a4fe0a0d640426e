"""What commands do, apart from parsing and printing answers."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from job.contract.errors import BadInput, FtjobError, RunUnknown, StorageError
from job.contract.receipt import Receipt
from job.contract.recipe import Recipe
from job.contract.records import RunRecord
from job.contract.status import BackendState, Status
from job.storage import Store
from launch import render, render_plan
from launch.backend import Backend, Described
from launch.chaos import Chaos, run_chaos
from launch.cloud import CloudBackend
from launch.deadline import Choice, check_deadline
from launch.fetch import Fetched, fetch, read_adapter
from launch.follow import LOCAL_SECONDS, REMOTE_SECONDS, Interrupts, follow, wait_until_stopped
from launch.here import Elsewhere, Here
from launch.launching import Prepared, Wish, prepare, read, start
from launch.left import left_of
from launch.plan import Plan
from launch.prices import Policy
from launch.runs import Poll, RunReader, list_runs, read_run
from launch.switching import Course, course_of
from launch.task import as_yaml
from launch.view import Facts, Left, RunView, exit_code_of, view_of

CANCEL_PATIENCE_SECONDS: Final = 180.0
"""For a cancelled job to save and end, and for its machine to be given back."""


def launch_run(
    here: Here, wish: Wish, *, yes: bool, dry_run: bool, show_task: bool, detach: bool, as_json: bool
) -> int:
    """Launch what is wished for, and stay with the run; the exit code.

    Raises:
        FtjobError: it could not be launched.
    """
    prepared, course = _with_course(here, wish, prepare(here, wish, for_launch=True))
    plan = prepared.plan
    if dry_run:
        return plan_run(prepared, show_task=show_task, as_json=as_json)
    if not prepared.is_new:
        click.echo(f"goes on with run {plan.run_id} on {plan.backend}", err=True)
    click.echo(render_plan.plan_text(plan), err=True)
    if show_task:
        click.echo(_task_text(prepared), err=True)
    if prepared.refused is not None:
        raise prepared.refused
    if plan.buys and not yes and not _agreed(plan):
        click.echo("nothing was launched", err=True)
        return 1
    with Interrupts() as interrupts:
        start(here, prepared)
        if detach:
            return _leave(prepared.store, prepared.record, as_json=as_json)
        view = _stay(prepared.store, prepared.record, prepared.backend, interrupts, course=course)
        while course is not None and course.wanted is not None and not interrupts.count and _goes_on(view):
            wish = replace(wish, run_id=view.run_id, name=None, policy=course.wanted)
            prepared = prepare(here, wish, for_launch=True)
            course.policy, course.wanted = course.wanted, None
            start(here, prepared)
            view = _stay(prepared.store, prepared.record, prepared.backend, interrupts, course=course)
    _answer(view, as_json=as_json)
    return exit_code_of(view)


def _goes_on(view: RunView) -> bool:
    """Whether a run that was stopped to change machines has still something to do."""
    return view.status in (Status.CANCELLED, Status.INTERRUPTED)


def _with_course(here: Here, wish: Wish, prepared: Prepared) -> tuple[Prepared, Course | None]:
    """With a deadline: the course to it, and on demand from the start where spot would be too late already.

    Raises:
        BadInput: the deadline cannot be met at all.
    """
    now = datetime.now(UTC)
    course = course_of(prepared.plan, began=prepared.record.created_at)
    if course is None or wish.policy is Policy.ON_DEMAND:
        return prepared, None
    if not wish.anyway and prepared.is_new:
        check_deadline(course.terms)
    first = course.first(now)
    if first.choice is not Choice.ON_DEMAND:
        return prepared, course
    click.echo(f"on demand: {first.reason}", err=True)
    course.policy = Policy.ON_DEMAND
    changed = prepare(here, replace(wish, policy=Policy.ON_DEMAND, name=prepared.record.run_id), for_launch=True)
    return changed, course


def plan_run(prepared: Prepared, *, show_task: bool, as_json: bool) -> int:
    """Print a plan, and do nothing; the exit code.

    Raises:
        BadInput: the quote speaks against it.
    """
    if as_json:
        click.echo(render.as_json(prepared.plan))
    else:
        click.echo(render_plan.plan_text(prepared.plan))
    if show_task:
        click.echo(_task_text(prepared), err=as_json)
    if prepared.refused is not None:
        raise prepared.refused
    return 0


def _agreed(plan: Plan) -> bool:
    if not sys.stdin.isatty():
        raise BadInput("this would buy a GPU, and nobody is here to be asked", hint="--yes buys without asking")
    price = plan.chosen.usd_per_hour if plan.chosen else None
    what = f"at ${price:.2f} an hour" if price is not None else "on your own cluster"
    return click.confirm(f"launch {what}?", err=True)


def _task_text(prepared: Prepared) -> str:
    """The task as YAML; the values of secrets are not in it."""
    backend = prepared.backend
    if not isinstance(backend, CloudBackend):
        raise BadInput("--show-task is for clouds: a local run is a process, not a task", hint="leave it out")
    return as_yaml(backend.task(prepared.plan, prepared.environ))


def _leave(store: Store, record: RunRecord, *, as_json: bool) -> int:
    view = view_of(Facts(record), Described(BackendState.QUEUED), bucket=store.uri, now=datetime.now(UTC))
    if as_json:
        click.echo(render.as_json(view))
    else:
        click.echo(record.run_id)
        click.echo(f"watch it with `ftjob status {record.run_id}` or `ftjob logs {record.run_id} --follow`", err=True)
    return 0


def watch_run(here: Here, run_id: str, bucket: str | None) -> RunView:
    """Watch a run until it is over, or until an interrupt, which touches nothing; the run as it is then.

    Raises:
        RunUnknown: there is no such run.
    """
    store = here.store(run_id, bucket)
    with Interrupts() as interrupts:
        return _stay(store, read_run(store, run_id), here.backend_of(run_id, store), interrupts, cancels=False)


def _stay(
    store: Store,
    record: RunRecord,
    backend: Backend,
    interrupts: Interrupts,
    *,
    cancels: bool = True,
    course: Course | None = None,
) -> RunView:
    def leave_now(poll: Poll) -> str:
        if course is None or not course.look(poll, datetime.now(UTC)):
            return ""
        return f"changes to {course.wanted}: {course.reason}"

    console = Console(stderr=True)
    reader = RunReader(store, record.run_id, backend)
    every = LOCAL_SECONDS if store.uri.startswith("file:") else REMOTE_SECONDS
    live = render.LiveDisplay(console) if console.is_terminal else None
    with live or nullcontext():
        display = live or render.PlainDisplay(console)
        return follow(
            reader, record.run_id, backend, display, interrupts, every=every, cancels=cancels, leave_now=leave_now
        )


def _answer(view: RunView, *, as_json: bool) -> None:
    if as_json:
        click.echo(render.as_json(view))
    else:
        Console().print(render.summary_text(view), soft_wrap=True, highlight=False)
    if view.status in (Status.CANCELLED, Status.INTERRUPTED):
        where = f"at step {view.last_commit.step}" if view.last_commit else "at its start"
        click.echo(f"the run stands {where}; go on with: ftjob launch --run {view.run_id}", err=True)
    elif not view.status.is_over:
        click.echo(f"the run goes on; see it with: ftjob status {view.run_id}", err=True)


def cancel_run(store: Store, run_id: str, backend: Backend) -> RunView:
    """Stop a run and wait for it; the run as it stands then. What does not run is left as it is.

    Raises:
        RunUnknown: there is no such run.
        FtjobError: it did not stop in time.
    """
    record = read_run(store, run_id)
    if backend.cancel(record.run_id):
        click.echo("stopping: the job saves its work first", err=True)
    else:
        click.echo("nothing of it runs here", err=True)
        return RunReader(store, run_id, backend).poll(datetime.now(UTC)).view
    every = LOCAL_SECONDS if store.uri.startswith("file:") else REMOTE_SECONDS
    return wait_until_stopped(RunReader(store, run_id, backend), every=every, patience=CANCEL_PATIENCE_SECONDS)


def left_behind(here: Here, view: RunView) -> Left | None:
    """What still costs money of a run that is over; None while it goes on, and where nobody can be asked."""
    if not view.status.is_over:
        return None
    store = here.store(view.run_id, view.bucket)
    try:
        return left_of(here.backend_of(view.run_id, store), store, view.run_id)
    except BadInput:  # a run of that id that this machine launched into another bucket
        return None


def receipt_of_run(here: Here, run_id: str, bucket: str | None) -> Receipt:
    """What a run has cost until now. Raises RunUnknown."""
    store = here.store(run_id, bucket)
    return RunReader(store, run_id, here.who_describes(run_id, store)).receipt(datetime.now(UTC))


def log_lines(here: Here, run_id: str, bucket: str | None, *, follow: bool) -> Iterator[str]:
    """What the job said, by its backend, or, where that cannot be asked, what its records tell.

    Raises:
        RunUnknown: there is no such run.
    """
    store = here.store(run_id, bucket)
    try:
        yield from here.backend_of(run_id, store).logs(run_id, follow=follow)
    except FtjobError as error:
        # Asked first: a run that is nowhere must be told as that.
        poll = RunReader(store, run_id, Elsewhere(error.message)).poll(datetime.now(UTC))
        click.echo(f"{error.message}; what follows is what its records in {store.uri} tell", err=True)
        for attempt, line in sorted(poll.news, key=lambda found: found[1].at):
            yield line.model_copy(update={"attempt": attempt}).model_dump_json()


def fetch_run(store: Store, run_id: str, folder: Path) -> Fetched:
    """Bring a run's adapter into a folder, with a progress bar in a terminal. Raises as `launch.fetch.fetch`."""
    console = Console(stderr=True)
    size = sum(digest.size for digest in read_adapter(store, run_id).files.values())
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"fetching {run_id}", total=size)
        return fetch(store, run_id, folder, lambda count: bar.advance(task, count))


def view_run(here: Here, run_id: str | None, bucket: str | None) -> RunView:
    """The run as it is; without an id the one that was created last.

    Raises:
        RunUnknown: there is no such run, or none at all.
    """
    if run_id is None:
        views = views_of_buckets(here, bucket)
        if not views:
            where = ", ".join(store.uri for store in here.stores(bucket))
            raise RunUnknown(f"there is no run in {where}", hint="start one: ftjob launch RECIPE")
        run_id, bucket = views[0].run_id, views[0].bucket
    store = here.store(run_id, bucket)
    return RunReader(store, run_id, here.who_describes(run_id, store)).poll(datetime.now(UTC)).view


def views_of_buckets(here: Here, bucket: str | None) -> list[RunView]:
    """Every run, newest first, without what only its metrics tell. What cannot be read is named on stderr.

    Raises:
        StorageError: the only bucket asked for cannot be read.
    """
    now = datetime.now(UTC)
    stores, views = here.stores(bucket), []
    for store in stores:
        try:
            for run_id in list(list_runs(store)):
                reader = RunReader(store, run_id, here.who_describes(run_id, store), metrics=False)
                views.append(reader.poll(now).view)
        except StorageError as error:
            if len(stores) == 1:
                raise
            click.echo(f"cannot look into {store.uri}: {error.message}", err=True)
    return sorted(views, key=lambda view: view.created_at or now, reverse=True)


def chaos_run(here: Here, recipe: Path, *, kills: int, seed: int, keep: bool) -> Chaos:
    """Run a recipe untouched and under kills, on this machine; what was found.

    Raises:
        FtjobError: the recipe cannot be run, or one of the runs did not succeed. Both are kept then.
    """
    resolved = read(recipe, here, None)
    folder = here.settings.home / "chaos" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    found = run_chaos(
        resolved,
        kills=kills,
        seed=seed,
        folder=folder,
        threads=here.settings.threads,
        say=lambda text: click.echo(text, err=True),
    )
    if found.certificate.clean and not keep:
        shutil.rmtree(folder, ignore_errors=True)
        return found.model_copy(update={"folder": None})
    return found


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, as editors want it."""
    schema = Recipe.model_json_schema()
    # A recipe may name its schema, and a closed object would refuse that key.
    schema["properties"] = {"$schema": {"type": "string"}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ftjob recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }
