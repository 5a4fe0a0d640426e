"""Chaos: one recipe, run once untouched and once killed again and again; then the certificate that they are equal.

Everything happens in a folder of its own, under real conditions: the real job, the real supervisor, real signals.
Each attempt of the second run is killed once, at a moment drawn by the seed, until all kills are spent.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from signal import Signals
from typing import Any, Final

from job.contract.errors import FtjobError
from job.contract.recipe import Recipe
from job.contract.records import Part
from job.contract.status import Status
from job.storage import open_store
from launch.begin import create_run, new_record
from launch.certificate import Certificate, Evidence, certify
from launch.fetch import read_adapter
from launch.follow import BUSY, wait_until_stopped
from launch.home import RunFolder
from launch.local import JOB_COMMAND, LocalBackend
from launch.plan import Plan
from launch.process import send
from launch.resolve import Resolved
from launch.restart import RestartPolicy
from launch.runs import RunReader

UNTOUCHED: Final = "untouched"
KILLED: Final = "killed"
SAVE_EVERY_MINUTES: Final = 1 / 60
"""So that a short run has checkpoints between its epochs; how often is saved decides no weight."""
HEARTBEAT_SECONDS: Final = 0.1
PATIENCE_SECONDS: Final = 1800.0
"""For one attempt to come to its next moment."""

# A moment is a line of the job's log; the name is what the certificate calls it.
MOMENTS: Final = {
    "load": "loading the model",
    "restore": "restoring",
    "step": "step",
    "save": "checkpoint.uploading",
    "commit": "checkpoint.committed",
    "evaluate": "evaluation.started",
}
LAST_MOMENT: Final = "publish"
_LOADING: Final = 4.0
_MOMENT: Final = 0.05
"""Seconds that a kill may come after its line, at most."""
_LOOK_SECONDS: Final = 0.005
_ASK_SECONDS: Final = 0.5


class Kill(Part):
    """One kill as it happened."""

    attempt: int
    moment: str
    signal: str
    delay_seconds: float


class Chaos(Part):
    """What chaos found."""

    kills: tuple[Kill, ...]
    attempts: int
    steps: int
    steps_repeated: int
    seconds_untouched: float
    seconds_killed: float
    certificate: Certificate
    planned: int
    folder: str | None
    """Both runs, where they were kept."""


@dataclass(frozen=True)
class Planned:
    """One kill as it is meant: at a moment, or at the publishing if that comes first."""

    moment: str
    signal: Signals
    delay_seconds: float


def plan_kills(count: int, *, seed: int) -> list[Planned]:
    """`count` kills spread evenly over the moments, in random order; those of the publishing last.

    At the loading a kill may come much later than its line, since loading is the longest part of a short run.
    """
    dice = random.Random(seed)
    at_the_end = max(1, count // (len(MOMENTS) + 1)) if count else 0
    names = list(MOMENTS)
    moments = [names[index % len(names)] for index in range(count - at_the_end)]
    dice.shuffle(moments)
    return [
        Planned(
            moment=moment,
            signal=dice.choice([Signals.SIGKILL, Signals.SIGTERM]),
            delay_seconds=round(dice.uniform(0, _LOADING if moment == "load" else _MOMENT), 3),
        )
        for moment in [*moments, *[LAST_MOMENT] * at_the_end]
    ]


def run_chaos(
    resolved: Resolved,
    *,
    kills: int,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    threads: int = 1,
    job_command: Sequence[str] = JOB_COMMAND,
) -> Chaos:
    """Run the recipe twice and compare.

    Args:
        folder: a new folder for both runs; what was left in it stays, for whoever wants to look.
        say: told what happens, a line at a time.
        threads: of the CPU, for the job.
        job_command: what is run as the job.

    Raises:
        FtjobError: one of the runs did not succeed.
    """
    folder.mkdir(parents=True)
    bucket = (folder / "bucket").absolute().as_uri()
    recipe = with_frequent_saves(resolved.recipe, bucket=bucket)
    mine = replace(resolved, recipe=recipe)
    no_pause = RestartPolicy(first_pause_seconds=0, longest_pause_seconds=0)
    backend = LocalBackend(folder, job_command=job_command, policy=no_pause, threads=threads)
    backend.check_ready()
    say("untouched: running")
    started = time.monotonic()
    untouched = _run(mine, UNTOUCHED, folder, backend, [], say)
    between = time.monotonic()
    say(f"untouched: done in {between - started:.0f} s; now the same with {kills} kills")
    killed = _run(mine, KILLED, folder, backend, plan_kills(kills, seed=seed), say)
    return Chaos(
        kills=tuple(killed.kills),
        attempts=killed.attempts,
        steps=killed.steps,
        steps_repeated=killed.steps_repeated,
        seconds_untouched=round(between - started, 1),
        seconds_killed=round(time.monotonic() - between, 1),
        certificate=certify(untouched.evidence, killed.evidence),
        planned=kills,
        folder=str(folder),
    )


def with_frequent_saves(recipe: Recipe, *, bucket: str) -> Recipe:
    """The same run, saved often, into another bucket. Its digest is the same."""
    checkpoints = recipe.checkpoints.model_copy(update={"minutes": SAVE_EVERY_MINUTES})
    output = recipe.output.model_copy(update={"bucket": bucket})
    return recipe.model_copy(update={"checkpoints": checkpoints, "output": output})


@dataclass(frozen=True)
class _Finished:
    evidence: Evidence
    kills: list[Kill]
    attempts: int
    steps: int
    steps_repeated: int


def _run(
    resolved: Resolved, run_id: str, home: Path, backend: LocalBackend, plan: list[Planned], say: Callable[[str], None]
) -> _Finished:
    store = open_store(resolved.bucket)
    record = new_record(resolved, run_id=run_id, now=datetime.now(UTC))
    create_run(home, store, record, backend=backend.name)
    environ = backend.environ(record, bucket=store.uri, git_commit=None)
    # What a killed attempt did not flush is not on record, and steps it repeats could not be compared.
    environ = environ.model_copy(update={"heartbeat_seconds": HEARTBEAT_SECONDS})
    order = Plan.of(record, bucket=store.uri, backend=backend.name, max_restarts=2 * len(plan) + 5)
    backend.submit(order, environ, {})
    try:
        kills = list(_kill_as_planned(backend, home, run_id, plan, say))
        wait_until_stopped(RunReader(store, run_id, backend), every=0.25, patience=PATIENCE_SECONDS)
    except BaseException:
        backend.cancel(run_id)  # whatever interrupts chaos, nothing of it goes on
        raise
    poll = RunReader(store, run_id, backend).poll(datetime.now(UTC))  # a new reader: every line is news to it
    view = poll.view
    if view.status is not Status.SUCCEEDED:
        raise FtjobError(
            f"the {run_id} run ended as {view.status}: {view.message or poll.described.detail}",
            hint=f"its log: {RunFolder.of(home, run_id).log}",
        )
    return _Finished(
        evidence=Evidence(poll.news, read_adapter(store, run_id).files),
        kills=kills,
        attempts=len(view.attempts),
        steps=view.step or 0,
        steps_repeated=sum(attempt.steps_repeated for attempt in view.attempts),
    )


def _kill_as_planned(
    backend: LocalBackend, home: Path, run_id: str, plan: list[Planned], say: Callable[[str], None]
) -> Iterator[Kill]:
    """Kill each attempt once, until the plan is empty or the run is over."""
    left = list(plan)
    attempt = 0
    total_steps = None
    armed: Planned | None = None
    for event in _events(backend, home, run_id):
        what = event.get("phase") if event.get("event") == "phase" else event.get("event")
        if what == "supervisor.attempt_started":
            attempt += 1
            armed = left[0] if left else None
        elif what == "training.started":
            total_steps = event.get("total_steps")
        publishing = what == "publishing"
        if armed is None or not (publishing or what == MOMENTS.get(armed.moment)):
            continue
        # With everything trained a SIGTERM stops nothing any more, and a moment later there is nothing left to kill.
        ending = publishing or event.get("step", 0) == total_steps
        how = Signals.SIGKILL if ending else armed.signal
        delay = 0.0 if ending else armed.delay_seconds
        time.sleep(delay)
        if send(backend.processes(run_id).job, how):
            left.pop(0)
            moment = LAST_MOMENT if publishing else armed.moment
            say(f"attempt {attempt}: {how.name} at {moment}, {len(left)} kills left")
            yield Kill(attempt=attempt, moment=moment, signal=how.name, delay_seconds=delay)
        armed = None


def _events(backend: LocalBackend, home: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """The events of a run's log as they come, until nothing of the run lives. Closer than `backend.logs` follows."""
    with RunFolder.of(home, run_id).log.open("rb") as log:
        pending = b""
        looked = 0.0
        alive = True
        while True:
            while line := log.readline():
                pending += line
                if pending.endswith(b"\n"):
                    with suppress(ValueError):  # libraries write lines of their own
                        event = json.loads(pending)
                        if isinstance(event, dict):
                            yield event
                    pending = b""
            if not alive:
                return
            if time.monotonic() - looked > _ASK_SECONDS:
                alive = backend.describe(run_id).state in BUSY
                looked = time.monotonic()
            time.sleep(_LOOK_SECONDS)
