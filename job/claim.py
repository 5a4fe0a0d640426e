"""The beginning of an attempt: which run this is, whether it is over already, and a number of its own."""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

from job.contract.environ import JobEnviron
from job.contract.errors import AlreadyExists, NotFound, RunUnknown, Unreachable
from job.contract.layout import RunLayout
from job.contract.outcome import Outcome
from job.contract.records import AdapterManifest, AttemptClaim, RunRecord
from job.ending import Ending, ending_of
from job.journal import now
from job.logs import get_logger
from job.machine import this_machine
from job.storage import Store

T = TypeVar("T")

MOST_STARTS: Final = 6
"""On one machine, without the bucket: half an hour of waiting for it."""


class Insist(Protocol):
    """Does something again while the store is out of reach, for as long as it is worth it."""

    def __call__(self, what: str, action: Callable[[], T], /) -> T: ...


def read_run(store: Store, layout: RunLayout) -> RunRecord:
    """The run's record.

    Raises:
        RunUnknown: there is no such run.
        StorageError, Damaged: it cannot be read.
    """
    try:
        return RunRecord.from_bytes(store.get(layout.recipe), name=layout.recipe)
    except NotFound as error:
        raise RunUnknown(f"there is no run {layout.run_id} in {store.uri}") from error


def is_published(store: Store, layout: RunLayout) -> bool:
    """Whether the final adapter exists. Raises StorageError, Damaged."""
    key = layout.adapter_manifest
    try:
        return AdapterManifest.from_bytes(store.get(key), name=key).complete
    except NotFound:
        return False


def without_a_claim(error: Unreachable, workdir: Path, environ: JobEnviron) -> Ending:
    """How an attempt ends that could not claim. Nothing in the bucket counts it, neither its number nor its dollars:
    where the backend restarts for ever, a bucket that this machine cannot reach would be waited for, and paid for,
    without end. So it is counted here, on the machine's own disk."""
    if environ.last_attempt is None:
        return ending_of(error)
    try:
        with _starts(workdir, environ).open("ab") as file:
            file.write(b".")
            count = file.tell()
    except OSError as trouble:
        get_logger().warning("start.not_counted", error=str(trouble))
        count = MOST_STARTS
    if count < MOST_STARTS:
        return ending_of(error)
    return Ending(
        Outcome.FAILED,
        f"gave up without the bucket, after {count} starts on this machine: {error.message}",
        "see whether its server can be reached from there; "
        f"`ftjob launch --run {environ.run_id}` goes on from the last commit",
    )


def forget_starts(workdir: Path, environ: JobEnviron) -> None:
    """There is a claim: from here on the bucket counts."""
    with contextlib.suppress(OSError):
        _starts(workdir, environ).unlink()


def _starts(workdir: Path, environ: JobEnviron) -> Path:
    return workdir / f".starts-{environ.run_id}-{environ.submission:04d}"


def claim_next(store: Store, layout: RunLayout, environ: JobEnviron, *, insist: Insist) -> AttemptClaim:
    """Take the next free attempt number. A lost race takes the one after."""
    machine = this_machine()
    keys = insist("attempts", lambda: [info.key for info in store.list(layout.attempts)])
    number = max((layout.claimed_attempt(key) or 0 for key in keys), default=0)
    while True:
        number += 1
        claim = AttemptClaim(
            attempt=number,
            nonce=uuid.uuid4().hex,
            claimed_at=now(),
            pid=os.getpid(),
            host=platform.node(),
            infra=environ.infra,
            submission=environ.submission,
            machine_id=machine.id,
            up_seconds=machine.up_seconds,
            heartbeat_seconds=environ.heartbeat_seconds,
        )
        try:
            insist("claim", partial(store.put_new, layout.claim(number), claim.to_bytes()))
        except AlreadyExists:
            continue
        return claim
