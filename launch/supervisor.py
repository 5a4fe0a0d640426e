"""Keeps the job of one local run going, as SkyPilot would: a process of its own that outlives launcher and terminal.

Started by launch.local, never by hand: `python -P -m launch.supervisor ORDER`, with the job's variables in the
environment. SIGTERM cancels the run: the job gets its grace to save, and is not started again.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict

from job import logs
from launch.home import RunFolder, write_model
from launch.process import ProcessId, identify, take_lock
from launch.restart import Past, RestartPolicy, Stop, decide

READY: Final = b"ready"
_LOOK_SECONDS: Final = 1.0


class Order(BaseModel):
    """What a supervisor is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    folder: Path
    job_command: tuple[str, ...]
    policy: RestartPolicy
    patience_seconds: float
    """From SIGTERM to SIGKILL when the run is cancelled."""
    ready_fd: int
    """Where to say READY, or why not."""


class LocalState(BaseModel):
    """state.json. Written by the supervisor alone while it lives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    supervisor: ProcessId
    job: ProcessId | None = None
    phase: Literal["starting", "running", "pausing", "ended"] = "starting"
    restarts: int = 0
    exit_code: int | None = None
    """Of the newest job that ended; negative for a signal."""
    cancelled: bool = False
    detail: str = ""


class _Bell:
    """Waits for a signal or a time, whichever is first. Handlers only ring; the loop acts."""

    def __init__(self) -> None:
        self.cancelled = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(os, "pipe2") else _pipe()

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._cancel)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # its default, "ignore", would not ring
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self, seconds: float) -> None:
        """Return at the next signal, or after `seconds`."""
        if select.select([self._reader], [], [], max(seconds, 0))[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 4096)

    def _cancel(self, *_: object) -> None:
        self.cancelled = True


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


class Supervisor:
    """Attempt after attempt, until one is final or the run is cancelled."""

    def __init__(self, order: Order, *, lock: int, bell: _Bell, log_file: int) -> None:
        own = identify(os.getpid())
        if own is None:
            raise AssertionError("a process that runs can be identified")
        self._order, self._lock, self._bell, self._log_file = order, lock, bell, log_file
        self._folder = RunFolder(order.folder)
        self._state = LocalState(run_id=order.run_id, supervisor=own)
        self._log: Any = logs.get_logger()
        self._note()

    def run(self) -> None:
        """Until the end. Errors of the machine (no such program, no memory for a process) end the run too."""
        past = Past()
        while not self._bell.cancelled:
            began = time.monotonic()
            try:
                code = self._attempt()
            except OSError as error:
                self._note(phase="ended", detail=f"the job could not be started: {error}")
                return
            decision = decide(self._order.policy, past, exit_code=code, lived_seconds=time.monotonic() - began)
            if self._bell.cancelled:
                break
            if isinstance(decision, Stop):
                self._log.info("supervisor.ended", exit_code=code, why=decision.why)
                self._note(phase="ended", detail=decision.why)
                return
            past = decision.past
            self._log.info("supervisor.restarting", exit_code=code, restart=past.restarts, pause=decision.pause)
            self._note(phase="pausing", restarts=past.restarts)
            self._pause(decision.pause)
        self._log.info("supervisor.cancelled")
        self._note(phase="ended", cancelled=True)

    def _attempt(self) -> int:
        """Run the job to its end; its exit code. Raises OSError when it cannot be started."""
        job = subprocess.Popen(
            self._order.job_command,
            stdin=subprocess.DEVNULL,
            # Straight to the file, not through us: a job that outlives its supervisor must not meet a dead pipe.
            stdout=self._log_file,
            stderr=self._log_file,
            # A folder that is ours: the folder the person stood in may be gone tomorrow.
            cwd=self._folder.work,
            # The job's own group, so that SIGKILL reaches what it started too.
            process_group=0,
            pass_fds=(self._lock,),
        )
        self._note(phase="running", job=identify(job.pid))
        self._log.info("supervisor.attempt_started", pid=job.pid)
        kill_at: float | None = None
        while not _has_ended(job):
            if self._bell.cancelled and kill_at is None:
                kill_at = time.monotonic() + self._order.patience_seconds
                self._log.info("supervisor.cancelling", pid=job.pid, patience_seconds=self._order.patience_seconds)
                job.terminate()
            if kill_at is not None and time.monotonic() >= kill_at:
                self._log.warning("supervisor.killing", pid=job.pid)
                _kill_group(job.pid)
            self._bell.wait(_LOOK_SECONDS)
        if job.returncode is None:
            # Workers that a killed job left behind would hold its memory and its device. Before the job is reaped:
            # until then its pid, which is its group's name, cannot be given to anybody else.
            _kill_group(job.pid)
        code = job.wait()
        self._note(job=None, exit_code=code)
        return code

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._bell.cancelled and (left := until - time.monotonic()) > 0:
            self._bell.wait(left)

    def _note(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        # A full disk must not end the run: the job copes with it, and so do readers of an older state.
        with contextlib.suppress(Exception):
            write_model(self._folder.state, self._state)


def _has_ended(job: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended. It is not reaped yet, where the system has a way to look without reaping."""
    if hasattr(os, "waitid"):
        return os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return job.poll() is not None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def main() -> None:
    """Detach, take the run's lock, report on `ready_fd`, and supervise."""
    order = Order.model_validate_json(sys.argv[1])
    if os.fork():
        os._exit(0)  # the launcher waits for us; its grandchild belongs to nobody, so nobody has to reap it
    folder = RunFolder(order.folder)
    lock = take_lock(folder.lock)
    if lock is None:
        os.write(order.ready_fd, b"locked")
        return
    folder.work.mkdir(parents=True, exist_ok=True)
    with folder.log.open("a", encoding="utf-8") as log, _Bell() as bell:
        logs.configure(log)
        logs.bind(run_id=order.run_id)
        supervisor = Supervisor(order, lock=lock, bell=bell, log_file=log.fileno())
        os.write(order.ready_fd, READY)
        os.close(order.ready_fd)
        supervisor.run()


if __name__ == "__main__":
    main()
