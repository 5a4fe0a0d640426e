"""The budget's ceiling, seen from the job: how long this attempt may still train before it has to land."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from job.contract.budget import Budget, Reserve, can_land, seconds_left
from job.contract.errors import Damaged, StorageError
from job.contract.layout import RunLayout
from job.contract.ledger import Ledger, ledger_of, offer_of
from job.contract.metrics import Heartbeat, MetricLine
from job.contract.records import AttemptClaim
from job.journal import now
from job.logs import get_logger
from job.passport import Story, read_story
from job.storage import Store

_LOOK_AGAIN_SECONDS: Final = 60.0
"""An attempt whose machine was taken away may live half a minute beside its successor, and be paid for."""


class Ceiling:
    """What the run has cost until now, and what is kept back to land. Without a budget it bounds nothing.

    What other attempts cost is read from the bucket, by a thread of its own; what this one costs is this machine's
    price times a clock that only goes forward. No calendar is asked: a deadline is counted from the moment at which the
    bucket, not this machine, saw the claim.

    Args:
        elapsed: seconds since the claim.
        stop: ends this process at once. Called from another thread when the dollars are spent and the job has not ended
            by itself: it hangs in a library, or lands for longer than it ever took.

    Raises:
        StorageError, Damaged: the run's records cannot be read.
    """

    def __init__(
        self,
        store: Store,
        layout: RunLayout,
        claim: AttemptClaim,
        *,
        elapsed: Callable[[], float],
        stop: Callable[[str], None],
    ) -> None:
        self._store, self._layout, self._claim, self._elapsed = store, layout, claim, elapsed
        story = read_story(store, layout)
        own = story.submissions.get(claim.submission)
        self._offer = offer_of(claim, own)
        self._rate = self._offer.usd_per_hour if self._offer is not None else None
        self._dearest = max((offer.usd_per_hour or 0.0 for offer in own.offers), default=None) if own else None
        self.budget = own.budget if own is not None else Budget()
        self.reserve = Reserve()
        self._look_seconds = 0.0
        self._has_saved = False
        self._to_deadline = self._seconds_to_deadline() if self.budget.deadline is not None else None
        self._to_begin = 0.0
        self._spent = self._read_spent(story)
        self._stop = stop
        self._closing = threading.Event()
        if not self.budget.is_none:
            threading.Thread(target=self._watch, name="ceiling", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()

    @property
    def spent_usd(self) -> float:
        """By all attempts until now; 0 where no price is known."""
        spent, lived = self._spent
        return spent + (self._elapsed() - lived) / 3600 * (self._rate or 0.0)

    @property
    def has_to_land(self) -> bool:
        """Whether the attempt has trained for as long as it may."""
        if self.budget.is_none:
            return False
        return self._left(None if self._to_deadline is None else self._to_deadline - self._elapsed()) <= 0

    @property
    def lacks_time(self) -> bool:
        """Whether it is the deadline that ends the run, and not the money."""
        return self._to_deadline is not None and self._left(None) > 0

    @property
    def is_spent(self) -> bool:
        """Whether there is nothing left even for landing."""
        return not self._can_land(0.0)

    @property
    def is_too_late_to_begin(self) -> bool:
        """Whether an attempt that takes as long to begin as those before it could not even land."""
        return not self._can_land(self._to_begin)

    @property
    def why(self) -> str:
        """What ended the run, for people."""
        if self.budget.max_usd is not None and self._rate is not None and not self.lacks_time:
            return f"${self.spent_usd:.2f} of ${self.budget.max_usd:.2f} are spent"
        return f"the deadline {self.budget.deadline} is near"

    def note_save(self, seconds: float) -> None:
        """A save took so long, from decision to commit; the longest counts. Publishing uploads about as much."""
        longest = max(seconds, self.reserve.save_seconds) if self._has_saved else seconds
        self._has_saved = True
        self.reserve = self.reserve.model_copy(update={"save_seconds": longest, "publish_seconds": longest})

    def note_look(self, seconds: float) -> None:
        """So long it takes until somebody looks again: a step, and an evaluation where one follows."""
        self._look_seconds = seconds

    def note_evaluation(self, seconds: float) -> None:
        """An evaluation takes so long."""
        self.reserve = self.reserve.model_copy(update={"evaluate_seconds": seconds})

    def _left(self, seconds_to_deadline: float | None) -> float:
        """Seconds that may still be trained."""
        return seconds_left(
            self.budget,
            spent_usd=self.spent_usd,
            usd_per_hour=self._rate,
            reserve=self.reserve,
            heartbeat_seconds=self._claim.heartbeat_seconds,
            seconds_to_deadline=seconds_to_deadline,
            dearest_usd_per_hour=self._dearest,
            look_seconds=self._look_seconds,
        )

    def _can_land(self, loading_seconds: float) -> bool:
        return can_land(
            self.budget,
            spent_usd=self.spent_usd,
            usd_per_hour=self._rate,
            reserve=self.reserve,
            dearest_usd_per_hour=self._dearest,
            loading_seconds=loading_seconds,
        )

    def _seconds_to_deadline(self) -> float:
        """From the claim to the deadline, by the bucket's clock."""
        assert self.budget.deadline is not None  # noqa: S101 - asked only then
        claim = self._layout.claim(self._claim.attempt)
        seen: datetime | None = next((info.modified for info in self._store.list(claim) if info.key == claim), None)
        return (self.budget.deadline - (seen or self._claim.claimed_at)).total_seconds()

    def _read_spent(self, story: Story) -> tuple[float, float]:
        """Dollars of all attempts, and how long this one had lived then. Learns how long a start takes."""
        lived, attempt = self._elapsed(), self._claim.attempt
        lines: dict[int, Sequence[MetricLine]] = {**story.lines}
        lines[attempt] = [Heartbeat(at=now(), elapsed=lived, phase="")]
        claims = {**story.claims, attempt: self._claim}
        found = ledger_of(claims, story.ends, lines, story.submissions.values(), running=attempt)
        before = Ledger(charges=tuple(charge for charge in found.charges if charge.attempt != attempt))
        self._to_begin = max((charge.loading_seconds for charge in before.charges if charge.useful_seconds), default=0)
        if self._offer is not None and self._offer.spot:
            own = next(charge for charge in found.charges if charge.attempt == attempt)
            start = max(before.restart_seconds, own.provisioning_seconds + self._to_begin)
            self.reserve = self.reserve.model_copy(update={"restart_seconds": start})
        # This one's interval that may never be lived is not spent yet.
        interval = self._claim.heartbeat_seconds / 3600 * (self._rate or 0.0)
        return sum(charge.usd or 0.0 for charge in found.charges) - interval, lived

    def _watch(self) -> None:
        """Look at the others from time to time, and at the end all the time."""
        next_look = time.monotonic() + _LOOK_AGAIN_SECONDS
        while not self._closing.wait(min(self._claim.heartbeat_seconds / 2, _LOOK_AGAIN_SECONDS)):
            if self.budget.max_usd is not None and self._rate is not None and self.spent_usd >= self.budget.max_usd:
                self._stop(self.why)
                return
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _LOOK_AGAIN_SECONDS
            try:
                self._spent = self._read_spent(read_story(self._store, self._layout))
            except (StorageError, Damaged) as error:
                get_logger().warning("ceiling.unreachable", error=str(error))
