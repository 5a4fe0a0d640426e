"""Promise: what another attempt may find better is tried again, and nothing else."""

from __future__ import annotations

import pytest

from job.contract import errors
from job.contract.errors import BadInput, FtjobError, Unreachable
from job.contract.outcome import EXIT_CODES, Outcome, is_worth_another_attempt
from job.ending import ending_of

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FtjobError)]
"""The contract's: those that others derive from them are no business of an attempt's end."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_ends_an_attempt_with_its_words_and_one_outcome(kind: type[FtjobError]) -> None:
    ending = ending_of(kind("what happened", hint="what to try"))
    assert (ending.message, ending.hint) == ("what happened", "what to try")
    assert (ending.outcome is Outcome.BAD_INPUT) == issubclass(kind, BadInput)
    assert is_worth_another_attempt(EXIT_CODES[ending.outcome]) == issubclass(kind, Unreachable)
