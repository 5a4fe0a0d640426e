"""Attempts without the 6 s of imports each: one process imports the training stack, and forks one attempt per order.

Read from stdin, a line of JSON an order: {"environ": {...}, "log": path, "die_at": n | null, "when": "before"}.
Written to stdout: "pid N", then "exit N" (negative: the signal that killed it).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn

from job import loading  # noqa: F401  the heavy imports, before any fork
from job.contract.layout import Key
from job.storage import Progress, Store, open_store


class KillingStore:
    """A real SIGKILL of the own process before or after the n-th write (from 1)."""

    def __init__(self, inner: Store, die_at: int, when: Literal["before", "after"]) -> None:
        self._inner = inner
        self._die_at = die_at
        self._when = when
        self._writes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_new(self, key: Key, data: bytes) -> None:
        self._around(self._inner.put_new, key, data)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        self._around(self._inner.put_file, key, path, progress)

    def delete(self, key: Key) -> None:
        self._around(self._inner.delete, key)

    def _around(self, write: Any, *arguments: Any) -> None:
        self._writes += 1
        last = self._writes == self._die_at
        if last and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)


def live(order: dict[str, Any]) -> NoReturn:
    """One attempt in this (forked) process."""
    from job.__main__ import main
    from job.attempt import Attempt
    from job.contract.environ import JobEnviron
    from job.contract.outcome import EXIT_CODES
    from job.logs import configure
    from job.notice import Notice

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environ"])
    if order["die_at"] is None:
        code = main()
    else:
        notice = Notice()
        notice.listen()
        configure()
        environ = JobEnviron.read(os.environ)
        Path(environ.workdir).mkdir(parents=True, exist_ok=True)
        store: Any = KillingStore(open_store(environ.bucket), order["die_at"], order["when"])
        code = EXIT_CODES[Attempt(environ, notice, store=store).live().outcome]
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own ending belongs to the parent


def serve() -> None:
    """Answer orders until stdin ends."""
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                live(order)
            except BaseException:  # whatever it is, this process must not go on as a second zygote
                import traceback

                traceback.print_exc()
                os._exit(99)
        print(f"pid {pid}", flush=True)  # noqa: T201
        _, status = os.waitpid(pid, 0)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
