"""Reads runs: records in the bucket and the backend's word, nothing else. What was read once is not read again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from job.contract.errors import Damaged, NotFound, RunUnknown, Unreachable
from job.contract.layout import RUNS, Key, RunLayout, run_of_recipe_key
from job.contract.metrics import MetricLine, parse_lines
from job.contract.receipt import Receipt, receipt_of
from job.contract.records import AdapterManifest, AttemptClaim, AttemptEnd, RunRecord
from job.contract.status import Status
from job.contract.submission import Submission
from job.storage import Store
from launch.backend import Described
from launch.view import Facts, RunView, view_of

_READERS: Final = 8
"""Objects read at once: a long run has a thousand small ones, and a bucket answers each in some 30 ms."""


class Describes(Protocol):
    """The part of a backend that readers need."""

    def describe(self, run_id: str) -> Described: ...


def read_run(store: Store, run_id: str) -> RunRecord:
    """The run's record.

    Raises:
        RunUnknown: the bucket has no such run.
        StorageError: the bucket cannot be read.
    """
    try:
        return RunRecord.from_bytes(store.get(RunLayout(run_id).recipe), name=f"recipe.json of run {run_id}")
    except NotFound as error:
        raise RunUnknown(
            f"there is no run {run_id} in {store.uri}", hint="`ftjob list` shows the runs of a bucket (--bucket URI)"
        ) from error


def newest_adapter(store: Store, run_id: str) -> AdapterManifest | None:
    """The final adapter of a run, or, without it, the last that landed; None when there is neither.

    Raises:
        StorageError, Damaged: it cannot be read.
    """
    layout = RunLayout(run_id)
    try:
        return AdapterManifest.from_bytes(store.get(layout.adapter_manifest), name=f"adapter.json of run {run_id}")
    except NotFound:
        landed = [info.key for info in store.list(layout.landed) if layout.landed_attempt(info.key) is not None]
    if not landed:
        return None
    return AdapterManifest.from_bytes(store.get(landed[-1]), name=f"the last adapter of run {run_id} that landed")


def newest_submission(store: Store, run_id: str) -> Submission | None:
    """What the run was handed over with last; None when it never was. Raises StorageError, Damaged."""
    keys = submitted(store, run_id)
    if not keys:
        return None
    return Submission.from_bytes(store.get(keys[max(keys)]), name=f"the last submission of run {run_id}")


def submissions_of(store: Store, run_id: str) -> list[Submission]:
    """Everything the run was handed over with, in order. Raises StorageError, Damaged."""
    keys = submitted(store, run_id).values()
    return [Submission.from_bytes(store.get(key), name=f"{key} of run {run_id}") for key in keys]


def submitted(store: Store, run_id: str) -> dict[int, Key]:
    """The keys of a run's submissions by their numbers, in order. Raises StorageError."""
    layout = RunLayout(run_id)
    numbers = ((layout.submitted(info.key), info.key) for info in store.list(layout.submissions))
    return {number: key for number, key in numbers if number is not None}


def list_runs(store: Store) -> Iterator[str]:
    """The ids of the runs in a bucket, sorted."""
    for info in store.list(RUNS):
        run_id = run_of_recipe_key(info.key)
        if run_id is not None:
            yield run_id


@dataclass(frozen=True)
class Poll:
    """What one look found: the run as it is, and the lines that were not there at the look before, by attempt."""

    view: RunView
    described: Described
    news: tuple[tuple[int, MetricLine], ...] = ()
    unread: Unreachable | None = None
    """Why the bucket could not be read: the view is that of the look before then, or nearly empty."""

    @property
    def certain(self) -> RunView:
        """The view, for whoever decides by it. Raises Unreachable where the bucket could not be read."""
        if self.unread is not None:
            raise self.unread
        return self.view


