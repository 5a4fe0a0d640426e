"""Waiting for what other processes do, and reading what they said."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], *, seconds: float = 60.0) -> T:
    """What `look` returns, once it is something true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return seen


def events_in(log: bytes) -> list[dict[str, Any]]:
    """The events of a log. Libraries write lines of their own into it; the last line may be half written."""
    return [json.loads(line) for line in log.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
