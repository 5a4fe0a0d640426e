"""How an attempt ends. An ending is a value; the table to exit codes is total, and checked at import."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Outcome(StrEnum):
    """The ending of one attempt."""

    DONE = "done"
    """The adapter is published."""
    PREEMPTED = "preempted"
    """Stopped from outside, or the store was out of reach at the end: the next attempt goes on from the last commit."""
    OUT_OF_BUDGET = "out_of_budget"
    """The ceiling came; the best adapter so far is published, and the run is not recovered."""
    FAILED = "failed"
    """The training cannot go on; another attempt would fail the same way."""
    BAD_INPUT = "bad_input"
    """What a person wrote cannot be used."""


EXIT_CODES: Final[Mapping[Outcome, int]] = MappingProxyType(
    {
        Outcome.DONE: 0,
        Outcome.FAILED: 1,
        Outcome.BAD_INPUT: 2,
        Outcome.OUT_OF_BUDGET: 3,
        # EX_TEMPFAIL of sysexits.h: "temporary failure; the user is invited to retry the operation".
        Outcome.PREEMPTED: 75,
    }
)

_OUTCOMES: Final[Mapping[int, Outcome]] = MappingProxyType({code: o for o, code in EXIT_CODES.items()})

if set(EXIT_CODES) != set(Outcome) or len(_OUTCOMES) != len(EXIT_CODES):
    raise AssertionError("every outcome needs an exit code of its own")


def outcome_of_exit(code: int) -> Outcome | None:
    """The outcome a process's exit code states; None when it died without stating one (a signal, a crash)."""
    return _OUTCOMES.get(code)


def is_worth_another_attempt(code: int) -> bool:
    """Whether a new attempt can get further: the job asked for one (75), or died without a word.

    Codes 0, 2 and 3 are final answers; 1 would fail the same way again.
    """
    outcome = outcome_of_exit(code)
    return outcome is None or outcome is Outcome.PREEMPTED