class RunReader:
    """Looks at one run, again and again.

    Args:
        store: the run's bucket.
        backend: who is asked whether the run lives.
        metrics: False leaves the metrics unread: enough for a list, at three requests a run.
    """

    def __init__(self, store: Store, run_id: str, backend: Describes, *, metrics: bool = True) -> None:
        self._store, self._run_id, self._backend, self._metrics = store, run_id, backend, metrics
        self._layout = RunLayout(run_id)
        self._facts: Facts | None = None
        self._last_metrics_key: dict[int, str] = {}
        self._settled: set[int] = set()
        self._news: list[tuple[int, MetricLine]] = []
        self._view: RunView | None = None
        self._heard: float | None = None
        """When something new was read, by a clock that only goes forward."""

    def poll(self, now: datetime) -> Poll:
        """The run at this moment. A bucket out of reach makes it UNKNOWN, with what was known before.

        Raises:
            RunUnknown: the bucket has no such run.
            AccessRefused: the bucket may not be read.
            Damaged: a record is unreadable.
        """
        # The backend first: what a job wrote before it ended is then certain to be seen by the reading below, and a
        # run that just succeeded is never taken for one that just died.
        described = self._backend.describe(self._run_id)
        try:
            self._read()
        except Unreachable as error:
            before = self._view or RunView(run_id=self._run_id, status=Status.UNKNOWN, bucket=self._store.uri)
            unknown = {"status": Status.UNKNOWN, "message": error.message, "hint": error.hint}
            return Poll(before.model_copy(update=unknown), described, unread=error)
        assert self._facts is not None  # noqa: S101 - `_read` set it
        if self._news and self._view is not None:  # what the first look finds may be of any age
            self._heard = time.monotonic()
        silent = None if self._heard is None else time.monotonic() - self._heard
        self._view = view_of(self._facts, described, bucket=self._store.uri, now=now, silent_seconds=silent)
        if not self._metrics:  # without them nobody knows how long an attempt lived
            self._view = self._view.model_copy(update={"spent_usd": None, "silent_usd": 0.0})
        news, self._news = tuple(self._news), []
        return Poll(self._view, described, news)

    def receipt(self, now: datetime) -> Receipt:
        """What the run has cost until now. Raises as `poll`, and Unreachable."""
        view = self.poll(now).certain
        assert self._facts is not None  # noqa: S101 - all of it was read
        running = next((each.attempt for each in view.attempts if each.ended == "running"), None)
        return receipt_of(self._facts.ledger(running=running), max_usd=self._facts.budget.max_usd)

    def _read(self) -> None:
        if self._facts is None:
            self._facts = Facts(read_run(self._store, self._run_id))
        facts = self._facts
        self._read_attempts(facts)
        if self._metrics:
            self._read_metrics(facts)
        for info in self._store.list(self._layout.submissions):
            if (stopped := self._layout.asked_to_stop(info.key)) is not None:
                facts.stops.add(stopped)
            number = self._layout.submitted(info.key)
            if number is not None and number not in facts.submissions:
                facts.submissions[number] = Submission.from_bytes(self._store.get(info.key), name=info.key)
        if facts.adapter is None or not facts.adapter.complete:
            facts.adapter = newest_adapter(self._store, self._run_id)

    def _read_attempts(self, facts: Facts) -> None:
        for info in self._store.list(self._layout.attempts):
            claimed, ended = self._layout.claimed_attempt(info.key), self._layout.ended_attempt(info.key)
            name = f"{info.key.removeprefix(self._layout.root)} of run {self._run_id}"
            if claimed is not None and claimed not in facts.claims:
                facts.claims[claimed] = AttemptClaim.from_bytes(self._store.get(info.key), name=name)
            if ended is not None and ended not in facts.ends:
                facts.ends[ended] = AttemptEnd.from_bytes(self._store.get(info.key), name=name)

    def _read_metrics(self, facts: Facts) -> None:
        # Keys sort within an attempt only: an old attempt may write beside its successor for a while. So each is
        # listed from its own last key; one that has two successors is dead, and is not asked again.
        newest = max(facts.claims, default=0)
        keys: list[tuple[int, Key]] = []
        for attempt in sorted(facts.claims.keys() - self._settled):
            after = self._last_metrics_key.get(attempt, "")
            keys += [(attempt, i.key) for i in self._store.list(self._layout.metrics_of(attempt), after=after)]
        with ThreadPoolExecutor(_READERS) as readers:
            read = list(readers.map(lambda found: self._read_object(found[1]), keys))
        for (attempt, key), lines in zip(keys, read, strict=True):
            facts.lines.setdefault(attempt, []).extend(lines)
            self._last_metrics_key[attempt] = key
            self._news += [(attempt, line) for line in lines]
        # Only now, when everything is read: a store that fails in between is asked for the same again.
        self._settled |= {attempt for attempt in facts.claims if attempt <= newest - 2}

    def _read_object(self, key: Key) -> list[MetricLine]:
        try:
            return parse_lines(self._store.get(key), name=key)
        except (Damaged, NotFound):
            # Metrics are for looking at; one unreadable object must not hide the rest of the run.
            return []
