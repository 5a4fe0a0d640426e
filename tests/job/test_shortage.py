"""Promise: out of memory is one message, with the numbers and the settings that would help this recipe most."""

from __future__ import annotations

from typing import Any

import pytest

from job.contract.errors import BadInput, TrainingFailed
from job.contract.outcome import EXIT_CODES, Outcome, is_worth_another_attempt
from job.contract.recipe import Recipe
from job.shortage import Batch, Footprint, out_of_memory, remedies
from tests.contract.examples import recipe_data

GIB = 2**30
H100 = Footprint("NVIDIA H100 80GB HBM3", total=79 * GIB, peak=78 * GIB, model=6 * GIB, adapter_weights=40_000_000)


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(recipe_data() | sections)


def test_it_names_the_batch_the_gpu_and_the_numbers_and_the_three_settings() -> None:
    training = {"batch_size": 4, "gradient_accumulation": 2, "max_length": 4096, "packing": False}
    error = out_of_memory(
        f"in the rehearsal of the costliest batch, {Batch(rows=4, tokens=16384, packed=False).text}",
        "2.00 GiB",
        recipe(training=training, lora={"rank": 64, "alpha": 128}),
        H100,
        [100, 4096, 3000, 2048],
    )
    assert error.message == (
        "out of memory in the rehearsal of the costliest batch, 4 rows x 4,096 tokens = 16,384 (the last request was "
        "for 2.00 GiB): NVIDIA H100 80GB HBM3 has 79.0 GiB, the model alone takes 6.0 GiB, and 78.0 GiB were taken at "
        "the peak"
    )
    assert error.hint == (
        "a new run with one of these, the most helpful first: training.batch_size 4 -> 2 with "
        "training.gradient_accumulation 2 -> 4 (the same effective batch); training.max_length 4096 -> 2048 (cuts 2 of "
        "4 rows); lora.rank 64 -> 32 with lora.alpha 128 -> 64. Or this run on a GPU with more memory"
    )


def test_it_is_a_failure_that_neither_skypilot_nor_the_local_supervisor_starts_again() -> None:
    error: Exception = out_of_memory("", "", recipe(), H100, [])
    assert isinstance(error, TrainingFailed)
    assert not isinstance(error, BadInput)
    assert not is_worth_another_attempt(EXIT_CODES[Outcome.FAILED])


@pytest.mark.parametrize(("size", "smaller", "accumulation"), [(4, 2, 8), (6, 3, 8), (9, 3, 12), (7, 1, 28)])
def test_a_smaller_batch_is_the_same_effective_batch(size: int, smaller: int, accumulation: int) -> None:
    how = {"batch_size": size, "gradient_accumulation": 4}
    first = remedies(recipe(training=how), H100, [])[0]
    assert f"{size} -> {smaller} with training.gradient_accumulation 4 -> {accumulation}" in first


def test_what_is_small_or_off_already_is_not_proposed() -> None:
    lean = recipe(
        lora={"rank": 1, "alpha": 1},
        training={"batch_size": 1, "max_length": 16, "optimizer": "paged_adamw_8bit"},
    )
    assert remedies(lean, H100, [16]) == []
    assert out_of_memory("", "", lean, H100, [16]).hint == "this run on a GPU with more memory"


def test_what_takes_most_comes_first() -> None:
    whole = Footprint("GPU", total=80 * GIB, peak=79 * GIB, model=75 * GIB, adapter_weights=10_000_000)
    assert remedies(recipe(method="lora"), whole, [])[0].startswith("method")
    wide = Footprint("GPU", total=80 * GIB, peak=79 * GIB, model=20 * GIB, adapter_weights=3 * GIB)
    assert remedies(recipe(lora={"rank": 512, "alpha": 512}), wide, [])[0].startswith("lora.rank 512 -> 256")


def test_shorter_is_measured_by_the_longest_row_where_rows_are_not_packed() -> None:
    how = {"packing": False, "max_length": 4096, "batch_size": 1}
    assert "training.max_length 4096 -> 500 (cuts 1 of 2 rows)" in remedies(recipe(training=how), H100, [1000, 90])
    assert "training.max_length 4096 -> 2048 (cuts no row)" in remedies(
        recipe(training=how | {"packing": True}), H100, [1000, 90]
    )


def test_a_packed_batch_tells_its_rows_and_tokens() -> None:
    assert Batch(rows=9, tokens=4096, packed=True).text == "9 packed rows, 4,096 tokens"
