"""The backend that runs jobs on this machine, each under a supervisor of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import Final

from job.contract.environ import PREFIX, JobEnviron
from job.contract.errors import BadInput, FtjobError, RunUnknown
from job.contract.layout import Uri
from job.contract.outcome import Outcome, outcome_of_exit
from job.contract.records import RunRecord
from job.contract.status import BackendState
from job.contract.submission import Offer, Way
from launch.backend import Described, Shopping
from launch.home import RunFolder, read_model, write_model
from launch.plan import LOCAL, Place, Plan, check_priced
from launch.process import ProcessId, is_alive, is_locked, send
from launch.restart import RestartPolicy
from launch.supervisor import READY, LocalState, Order

# -P: a job.py in the folder that somebody stands in must not be taken for the job.
JOB_COMMAND: Final = (sys.executable, "-P", "-m", "job")
STACK: Final = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets")
HEARTBEAT_SECONDS: Final = 2.0
"""Somebody watches, and a heartbeat into a folder costs next to nothing."""
KILL_MARGIN_SECONDS: Final = 5.0
"""Added to the job's grace before SIGKILL: the job plans to be done within its grace, to the second."""
_FOLLOW_SECONDS: Final = 0.2
_SETTLE_SECONDS: Final = 0.5


@dataclass(frozen=True)
class Processes:
    """Who works on a run now; None for whoever does not live."""

    supervisor: ProcessId | None
    job: ProcessId | None


class LocalBackend:
    """Runs on this machine.

    Args:
        home: FTJOB_HOME.
        job_command: what is run as the job, with JobEnviron's variables in its environment.
        policy: pauses between restarts; `submit` replaces its bound.
        kill_margin_seconds: what a cancelled job gets beyond its grace before it is killed.
        stack: the modules that the job needs.
        threads: of the CPU, for the job.
        usd_per_hour: what this machine costs, if anybody says.
    """

    name: Final = LOCAL

    def __init__(
        self,
        home: Path,
        *,
        job_command: Sequence[str] = JOB_COMMAND,
        policy: RestartPolicy | None = None,
        kill_margin_seconds: float = KILL_MARGIN_SECONDS,
        stack: Sequence[str] = STACK,
        threads: int = 1,
        usd_per_hour: float | None = None,
    ) -> None:
        self._usd_per_hour = usd_per_hour
        self._home = home
        self._job_command = tuple(job_command)
        self._policy = policy or RestartPolicy()
        self._kill_margin = kill_margin_seconds
        self._stack = tuple(stack)
        self._threads = threads

    def check_ready(self) -> None:
        missing = [name for name in self._stack if find_spec(name) is None]
        if missing:
            raise BadInput(
                f"training on this machine needs {', '.join(missing)}", hint="install them: pip install 'ftjob[job]'"
            )

    def environ(self, run: RunRecord, *, bucket: Uri, git_commit: str | None) -> JobEnviron:
        return JobEnviron(
            run_id=run.run_id,
            bucket=bucket,
            workdir=str(self._folder(run.run_id).work),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            threads=self._threads,
            git_commit=git_commit,
            infra={"infra": self.name},
        )

    def plan(
        self, run: RunRecord, *, bucket: Uri, shopping: Shopping, max_restarts: int, base_bytes: int | None = None
    ) -> Plan:
        if shopping.gpu is not None:
            raise BadInput(
                "--gpu is for clouds, and this machine has what it has", hint="leave --gpu or --infra local out"
            )
        offer = Offer(cloud=LOCAL, gpu="this machine", gpus=1, spot=False, usd_per_hour=self._usd_per_hour)
        check_priced([offer], shopping.budget)
        return Plan.of(
            run,
            bucket=bucket,
            backend=self.name,
            max_restarts=max_restarts,
            places=(Place(offer=offer, way=Way.HOST),),
            budget=shopping.budget,
        )

    def submit(self, plan: Plan, environ: JobEnviron, secrets: Mapping[str, str]) -> None:
        run_id, folder = plan.run_id, self._folder(plan.run_id)
        if is_locked(folder.lock):
            raise self._still_running(run_id)
        try:
            folder.work.mkdir(parents=True, exist_ok=True)
            answer = self._start_supervisor(folder, run_id, environ, plan.max_restarts)
        except OSError as error:
            raise FtjobError(f"run {run_id} could not be started: {error}") from error
        if answer == b"locked":
            raise self._still_running(run_id)
        if answer != READY:
            raise FtjobError(
                f"run {run_id} could not be started: its supervisor died",
                hint=f"read {folder.log}, then `ftjob launch --run {run_id}`",
            )

    def describe(self, run_id: str) -> Described:
        folder = self._folder(run_id)
        if not folder.path.exists():
            return Described(BackendState.UNREACHABLE, "not started from this machine")
        alive, state = self._look(folder)
        if state is None:
            return Described(BackendState.QUEUED if alive else BackendState.GONE, "" if alive else "never started")
        return _living(state) if alive else _ended(state)

    def cancel(self, run_id: str) -> bool:
        folder = self._folder(run_id)
        state = read_model(folder.state, LocalState)
        if state is None:
            return False
        if send(state.supervisor, Signals.SIGTERM):
            return True
        # The supervisor was killed. Its job may go on alone; nobody else writes the state now.
        asked = send(state.job, Signals.SIGTERM)
        if asked:
            write_model(folder.state, state.model_copy(update={"cancelled": True}))
        return asked

    def logs(self, run_id: str, *, follow: bool) -> Iterator[str]:
        folder = self._folder(run_id)
        if not folder.log.exists():
            raise RunUnknown(
                f"this machine has no log of run {run_id}", hint="logs of local runs are on the machine that ran them"
            )
        return _tail(folder, follow=follow)

    def left(self, run_id: str) -> tuple[str, ...]:
        found = self.processes(run_id)
        return tuple(f"pid {process.pid}" for process in (found.supervisor, found.job) if process is not None)

    def processes(self, run_id: str) -> Processes:
        """The pids behind a run, for whoever wants to kill them."""
        state = read_model(self._folder(run_id).state, LocalState)
        if state is None:
            return Processes(None, None)
        return Processes(
            state.supervisor if is_alive(state.supervisor) else None, state.job if is_alive(state.job) else None
        )

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder.of(self._home, run_id)

    def _look(self, folder: RunFolder) -> tuple[bool, LocalState | None]:
        """Whether somebody lives, and the state that goes with it.

        While a supervisor comes or goes the two disagree for some milliseconds, so it is looked at again.
        """
        until = time.monotonic() + _SETTLE_SECONDS
        while True:
            alive, state = is_locked(folder.lock), read_model(folder.state, LocalState)
            if not alive or (state is not None and state.phase != "ended" and _somebody(state)):
                return alive, state
            if time.monotonic() > until:
                return alive, state
            time.sleep(0.02)

    def _start_supervisor(self, folder: RunFolder, run_id: str, environ: JobEnviron, max_restarts: int) -> bytes:
        """Its word: READY, b"locked", or nothing when it died."""
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb") as answer:
            try:
                order = Order(
                    run_id=run_id,
                    folder=folder.path,
                    job_command=self._job_command,
                    policy=self._policy.model_copy(update={"max_restarts": max_restarts}),
                    patience_seconds=environ.grace_seconds + self._kill_margin,
                    ready_fd=writer,
                )
                with folder.log.open("ab") as log:
                    subprocess.run(
                        [sys.executable, "-P", "-m", "launch.supervisor", order.model_dump_json()],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=job_environment(environ),
                        cwd=folder.work,
                        start_new_session=True,
                        pass_fds=(writer,),
                        check=False,
                    )
            finally:
                os.close(writer)
            return answer.read()

    def _still_running(self, run_id: str) -> BadInput:
        processes = self.processes(run_id)
        process = processes.supervisor or processes.job
        where = f", pid {process.pid}" if process else ""
        return BadInput(
            f"run {run_id} is still running{where}", hint=f"watch it with `ftjob status {run_id}`, or `ftjob cancel` it"
        )


