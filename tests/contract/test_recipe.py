"""The recipe as a value: what is taken, its digest, its schema. How refusals read: tests/launch/test_recipe_file.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from job.contract.recipe import LARGE_MODEL_PARAMETERS, BaseModelRef, Recipe, resolve_learning_rate
from tests.contract.bounds import BOUNDS, REFUSED, TAKEN, with_value
from tests.contract.examples import recipe, recipe_data


def read_back(taken: Recipe, path: str) -> object:
    place: object = taken
    for key in path.split("."):
        place = getattr(place, key)
    return place


def leaves(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key of a recipe that is not a section."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if kind]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            yield path + name
        else:
            yield from leaves(section, f"{path}{name}.")


def test_the_table_of_bounds_holds_every_key_of_a_recipe() -> None:
    assert set(BOUNDS) == set(leaves(Recipe))


@pytest.mark.parametrize(("path", "value"), TAKEN)
def test_a_value_within_its_bounds_is_taken_as_it_is(path: str, value: object) -> None:
    taken = read_back(Recipe.model_validate(with_value(path, value)), path)
    assert (list(taken) if isinstance(taken, tuple) else taken) == value


@pytest.mark.parametrize(("path", "value"), REFUSED)
def test_a_value_beyond_its_bounds_is_refused(path: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(with_value(path, value))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *[("org/model", "hub"), ("gpt2", "hub"), ("s3.org/model", "hub"), ("s3://b/m", "bucket"), ("s3://b", "bucket")],
        *[
            ("file:///m", "here"),
            ("./m", "here"),
            ("/m", "here"),
            ("~", "here"),
            (".", "here"),
            ("builtin:tiny", "here"),
        ],
    ],
)
def test_an_id_says_by_itself_where_the_model_is(name: str, where: str) -> None:
    ref = BaseModelRef(id=name)
    assert (ref.is_on_hub, ref.is_in_bucket) == (where == "hub", where == "bucket")


def test_a_recipe_is_frozen() -> None:
    taken = recipe()
    with pytest.raises(ValidationError, match="frozen"):
        taken.method = "lora"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        taken.lora.rank = 8  # type: ignore[misc]
    assert hash(taken) == hash(recipe())


def test_the_digest_of_a_recipe_is_the_same_for_ever() -> None:
    # Stored with every run. If this fails, runs that exist can no longer be resumed: think twice before changing it.
    assert recipe(base_model={"id": "m"}, dataset={"train": "t"}).digest() == (
        "3bf905ba5173f02c21add58a963df1b0a4002e5b8e2762522170b4bf24774aa3"
    )


def test_the_digest_ignores_where_it_lands_and_how_often_it_is_saved() -> None:
    moved = recipe(output={"bucket": "s3://elsewhere"}, checkpoints={"minutes": 1, "keep": 9})
    assert moved != recipe()
    assert moved.digest() == recipe().digest()


def test_the_digest_does_not_see_how_the_recipe_was_written() -> None:
    text = json.dumps(recipe_data(lora={"rank": 8}, training={"learning_rate": 1}))
    other = json.dumps(dict(reversed(json.loads(text).items())), indent=4).replace(": 1\n", ": 1.0\n")
    assert other != text
    assert Recipe.model_validate(json.loads(text)).digest() == Recipe.model_validate(json.loads(other)).digest()


def test_the_digest_ignores_where_the_dataset_lies_because_its_bytes_have_digests_of_their_own() -> None:
    here = recipe(dataset={"train": "file:///here/t.jsonl", "held_out": "file:///here/h.jsonl"})
    there = recipe(dataset={"train": "s3://there/t.jsonl", "held_out": "s3://there/h.jsonl"})
    assert here.digest() == there.digest()
    assert here.digest() != recipe(dataset={"train": "file:///here/t.jsonl"}).digest()


DECISIVE = sorted(p for p in BOUNDS if not p.startswith(("output", "checkpoints", "budget")) and p != "dataset.train")


@pytest.mark.parametrize("path", DECISIVE)
def test_the_digest_sees_every_key_that_decides_the_weights(path: str) -> None:
    digests = {Recipe.model_validate(with_value(path, value)).digest() for value in BOUNDS[path][0]}
    digests.add(recipe(training={"early_stopping": {}}).digest() if "early" in path else recipe().digest())
    assert len(digests) > 1


@given(st.sampled_from(TAKEN))
def test_a_recipe_survives_being_stored(case: tuple[str, Any]) -> None:
    taken = Recipe.model_validate(with_value(*case))
    again = Recipe.model_validate_json(taken.model_dump_json())
    assert again == taken
    assert again.digest() == taken.digest()


def test_the_json_schema_is_closed_and_tells_bounds_and_both_ways_to_write_a_value() -> None:
    schema = Recipe.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for key, field in part["properties"].items():
            assert "description" in field or "$ref" in field or key == "early_stopping", key
    assert schema["$defs"]["Lora"]["properties"]["rank"]["maximum"] == 512
    kinds = [kind.get("type") for kind in schema["$defs"]["DatasetRef"]["properties"]["held_out"]["anyOf"]]
    assert kinds == ["number", "string", "null"]


def test_auto_learning_rate_falls_for_large_models_and_a_number_is_kept() -> None:
    assert resolve_learning_rate(recipe(), LARGE_MODEL_PARAMETERS - 1) == 2e-4
    assert resolve_learning_rate(recipe(), LARGE_MODEL_PARAMETERS) == 1e-4
    assert resolve_learning_rate(recipe(training={"learning_rate": 3e-5}), LARGE_MODEL_PARAMETERS) == 3e-5
