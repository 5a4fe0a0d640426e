"""Logs: events, not sentences, as JSON lines on stderr. `checkpoint.committed step=400 size=... seconds=...`.

stdout is for the answer. Secrets are masked, whatever event carries them. A log line never kills a job: after a
preemption stderr may be a dead pipe, or one that nobody empties any more, and the save that is under way matters more.
Nor does it change its exit code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TextIO

import structlog

MASK: Final = "***"

_STALL_SECONDS: Final = 1.0
"""For how long a line waits for a reader that reads no more; those after it are dropped until it reads again."""
_MOST_WAITING: Final = 1000
"""Lines that wait while it is quiet; the oldest go first."""

_SECRET_NAME = re.compile(
    r"secret|token$|password|passwd|credential|(?:api|access|private)[_-]?key|authorization", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key ids
    r"|\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face tokens
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"  # user:password@ in a url
    r"|(?<=\bBearer )[\w.~+/=-]+"  # HTTP
    r"|(?<=X-Amz-Signature=)[^&\s\"']+|(?<=X-Amz-Credential=)[^&\s\"']+"  # presigned urls
    r"|(?<=X-Amz-Security-Token=)[^&\s\"']+"
    r"|(?<=_TOKEN=)[^\s\"']+|(?<=_SECRET=)[^\s\"']+|(?<=_KEY=)[^\s\"']+|(?<=PASSWORD=)[^\s\"']+"  # shell lines
)

_bound: dict[str, Any] = {}
"""On every event of the process. Not structlog's contextvars: those do not reach threads that are started later."""


def mask(value: Any) -> Any:
    """The value with whatever looks like a secret masked, however deep. What it returns is plain JSON data."""
    match value:
        case str():
            return _SECRET_VALUE.sub(MASK, value)
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)  # JSON has no NaN
        case dict():
            return {str(k): MASK if _SECRET_NAME.search(str(k)) and v else mask(v) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [mask(item) for item in value]
        case _:
            # Only now a text: written out later, the secrets in it would pass.
            return mask(str(value) if isinstance(value, BaseException | os.PathLike) else repr(value))


def _with_bound(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**_bound, **event}


def _masked(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    try:
        masked: structlog.typing.EventDict = mask(dict(event))
    except Exception as error:
        # A value that refers to itself, or cannot be written out: the event is worth more than the value.
        return {"event": str(event.get("event")), "unloggable": type(error).__name__}
    return masked


class _Lines:
    """Writes lines to a stream that may be dead, full, or read no more.

    Args:
        quiet: while it is true nothing is written; the lines wait.
    """

    def __init__(self, stream: TextIO, quiet: Callable[[], bool]) -> None:
        self._stream = stream
        self._quiet = quiet
        self._waiting: deque[str] = deque(maxlen=_MOST_WAITING)
        self._dropped = 0
        self._torn = False
        # Reentrant: a warning that the garbage collector raises in the middle of a line is a line too.
        self._lock = threading.RLock()

    def msg(self, message: str) -> None:
        self._waiting.append(message)
        with self._lock:
            while self._waiting and not self._quiet():
                self._write(self._waiting.popleft())

    log = debug = info = warning = error = critical = exception = msg

    def _write(self, line: str) -> None:
        try:
            number = self._stream.fileno()
        except (OSError, ValueError):  # it is in memory only, or closed
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(line + "\n")
                self._stream.flush()
            return
        if self._dropped:
            line = json.dumps({"event": "log.lines_dropped", "lines": self._dropped}) + "\n" + line
        try:
            self._write_bytes(number, ("\n" * self._torn + line + "\n").encode("utf-8", "backslashreplace"))
        except BrokenPipeError:
            # Nobody reads any more. What others have left in the stream's buffer would fail again when Python flushes
            # it at exit, and turn the exit code into 120: let it go nowhere.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
        except OSError:  # a full disk
            pass

    def _write_bytes(self, number: int, data: bytes) -> None:
        """Write past the stream's buffer, a piece at a time, and only what does not block."""
        ready = select.poll()
        ready.register(number, select.POLLOUT)
        left = data
        while left:
            if not ready.poll(0 if self._dropped else _STALL_SECONDS * 1000):
                self._dropped += 1
                self._torn = self._torn or left is not data
                return
            left = left[os.write(number, left[: select.PIPE_BUF]) :]
        self._dropped, self._torn = 0, False


def configure(stream: TextIO | None = None, *, quiet: Callable[[], bool] = lambda: False) -> None:
    """Send every event of this process to a stream (stderr unless told). Nothing is bound to them yet.

    Args:
        quiet: while it is true events wait, and come with the first one after it. Called from every thread.
    """
    _bound.clear()
    lines = _Lines(sys.stderr if stream is None else stream, quiet)
    structlog.configure(
        processors=[
            _with_bound,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _masked,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=False,
    )


def capture_libraries() -> None:
    """Turn what libraries log (from WARNING on) or warn about into events, so that a log is JSON from end to end."""
    logging.basicConfig(handlers=[_Libraries()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


class _Libraries(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        get_logger().warning("library", logger=record.name, message=record.getMessage().strip())


def bind(**values: Any) -> None:
    """Put these on every later event of this process, in every thread: run_id and attempt, once."""
    _bound.update(values)


def get_logger() -> Any:
    """The logger. Events are named `thing.happened`."""
    return structlog.get_logger()
