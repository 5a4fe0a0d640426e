"""Logs: events, not sentences, as JSON lines on stderr. `checkpoint.committed step=400 size=... seconds=...`.

stdout is for the answer. Secrets are masked, whatever event carries them. A log line never kills a job: after a
preemption stderr may be a dead pipe, and the save that is under way matters more.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any, Final, TextIO

import structlog

MASK: Final = "***"

_SECRET_NAME = re.compile(r"secret|token$|password|passwd|credential|api_?key|access_?key|authorization", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key ids
    r"|\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face tokens
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@ in a url
)


def mask(value: Any) -> Any:
    """The value with whatever looks like a secret masked, however deep."""
    if isinstance(value, str):
        return _SECRET_VALUE.sub(MASK, value)
    if isinstance(value, dict):
        return {k: MASK if _SECRET_NAME.search(str(k)) and v else mask(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item) for item in value]
    return value


def _masked(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    masked: structlog.typing.EventDict = mask(dict(event))
    return masked


class _Lines:
    """Writes lines to a stream that may have died."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe; a closed stream
            self._stream.write(message + "\n")
            self._stream.flush()

    log = debug = info = warning = error = critical = exception = msg


def configure(stream: TextIO | None = None) -> None:
    """Send every event of this process to a stream (stderr unless told)."""
    target = sys.stderr if stream is None else stream
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _masked,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=lambda *_: _Lines(target),
        cache_logger_on_first_use=False,
    )


def bind(**values: Any) -> None:
    """Put these on every later event of this process: run_id and attempt, once."""
    structlog.contextvars.bind_contextvars(**values)


def get_logger() -> Any:
    """The logger. Events are named `thing.happened`."""
    return structlog.get_logger()
