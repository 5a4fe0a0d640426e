"""Is the training still learning? A loss that explodes, told from one that is noisy, high at first, or spikes. Pure.

The rule: each of the last PATIENCE steps lost more than a limit that no step of a healthy run keeps up for so long,

    limit = 1.5 x reference + 1.5 nats,

where the reference is what this very run has shown it can do: the lowest mean of PATIENCE steps in a row, or the
first step's loss, which is the base model's own, with a nat of allowance because it is a single step.

Why so: every step, and not their mean, so that spikes that recover raise no alarm, however high; of two kinds of rows,
easy and hard, twenty steps in a row without an easy one do not come by chance. A multiple, since the noise of a loss
grows with it; and nats beside it, since a run that has learnt its rows by heart has a reference near zero. What
guessing uniformly costs, ln(vocabulary), is no part of it: a model that a learning rate has destroyed still knows
which words are common, and settles some nats below.

It is computed from the losses on record and nothing else: a resumed run decides as the one that was not interrupted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

PATIENCE: Final = 20
"""Steps. So many are wasted before the alarm."""
FACTOR: Final = 1.5
NATS: Final = 1.5
FIRST_NATS: Final = 1.0
"""Allowance for the noise of the first step."""


@dataclass(frozen=True)
class Explosion:
    """What was seen. Losses in nats a token."""

    limit: float
    reference: float

    @property
    def text(self) -> str:
        return (
            f"each of the last {PATIENCE} steps lost more than {self.limit:.2f} nats a token, where this run was at "
            f"{self.reference:.2f} before"
        )


class LossWatch:
    """Looks at the losses of a run's steps in their order.

    Args:
        losses: those on record, each finite.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._seen = 0
        self._reference = math.inf
        self.is_in_doubt = False
        """Whether the last step is above the limit: a spike that may recover, or the beginning of the end."""
        self._last: deque[float] = deque(maxlen=PATIENCE)
        for loss in losses:
            self.note(loss)

    @property
    def limit(self) -> float:
        """Above it a loss is not what this run is used to; infinite before the first step."""
        return FACTOR * self._reference + NATS

    def note(self, loss: float) -> Explosion | None:
        """One more step; what exploded, if something did."""
        if self._seen == 0:
            self._reference = loss + FIRST_NATS
        self._seen += 1
        self._last.append(loss)
        if len(self._last) == PATIENCE:
            # The lowest mean only falls: what explodes cannot lift its own limit.
            self._reference = min(self._reference, math.fsum(self._last) / PATIENCE)
        self.is_in_doubt = loss > self.limit
        if self.is_in_doubt and len(self._last) == PATIENCE and min(self._last) > self.limit:
            return Explosion(limit=self.limit, reference=self._reference)
        return None
