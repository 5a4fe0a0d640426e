"""Which processes are ours, and whether they live: a pid alone does not tell, because pids are used again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from pathlib import Path
from signal import Signals
from typing import Final

from pydantic import BaseModel, ConfigDict


class ProcessId(BaseModel):
    """A process, for good: its pid and when it started (in the words of the system, only ever compared)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started: str


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none, or only what is left of a dead one."""
    started = _started_linux(pid) if _PROC.exists() else _started_ps(pid)
    return None if started is None else ProcessId(pid=pid, started=started)


def is_alive(process: ProcessId | None) -> bool:
    """Whether this very process still runs."""
    return process is not None and identify(process.pid) == process


def send(process: ProcessId | None, signal: Signals) -> bool:
    """Signal this very process. False when it is gone."""
    if process is None or not is_alive(process):
        return False
    try:
        os.kill(process.pid, signal)
    except ProcessLookupError:
        return False
    return True


_PROC: Final = Path("/proc/self/stat")


def _started_linux(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    # The name in parentheses may hold anything; the fields behind the last ")" are state (3) ... starttime (22).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZXx" else f"{boot}:{fields[19]}"


def _started_ps(pid: int) -> str | None:
    shown = subprocess.run(
        [  # noqa: S607 - ps is in POSIX, and PATH is the person's own
            "ps",
            "-o",
            "stat=,lstart=",
            "-p",
            str(pid),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


# ------------------------------------------------------------------------------------------------- the run's lock
#
# flock(2) belongs to the open file, which children inherit: a job keeps the lock when its supervisor is killed, and
# the kernel lets go of it when the last of them dies, however it dies. So there is no moment without a truth.


def take_lock(path: Path, *, patience_seconds: float = 1.0) -> int | None:
    """The descriptor that holds the lock; None when somebody else does.

    Waits a moment, because `is_locked` takes the lock too, for as long as it looks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.02)
        else:
            return descriptor


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False
