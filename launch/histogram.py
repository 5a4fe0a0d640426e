"""Lengths as a histogram with round edges. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from job.contract.check import Lengths

BARS: Final = 15
"""At most, and one more for what is much longer than all others."""


def histogram(lengths: Sequence[int]) -> Lengths:
    """Bars of one width, 1, 2 or 5 times a power of ten, from the shortest to the longest; where a few rows are far
    longer than the others, the last bar holds all of them.

    Args:
        lengths: at least one, of at least 1 token each.
    """
    ordered = sorted(lengths)
    shortest, longest, most = ordered[0], ordered[-1], percentile(ordered, 0.99)
    width = _round_up((most - shortest + 1) / BARS)
    first = (shortest - 1) // width * width
    last = longest if longest - first <= (BARS + 1) * width else most
    edges = list(range(first, last + width, width))
    if longest > edges[-1]:
        edges.append(longest)
    counts = [0] * (len(edges) - 1)
    for length in ordered:
        counts[min((length - 1 - first) // width, len(counts) - 1)] += 1
    return Lengths(
        edges=tuple(edges),
        counts=tuple(counts),
        shortest=ordered[0],
        median=percentile(ordered, 0.5),
        p95=percentile(ordered, 0.95),
        longest=longest,
    )


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest of the values, in rising order, that so large a share of them do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _round_up(width: float) -> int:
    power: int = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
