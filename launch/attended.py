"""A launch from its plan to its end: show, ask, start, stay with the run, and change machines for a deadline."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime

import click
from rich.console import Console

from job.contract.errors import BadInput, FtjobError
from job.contract.records import RunRecord
from job.contract.status import BackendState, Status
from job.storage import Store
from launch import render, render_plan
from launch.answer import print_answer
from launch.backend import Backend, Described
from launch.cloud import CloudBackend
from launch.deadline import Choice, check_deadline
from launch.displays import LiveDisplay, PlainDisplay
from launch.follow import Interrupts, follow, seconds_between_looks
from launch.here import Here
from launch.launching import Prepared, prepare, start
from launch.plan import Plan
from launch.prices import Policy
from launch.runs import Poll, RunReader
from launch.stopping import stop_run
from launch.switching import Course, course_of
from launch.task import as_yaml
from launch.view import Facts, RunView, exit_code_of, view_of
from launch.wish import Wish


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
            return _leave(prepared, as_json=as_json)
        view = stay(prepared.store, prepared.record, prepared.backend, interrupts, course=course)
        while course is not None and course.wanted is not None and not interrupts.count and _goes_on(view):
            wish = replace(wish, run_id=view.run_id, name=None, policy=course.wanted)
            prepared = prepare(here, wish, for_launch=True)
            course.policy, course.wanted = course.wanted, None
            start(here, prepared)
            view = stay(prepared.store, prepared.record, prepared.backend, interrupts, course=course)
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
    print_answer(render.as_json(prepared.plan) if as_json else render_plan.plan_text(prepared.plan))
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


def _leave(prepared: Prepared, *, as_json: bool) -> int:
    record, store = prepared.record, prepared.store
    view = view_of(Facts(record), Described(BackendState.QUEUED), bucket=store.uri, now=datetime.now(UTC))
    view = view.model_copy(update={"budget": prepared.plan.budget})  # what was said now, and not in the recipe
    if as_json:
        click.echo(render.as_json(view))
    else:
        click.echo(record.run_id)
        click.echo(f"watch it with `ftjob status {record.run_id}` or `ftjob logs {record.run_id} --follow`", err=True)
    return 0


def stay(
    store: Store,
    record: RunRecord,
    backend: Backend,
    interrupts: Interrupts,
    *,
    cancels: bool = True,
    course: Course | None = None,
) -> RunView:
    """Show a run until it is over, or until an interrupt; the run as it is then.

    Args:
        cancels: whether an interrupt stops the run, or only the watching.
        course: to a deadline; the run is stopped where it has to change machines.
    """

    def leave_now(poll: Poll) -> str:
        if course is None or not course.look(poll, datetime.now(UTC)):
            return ""
        return f"changes to {course.wanted}: {course.reason}"

    console = Console(stderr=True)
    reader = RunReader(store, record.run_id, backend)
    live = LiveDisplay(console) if console.is_terminal else None
    with live or nullcontext():
        display = live or PlainDisplay(console)

        def stop() -> bool:
            try:
                stop_run(store, record.run_id, backend, display.say)
            except FtjobError as error:
                display.say(f"the run could not be stopped: {error.message}")
                return False
            return True

        return follow(
            reader, stop, display, interrupts, every=seconds_between_looks(store), cancels=cancels, leave_now=leave_now
        )


def _answer(view: RunView, *, as_json: bool) -> None:
    print_answer(render.as_json(view) if as_json else render.summary_text(view))
    if view.status in (Status.CANCELLED, Status.INTERRUPTED):
        where = f"at step {view.last_commit.step}" if view.last_commit else "at its start"
        click.echo(f"the run stands {where}; go on with: ftjob launch --run {view.run_id}", err=True)
    elif not view.status.is_over:
        click.echo(f"it was asked to stop, and is left to that; see it with: ftjob status {view.run_id}", err=True)
