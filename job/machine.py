"""This machine: which one it is and for how long it has been ours, as the bill sees it; and the memory it has left."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")
_KIB: Final = 1024


@dataclass(frozen=True)
class Machine:
    """A machine, or a rented container, in one life of it.

    Args:
        id: equal for all processes in that life; empty when it cannot be told.
        up_seconds: since it began; 0 when it cannot be told.
    """

    id: str = ""
    up_seconds: float = 0.0


def this_machine(proc: Path = _PROC, *, pid: int | None = None) -> Machine:
    """Read it from Linux's /proc (man 5 proc); a strange or absent /proc is a machine that nothing is known of.

    `docker run` makes us process 1 of a container, whose age says nothing: the machine under it is what is paid for,
    and its uptime is seen from inside. Where somebody else is process 1, a system's init or the one that a rented
    container was started with, the bill began with that process.
    """
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        up = float((proc / "uptime").read_text(encoding="ascii").split()[0])
        if not boot or not 0 <= up < math.inf:
            return Machine()  # without a name all such machines would be one, and share a bill
        if (os.getpid() if pid is None else pid) == 1:
            return Machine(boot, up)
        # The name, in parentheses, may hold blanks; the 22nd field is the start, in ticks after the boot.
        stat = (proc / "1/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        began = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return Machine()
    return Machine(f"{boot}/{began:.2f}", max(up - began, 0.0))


def free_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of memory that this process can still have; None when it cannot be told.

    What the machine has left (man 5 proc_meminfo: MemAvailable), or less, where the container's share says so (the
    kernel's admin-guide/cgroup-v2: memory.max, memory.current). Files that are only cached are in nobody's way.
    """
    try:
        machine = _table(proc / "meminfo")["MemAvailable:"] * _KIB
    except (OSError, ValueError, KeyError):
        return None
    try:
        stat = _table(cgroup / "memory.stat")
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        share = int((cgroup / "memory.max").read_text(encoding="ascii"))  # "max", where there is no limit
        return max(0, min(machine, share - used + stat["active_file"] + stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return machine


def _table(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
