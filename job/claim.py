"""The beginning of an attempt: which run this is, whether it is over already, and a number of its own."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from job.contract.environ import JobEnviron
from job.contract.errors import AlreadyExists, NotFound, RunUnknown
from job.contract.layout import RunLayout
from job.contract.records import AdapterManifest, AttemptClaim, RunRecord
from job.journal import now
from job.machine import this_machine
from job.storage import Store

T = TypeVar("T")


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
