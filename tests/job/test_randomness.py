"""Promise: a random state that was taken can be put back, and what is kept undisturbed is not moved."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from job.randomness import random_state, set_random_state, undisturbed
from job.tensors import freeze, load_tree
from tests.job import stack  # noqa: F401  one torch thread


def draws() -> tuple[object, ...]:
    """From each generator, of each kind that keeps something back for the next time."""
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),  # the global generator is what libraries use
        float(np.random.normal()),
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
        torch.randperm(5).tolist(),
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()  # an odd number of gausses: half a pair waits in python's and numpy's generators


def test_a_state_survives_its_file_and_the_generators_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    freeze(random_state()).save(tmp_path / "random")
    expected = [draws() for _ in range(3)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert draws() != expected[0]
    set_random_state(load_tree(tmp_path / "random"))
    assert [draws() for _ in range(3)] == expected


def test_taking_the_state_moves_nothing() -> None:
    state = random_state()
    random_state()
    first = draws()
    set_random_state(state)
    assert draws() == first


def test_undisturbed_leaves_all_generators_as_they_were() -> None:
    with undisturbed():
        first = draws()
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
    assert draws() == first


def test_undisturbed_holds_when_what_is_inside_fails() -> None:
    inside: list[tuple[object, ...]] = []

    @undisturbed()
    def fail() -> None:
        inside.append(draws())
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draws() == inside[0]
