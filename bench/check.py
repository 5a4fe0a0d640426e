"""How fast `ftjob check` reads and validates a dataset, before any token is counted, and in how much memory.

    python bench/check.py [--rows 1000000] [--processes N] [--json]

Makes its own rows in a temporary folder: conversations of two to four turns, about 1 KB a line, one in a thousand of
them bad, one in a thousand the same as another. The memory is the sum over this process and those it started, sampled
20 times a second, and the highest sum counts; pages that they share are counted once for each. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from job.dataset.examine import examine

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS: Final = 0.05
CONTROL_TOKENS: Final = frozenset(f"<|reserved_special_token_{number}|>" for number in range(250)) | {"<|eot_id|>"}
"""As many as Llama 3 has."""


@dataclass(frozen=True)
class Measured:
    """One examination.

    Args:
        seconds: of wall time.
        cpu_seconds: of all processes together, which other work on the machine hardly changes.
        rss_mib: peak resident memory of all processes together.
    """

    rows: int
    lines: int
    megabytes: float
    seconds: float
    cpu_seconds: float
    rows_per_second: float
    megabytes_per_second: float
    rss_mib: float
    counts: dict[str, int]


def write_rows(path: Path, count: int) -> None:
    """A dataset of so many lines; the same for the same count."""
    draw = random.Random(3)
    letters = "eeeeetttaaooiinnsshhrrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 10))) for _ in range(30_000)]
    line = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 1000 == 500:
                file.write(line[: len(line) // 2] + "\n")
                continue
            if number % 1000 != 501:
                turns = [{"role": "system", "content": "You are a helpful assistant."}] if number % 2 else []
                for _ in range(draw.randint(1, 2)):
                    asked, said = draw.randint(10, 60), draw.randint(30, 110)
                    turns.append({"role": "user", "content": " ".join(draw.choices(words, k=asked))})
                    turns.append({"role": "assistant", "content": " ".join(draw.choices(words, k=said))})
                line = json.dumps({"messages": turns})
            file.write(line + "\n")


class Memory:
    """The resident memory of this process and its children, looked at until the end."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_resident, [os.getpid(), *_children(os.getpid())])))


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:  # it has ended
        return 0


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(path: Path, processes: int | None) -> Measured:
    """Examine a file."""
    begun, spent = time.monotonic(), _cpu_seconds()
    with Memory() as memory:
        found = examine(path, name=path.name, control_tokens=CONTROL_TOKENS, processes=processes)
    seconds = time.monotonic() - begun
    megabytes = found.file.digest.size / 1e6
    return Measured(
        rows=found.file.rows,
        lines=found.file.lines,
        megabytes=megabytes,
        seconds=seconds,
        cpu_seconds=_cpu_seconds() - spent,
        rows_per_second=found.file.rows / seconds,
        megabytes_per_second=megabytes / seconds,
        rss_mib=memory.peak / 2**20,
        counts=found.counts,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, help="default: as the check chooses")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, asked.rows)
        found = measure(path, asked.processes)
    if asked.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.lines:,} lines, {found.megabytes:,.0f} MB: {found.seconds:.1f} s ({found.cpu_seconds:.1f} s of CPU)")
    print(f"{found.rows_per_second:,.0f} rows/s, {found.megabytes_per_second:,.0f} MB/s, {found.rss_mib:,.0f} MiB")
    print(", ".join(f"{code} {count}" for code, count in sorted(found.counts.items())) or "no problems")


if __name__ == "__main__":  # the processes that check import this module too
    main()