def job_environment(environ: JobEnviron) -> dict[str, str]:
    """This process's environment with the job's variables; leftovers of another run's are removed."""
    ours = {PREFIX + field.upper() for field in JobEnviron.model_fields}
    return {name: value for name, value in os.environ.items() if name not in ours} | environ.variables()


def _somebody(state: LocalState) -> bool:
    return is_alive(state.supervisor) or is_alive(state.job)


def _living(state: LocalState) -> Described:
    if not is_alive(state.supervisor):
        pid = f" (pid {state.job.pid})" if state.job else ""
        return Described(BackendState.ALIVE, f"its supervisor was killed; the job{pid} goes on alone, unrestarted")
    match state.phase:
        case "starting":
            return Described(BackendState.QUEUED)
        case "pausing":
            return Described(BackendState.RECOVERING, _ending(state.exit_code), state.exit_code)
        case _:
            return Described(BackendState.ALIVE, exit_code=state.exit_code)


def _ended(state: LocalState) -> Described:
    if state.cancelled:
        return Described(BackendState.CANCELLED, exit_code=state.exit_code)
    if state.phase != "ended":
        return Described(BackendState.GONE, "its processes were killed", state.exit_code)
    failed = state.exit_code is not None and outcome_of_exit(state.exit_code) in (Outcome.FAILED, Outcome.BAD_INPUT)
    detail = "; ".join(part for part in (state.detail, _ending(state.exit_code)) if part)
    return Described(BackendState.FAILED if failed else BackendState.GONE, detail, state.exit_code)


def _ending(code: int | None) -> str:
    if code is None:
        return ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the job was killed by {Signals(-code).name}"
    return f"the job ended with exit code {code}"


def _tail(folder: RunFolder, *, follow: bool) -> Iterator[str]:
    with folder.log.open("r", encoding="utf-8", errors="replace") as file:
        pending = ""
        while True:
            # Asked before reading: what is written until the end of the run is read after it.
            alive = follow and is_locked(folder.lock)
            while line := file.readline():
                pending += line
                if pending.endswith("\n"):
                    yield pending.rstrip("\n")
                    pending = ""
            if not alive:
                break
            time.sleep(_FOLLOW_SECONDS)
        if pending:
            yield pending
