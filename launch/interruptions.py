"""How often a machine is taken away, what that costs, and how often to save against it. Pure."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, NamedTuple

SAVE_MEAN_SECONDS: Final = 6 * 3600.0
"""M of Young/Daly as the job takes it (job/callbacks.py); a test holds them together."""
SHORTEST_INTERVAL: Final = 15.0
NOTICED: Final = frozenset({"aws", "gcp", "azure"})
"""Clouds whose notices the job hears and answers with a checkpoint (job/metadata.py): nothing is repeated there."""
SAVE_BYTES_PER_SECOND: Final = 2e9
"""From GPU to memory, while the training waits; assumed. And UPLOAD from there to the bucket, beside the training."""
UPLOAD_BYTES_PER_SECOND: Final = 100e6
SAVE_SECONDS: Final = 0.05
_P90: Final = NormalDist().inv_cdf(0.9)


class Rate(NamedTuple):
    """Hours between two interruptions: as likely shorter as longer, and one time in ten not even so long."""

    median_hours: float
    worst_hours: float
    basis: str

    def an_hour(self, luck: float) -> float:
        """Interruptions an hour.

        Args:
            luck: standard normal: how bad a region and a week it is.
        """
        if math.isinf(self.median_hours):
            return 0.0
        return math.exp(luck * math.log(self.median_hours / self.worst_hours) / _P90) / self.median_hours


_BUSY: Final = Rate(
    *(24.0, 6.0),
    "spot taken away once in 24 h, in bad luck once in 6 h (assumed: scarce GPUs are taken away within hours, SpotLake "
    "2022 and Can't Be Late 2024; 6 h is what the job saves by)",
)
_RATES: Final = {
    "aws": Rate(
        *(72.0, 12.0),
        "spot taken away once in 72 h, in bad luck once in 12 h (assumed: AWS's bands of 2026-02, 5-20 % of machines a "
        "month, count machines that lived short as well; busy regions are far worse)",
    ),
}
_NEVER: Final = Rate(math.inf, math.inf, "not taken away on demand")


def rate_of(cloud: str, *, spot: bool) -> Rate:
    """How often a machine of a cloud is taken away."""
    return _RATES.get(cloud, _BUSY) if spot else _NEVER


def saving(adapter_parameters: int, minutes: float | None) -> tuple[float, float]:
    """(seconds between saves, seconds that one holds the training up).

    Args:
        minutes: as the recipe says; None for the best interval: sqrt(2 C M) (Young 1974; Daly 2006, first order).
    """
    size = adapter_parameters * 12  # fp32 weights and two moments
    blocking = SAVE_SECONDS + size / SAVE_BYTES_PER_SECOND
    if minutes is not None:
        return minutes * 60, blocking
    best = math.sqrt(2 * blocking * SAVE_MEAN_SECONDS)
    return max(best, 1.5 * size / UPLOAD_BYTES_PER_SECOND, SHORTEST_INTERVAL), blocking


def repeated_seconds(cloud: str, interval: float) -> float:
    """Work that an interruption repeats: half an interval on average, nothing where it was announced and answered."""
    return 0.0 if cloud in NOTICED else interval / 2
