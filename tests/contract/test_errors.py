"""The error tree."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from job.contract import errors
from job.contract.errors import FtjobError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


def drawn() -> dict[str, str]:
    """Each error in the drawing of the docstring, with the one above it."""
    above: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+(?: / \w+)*)(?:  |$)", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        path = path[:depth]
        for name in found[2].split(" / "):
            above[name] = path[-1] if path else "Exception"
        path.append(found[2].split(" / ")[-1])
    return above


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    assert drawn() == {kind.__name__: kind.__mro__[1].__name__ for kind in KINDS}
    assert len(KINDS) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_and_what_next_and_survives_a_process_border(kind: type[FtjobError]) -> None:
    error = kind("what, which, why", hint="try this")
    assert str(error) == "what, which, why (try this)"
    assert str(kind("only what")) == "only what"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(again) is kind
        assert (again.message, again.hint) == ("what, which, why", "try this")


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_sentence_of_its_own(kind: type[FtjobError]) -> None:
    assert kind.__doc__
    assert kind.__doc__.splitlines()[0].endswith(".")
