"""What commands do, apart from parsing and printing answers."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from job.contract.errors import BadInput, Damaged, FtjobError, RunUnknown, StorageError
from job.contract.receipt import Receipt
from job.contract.recipe import Recipe
from job.storage import Store
from launch.attended import stay
from launch.backend import Backend
from launch.chaos import Chaos, run_chaos
from launch.checking import Checked, check_recipe
from launch.fetch import Fetched, fetch, read_adapter
from launch.follow import Interrupts, seconds_between_looks, wait_until_stopped
from launch.here import Elsewhere, Here
from launch.hub import Hub
from launch.launching import read
from launch.left import left_of
from launch.recipe_file import read_recipe
from launch.runs import RunReader, list_runs, read_run
from launch.stopping import stop_run
from launch.transfer import transfer_bar
from launch.view import Left, RunView

CANCEL_PATIENCE_SECONDS: Final = 180.0
"""For a cancelled job to save and end, and for its machine to be given back."""


def watch_run(here: Here, run_id: str, bucket: str | None) -> RunView:
    """Watch a run until it is over, or until an interrupt, which touches nothing; the run as it is then.

    Raises:
        RunUnknown: there is no such run.
    """
    store = here.store(run_id, bucket)
    with Interrupts() as interrupts:
        return stay(store, read_run(store, run_id), here.backend_of(run_id, store), interrupts, cancels=False)


def cancel_run(store: Store, run_id: str, backend: Backend) -> RunView:
    """Stop a run and wait for it; the run as it stands then. What does not run is left as it is.

    Raises:
        RunUnknown: there is no such run.
        FtjobError: it did not stop in time.
    """
    record = read_run(store, run_id)
    if stop_run(store, record.run_id, backend, lambda text: click.echo(text, err=True)):
        click.echo("stopping: the job saves its work first", err=True)
    else:
        click.echo("nothing of it runs here", err=True)
        return RunReader(store, run_id, backend).poll(datetime.now(UTC)).view
    every = seconds_between_looks(store)
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


def check_of(here: Here, recipe: Path, *, shown: int, show: int) -> tuple[Recipe, Checked]:
    """A recipe as it is written, and its check.

    Raises:
        BadInput: the recipe is none, or its dataset cannot be read at all.
    """
    read = read_recipe(recipe)
    found = check_recipe(
        read,
        folder=recipe.absolute().parent,
        hub=Hub.of(os.environ),
        variables=os.environ,
        cache=here.settings.cache,
        shown=shown,
        show=show,
    )
    return read, found


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
    size = sum(digest.size for digest in read_adapter(store, run_id).files.values())
    with transfer_bar(f"fetching {run_id}", size) as progress:
        return fetch(store, run_id, folder, progress)


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
                try:
                    reader = RunReader(store, run_id, here.who_describes(run_id, store), metrics=False)
                    views.append(reader.poll(now).view)
                except (Damaged, RunUnknown) as error:  # one that cannot be read, or was just removed, hides no other
                    click.echo(f"run {run_id} cannot be listed: {error.message}", err=True)
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
