"""Processes by the user they run as and by the mark in their environment, from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

PREFIX: Final = "ftjob-slurm-"
"""Of the folder of every host, in the folder for temporary files."""
MARK: Final = "FTJOB_TEST_SLURM_HOST"
"""Everything that the host starts as root inherits this variable; everything else runs as the cluster's user."""
PATIENCE_SECONDS: Final = 20.0


def of_user(uid: int) -> Iterator[int]:
    """Processes that run as this user, zombies left out."""
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            said = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
            if int(said["Uid"].split()[0]) == uid and not said["State"].startswith("Z"):
                yield int(path.parent.name)


def marked() -> Iterator[int]:
    """Processes that any host of ours started as root, whether or not its tests still live."""
    sign = f"{MARK}=".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):
            # sshd writes its title over its environment: "sshd: ... -f /tmp/ftjob-slurm-.../sshd_config".
            title = (command_line(pid) or [""])[0]
            ours = title.startswith("sshd: ") and f"/{PREFIX}" in title
            if ours or any(line.startswith(sign) for line in path.read_bytes().split(b"\0")):
                yield pid


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    return []


def kill_all(find: Callable[[], Iterator[int]]) -> None:
    """SIGKILL whatever `find` finds, until it finds nothing.

    Raises:
        TimeoutError: something is still there.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while pids := [pid for pid in find() if pid != os.getpid()]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            raise TimeoutError(f"processes do not die: {[(pid, command_line(pid)) for pid in pids]}")
        time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM a child of ours, and SIGKILL it if that does not help."""
    process.terminate()
    try:
        process.wait(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def do(*command: str | Path) -> None:
    """Run a command. Raises subprocess.CalledProcessError when it fails; its words are on stderr."""
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def wait_until(holds: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Look again and again.

    Raises:
        TimeoutError: it does not hold after so many seconds.
    """
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
