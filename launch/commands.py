"""What commands do, apart from parsing and printing answers."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from job.contract.errors import BadInput, RunUnknown, StorageError
from job.contract.recipe import Recipe, read_recipe
from job.contract.records import RunRecord
from job.contract.status import BackendState, Status
from job.storage import Store, open_store
from launch import render
from launch.backend import Backend, Described
from launch.begin import check_bucket, create_run, new_record, new_run_id, take_up
from launch.chaos import Chaos, run_chaos
from launch.fetch import Fetched, fetch, read_adapter
from launch.follow import LOCAL_SECONDS, REMOTE_SECONDS, Interrupts, follow, wait_until_stopped
from launch.home import recall, remembered_runs
from launch.local import LocalBackend
from launch.resolve import Resolved, commit_of, resolve
from launch.runs import Describes, RunReader, list_runs, read_run
from launch.settings import Settings
from launch.view import Facts, RunView, exit_code_of, view_of

CANCEL_PATIENCE_SECONDS: Final = 60.0
"""For a cancelled job to save and end: twice what the local backend grants it."""


def open_backend(settings: Settings, name: str) -> Backend:
    """The backend of that name. Raises BadInput when there is none."""
    if name != LocalBackend.name:
        raise BadInput(f"there is no backend {name!r}", hint=f"--infra is one of: {LocalBackend.name}")
    return LocalBackend(settings.home, threads=settings.threads)


@dataclass(frozen=True)
class Here:
    """This person on this machine: settings, and how backends are made."""

    settings: Settings
    backend: Callable[[Settings, str], Backend] = open_backend

    def store(self, run_id: str, bucket: str | None) -> Store:
        """The bucket named, else the one that this machine launched the run into, else the person's own."""
        remembered = recall(self.settings.home, run_id)
        return open_store(bucket or (remembered.bucket if remembered else self.settings.bucket))

    def stores(self, bucket: str | None) -> list[Store]:
        """The bucket named, else every one that this person's runs land in."""
        if bucket:
            return [open_store(bucket)]
        used = {remembered.bucket for remembered in remembered_runs(self.settings.home)}
        return [open_store(uri) for uri in sorted({self.settings.bucket, *used})]

    def backend_of(self, run_id: str, store: Store | None = None) -> Backend:
        """The backend that this machine gave the run to; the local one, which knows nothing of it, otherwise.

        Raises:
            BadInput: this machine launched another run of that id, into another bucket than `store`.
        """
        remembered = recall(self.settings.home, run_id)
        if remembered is None:
            return self.backend(self.settings, LocalBackend.name)
        if store is not None:
            check_bucket(remembered, store)
        return self.backend(self.settings, remembered.backend)

    def who_describes(self, run_id: str, store: Store) -> Describes:
        """Who can say how a run is; for another machine's run of an id that is used here too, nobody."""
        try:
            return self.backend_of(run_id, store)
        except BadInput as error:
            return Elsewhere(error.message)


@dataclass(frozen=True)
class Elsewhere:
    """Says of a run that it cannot be asked, and why."""

    why: str

    def describe(self, run_id: str) -> Described:
        return Described(BackendState.UNREACHABLE, self.why)


def launch_run(
    here: Here,
    recipe: Path | None,
    *,
    name: str | None,
    run_id: str | None,
    infra: str,
    bucket: str | None,
    detach: bool,
    max_restarts: int,
    as_json: bool,
) -> int:
    """Launch `recipe`, or take up `run_id`, and stay with the run; the exit code.

    Raises:
        FtjobError: it could not be launched.
    """
    backend = here.backend(here.settings, infra)
    resolved = _read(recipe, here.settings, bucket) if recipe is not None else None
    backend.check_ready()
    with Interrupts() as interrupts:
        if run_id is not None:
            store = here.store(run_id, bucket)
            record = take_up(here.settings.home, store, run_id, backend, given=resolved, recipe_name=str(recipe))
            click.echo(f"goes on with run {run_id} on {backend.name}", err=True)
        elif recipe is not None and resolved is not None:
            now = datetime.now(UTC)
            new_id = name or new_run_id(recipe.stem, now=now, token=secrets.token_hex(2))
            record, store = new_record(resolved, run_id=new_id, now=now), open_store(resolved.bucket)
            click.echo(render.plan_text(resolved, run_id=new_id, infra=backend.name), err=True)
            create_run(here.settings.home, store, record, backend=backend.name)
        else:
            raise BadInput("nothing to launch", hint="name a RECIPE, or a run with --run RUN")
        commit = commit_of(recipe.absolute().parent) if recipe is not None else None
        backend.submit(record, backend.environ(record, bucket=store.uri, git_commit=commit), max_restarts=max_restarts)
        if detach:
            return _leave(store, record, as_json=as_json)
        view = _stay(store, record, backend, interrupts)
    _answer(view, as_json=as_json)
    return exit_code_of(view)


def _read(path: Path, settings: Settings, bucket: str | None) -> Resolved:
    recipe = read_recipe(path)
    if bucket is not None:  # what is said on the command line comes before what is written
        recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"bucket": bucket})})
    return resolve(recipe, folder=path.absolute().parent, bucket=settings.bucket)


def _leave(store: Store, record: RunRecord, *, as_json: bool) -> int:
    view = view_of(Facts(record), Described(BackendState.QUEUED), bucket=store.uri, now=datetime.now(UTC))
    if as_json:
        click.echo(render.as_json(view))
    else:
        click.echo(record.run_id)
        click.echo(f"watch it with `ftjob status {record.run_id}` or `ftjob logs {record.run_id} --follow`", err=True)
    return 0


def _stay(store: Store, record: RunRecord, backend: Backend, interrupts: Interrupts) -> RunView:
    console = Console(stderr=True)
    reader = RunReader(store, record.run_id, backend)
    every = LOCAL_SECONDS if store.uri.startswith("file:") else REMOTE_SECONDS
    live = render.LiveDisplay(console) if console.is_terminal else None
    with live or nullcontext():
        return follow(reader, record.run_id, backend, live or render.PlainDisplay(console), interrupts, every=every)


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
    return wait_until_stopped(RunReader(store, run_id, backend), every=LOCAL_SECONDS, patience=CANCEL_PATIENCE_SECONDS)


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
    resolved = _read(recipe, here.settings, None)
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
