"""The recipe: what is taken, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from job.contract.errors import RecipeInvalid
from job.contract.recipe import (
    LARGE_MODEL_PARAMETERS,
    BaseModelRef,
    Recipe,
    parse_recipe,
    read_recipe,
    resolve_learning_rate,
)
from tests.contract.examples import recipe, recipe_data

JARGON = re.compile(
    r"constrained|literal\[|function-|tuple\[|union|tag|pydantic|Input|dictionary|instance of|\bNone\b|\bTrue\b"
    r"|model_type|Value error"
)


def with_value(path: str, value: object) -> str:
    data = recipe_data()
    *sections, key = path.split(".")
    place = data
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return json.dumps(data)


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


BOUNDS: Mapping[str, tuple[list[object], list[object]]] = {
    # key: what is taken, up to the very bounds; what is refused, from just beyond them
    "base_model.id": (
        ["m", "./folder", "org/model", "builtin:tiny", "s3://b/m", "file:///m"],
        ["", 1, None, ["m"], True],
    ),
    "base_model.revision": (["main", None], ["", 1, True]),
    "dataset.train": (["rows.jsonl", "s3://b/rows.jsonl"], ["", 1, None, 0.5, ["a"]]),
    "dataset.held_out": ([0.5, 1e-9, "rows.jsonl", None], [0, 0.0, -0.1, 0.500001, 1, 1e308, "", [], {}, True, False]),
    "method": (["qlora", "lora"], ["full", "QLORA", "", None, 1]),
    "lora.rank": ([1, 512], [0, 513, -1, 16.0, 1.5, "16", True, None]),
    "lora.alpha": ([1, 2048], [0, 2049, 32.0, "32", None]),
    "lora.dropout": ([0, 0.0, 0.999], [-0.001, 1, 1.0, "0", True, None]),
    "lora.target_modules": (["all-linear", ["q_proj"], ["a", "b"]], ["q_proj", [], [""], ["a", 1], None, 1, {"a": 1}]),
    "lora.dora": ([True, False], [1, 0, "true", None]),
    "training.epochs": ([1, 1000], [0, 1001, 3.0, "3", True, None]),
    "training.learning_rate": ([1, 1e-9, "auto"], [0, -1e-4, 1.001, "2e-4", "", None, True]),
    "training.scheduler": (["cosine", "linear", "constant", "constant_with_warmup"], ["Cosine", "", None, 1]),
    "training.warmup_ratio": ([0, 0.5], [-0.01, 0.51, "0.03", None]),
    "training.batch_size": ([1, 1024], [0, 1025, 2.0, "2", None]),
    "training.gradient_accumulation": ([1, 4096], [0, 4097, 2.0, "2", None]),
    "training.max_length": ([16, 1_048_576], [15, 1_048_577, 2048.0, "2048", None]),
    "training.packing": ([True, False], [1, "no", None]),
    "training.seed": ([0, 2**32 - 1], [-1, 2**32, 10**30, 1.0, "42", None]),
    "training.optimizer": (["adamw", "adamw_8bit", "paged_adamw_8bit"], ["sgd", "", None]),
    "training.precision": (["bf16", "fp8"], ["fp16", "", None]),
    "training.reproducible": ([True, False], [1, "yes", None]),
    "training.weight_decay": ([0, 1], [-0.1, 1.1, "0", None]),
    "training.max_grad_norm": ([1e-9, 100], [0, -1, 100.1, "1", None]),
    "training.early_stopping.patience": ([1, 100], [0, 101, 1.0, "1", None]),
    "training.early_stopping.min_delta": ([0, 0.5, 1000], [-0.1, "0", None]),
    "checkpoints.minutes": ([1e-9, 1440, "auto"], [0, -1, 1440.1, "5", "", None, True]),
    "checkpoints.keep": ([2, 1000], [1, 0, 1001, 2.0, "3", None]),
    "output.bucket": (["s3://b", None], ["", 1, True]),
    "budget.max_usd": ([0.01, 40, 1e9, None], [0, -1, "40", True]),
    "budget.max_hourly_usd": ([0.01, 3, None], [0, -1, "3", True]),
    "budget.deadline": (
        [None],
        ["tomorrow", "2026-12-01", "2026-12-01T18:00:00", "0001-01-01T00:00:00+14:00", True, ["x"]],
    ),
}
SECTIONS = ["base_model", "dataset", "lora", "training", "training.early_stopping", "checkpoints", "output", "budget"]

TAKEN = [(path, value) for path, (taken, _) in BOUNDS.items() for value in taken]
REFUSED = [(path, value) for path, (_, refused) in BOUNDS.items() for value in refused]


def test_the_table_of_bounds_holds_every_key_of_a_recipe() -> None:
    assert set(BOUNDS) == set(leaves(Recipe))


@pytest.mark.parametrize(("path", "value"), TAKEN)
def test_a_value_within_its_bounds_is_taken_as_it_is(path: str, value: object) -> None:
    taken = read_back(parse_recipe(with_value(path, value), name="r"), path)
    assert (list(taken) if isinstance(taken, tuple) else taken) == value


@pytest.mark.parametrize(("path", "value"), REFUSED)
def test_a_value_beyond_its_bounds_is_refused_in_one_readable_sentence_that_names_the_key(
    path: str, value: object
) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(with_value(path, value), name="my/recipe.json")
    said = caught.value.message
    named = path if path != "lora.target_modules" or value != [] else "lora: target_modules"
    assert said.startswith(f"recipe my/recipe.json: {named}")
    assert said.count("should") <= 1, said
    assert not JARGON.search(said), said
    assert caught.value.hint == "`ftjob schema` lists every key with its bounds"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("path", ["dataset.held_out", "training.learning_rate", "lora.dropout", "checkpoints.minutes"])
def test_what_is_no_number_is_refused(path: str, number: str) -> None:
    with pytest.raises(RecipeInvalid, match=re.escape(path)):
        parse_recipe(with_value(path, "@").replace('"@"', number), name="r")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("dataset.held_out", 0.6, "should be a fraction above 0 and up to 0.5, a uri, or null (it is 0.6)"),
        ("training.learning_rate", "fast", 'should be a number above 0 and up to 1, or "auto" (it is "fast")'),
        ("checkpoints.minutes", 0, 'should be a number above 0 and up to 1440, or "auto" (it is 0)'),
        ("lora.target_modules", "q", 'should be "all-linear" or a list of module names (it is "q")'),
        ("lora.rank", "16", 'should be a valid integer (it is "16")'),
        ("lora.rank", 0, "should be greater than or equal to 1 (it is 0)"),
        ("lora.dora", "yes", 'should be true or false (it is "yes")'),
        ("lora.dora", None, "should be true or false (it is null)"),
        ("method", "full", "should be 'qlora' or 'lora' (it is \"full\")"),
        ("lora", 3, "should be an object (it is 3)"),
        ("lora.rnak", 3, "is not a key of a recipe"),
        ("strategy", 3, "is not a key of a recipe"),
        ("training.floats", 3, "is not a key of a recipe"),
        ("dataset.train", "\ud800", "should be a valid string"),
    ],
)
def test_the_sentences(path: str, value: object, sentence: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(with_value(path, value), name="r")
    assert caught.value.message.startswith(f"recipe r: {path} {sentence}")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_refuses_an_unknown_key_and_anything_but_an_object(section: str) -> None:
    with pytest.raises(RecipeInvalid, match=re.escape(f"{section}.strength is not a key of a recipe")):
        parse_recipe(with_value(f"{section}.strength", 1), name="r")
    values: tuple[object, ...] = (1, "text", [], True)
    for value in values:
        with pytest.raises(RecipeInvalid, match=re.escape(f"{section} should be an object")):
            parse_recipe(with_value(section, value), name="r")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeInvalid, match=r"recipe r: base_model\.id is missing; dataset is missing"):
        parse_recipe('{"base_model": {}}', name="r")


def test_all_faults_are_told_at_once() -> None:
    data = recipe_data(lora={"rank": 0, "alpha": 0}, training={"epoch": 3})
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(json.dumps(data), name="r")
    for part in ("lora.rank should", "lora.alpha should", "training.epoch is not a key of a recipe"):
        assert part in caught.value.message


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(with_value("method", "x" * 10_000), name="r")
    assert len(caught.value.message) < 250


@pytest.mark.parametrize("text", ["[]", "1", '"text"', "null", "true", "[1, 2]"])
def test_what_is_no_object_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeInvalid, match=r"recipe r: it should be an object \(it is"):
        parse_recipe(text, name="r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value at line 1 column 1"),
        ('{\n  "method": "qlora"\n  "lora": {}\n}', "Expecting ',' delimiter at line 3 column 3"),
        ('{\n  "method": qlora\n}', "Expecting value at line 2 column 13"),
        ('{"method": "qlora"', "at line 1 column 19"),
        ('{"method": "qlora', "Unterminated string starting at line 1 column 12"),
    ],
)
def test_what_is_no_json_is_refused_with_line_and_column(text: str, message: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(text, name="r")
    assert caught.value.message.startswith("recipe r is not JSON: ")
    assert caught.value.message.endswith(message)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"training": {"seed": ' + "1" * 5000 + "}}"])
def test_json_that_only_looks_like_it_is_refused(text: str) -> None:
    with pytest.raises(RecipeInvalid, match="nested too deeply, or holds a number of thousands of digits"):
        parse_recipe(text, name="r")


@pytest.mark.parametrize("text", ['{"method": "lora", "method": "qlora"}', '{"lora": {"method": 1, "method": 1}}'])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(RecipeInvalid, match="recipe r has the key 'method' twice"):
        parse_recipe(text, name="r")


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_a_recipe_or_refused(text: str) -> None:
    with pytest.raises(RecipeInvalid):
        parse_recipe(text, name="r")


def test_early_stopping_needs_something_to_watch() -> None:
    data = recipe_data(training={"early_stopping": {}})
    data["dataset"]["held_out"] = None
    with pytest.raises(RecipeInvalid, match=r"training\.early_stopping needs held-out rows: set dataset\.held_out"):
        parse_recipe(json.dumps(data), name="r")


@pytest.mark.parametrize(
    "folder", ["/models/x", "./x", "../x", "~/x", ".", "..", "builtin:tiny", "s3://b/m", "file:///m"]
)
def test_a_revision_is_for_the_hub_only(folder: str) -> None:
    data = recipe_data(base_model={"id": folder, "revision": "main"})
    with pytest.raises(RecipeInvalid, match="revision is for hub ids only"):
        parse_recipe(json.dumps(data), name="r")


@pytest.mark.parametrize(
    "place", ["https://huggingface.co/org/model", "gs://b/m", "hf://org/model", "S3://b/m", "://m"]
)
def test_a_base_model_in_a_place_that_cannot_be_read_from_is_refused(place: str) -> None:
    with pytest.raises(RecipeInvalid, match=r"base_model: id .* cannot be read from.*s3://bucket/prefix"):
        parse_recipe(json.dumps(recipe_data(base_model={"id": place})), name="r")


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


def test_the_key_for_editors_is_allowed_at_the_top_only() -> None:
    assert parse_recipe(with_value("$schema", "recipe.schema.json"), name="r") == recipe()
    with pytest.raises(RecipeInvalid, match=r"lora\.\$schema is not a key"):
        parse_recipe(with_value("lora.$schema", "x"), name="r")


# Files


def test_a_file_is_read_with_a_byte_order_mark_too(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_data()), encoding="utf-8-sig")
    assert read_recipe(path) == recipe()


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.json"
    latin.write_bytes('{"é": 1}'.encode("latin-1"))
    for path, why in [
        (tmp_path / "missing.json", "does not exist"),
        (tmp_path, "cannot be read"),
        (latin, "cannot be read"),
        (Path("a\0b"), "cannot be read"),
    ]:
        with pytest.raises(RecipeInvalid) as caught:
            read_recipe(path)
        assert caught.value.message.startswith(f"recipe {path} {why}")


# The value


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
    assert parse_recipe(text, name="r").digest() == parse_recipe(other, name="r").digest()


def test_the_digest_ignores_where_the_dataset_lies_because_its_bytes_have_digests_of_their_own() -> None:
    here = recipe(dataset={"train": "file:///here/t.jsonl", "held_out": "file:///here/h.jsonl"})
    there = recipe(dataset={"train": "s3://there/t.jsonl", "held_out": "s3://there/h.jsonl"})
    assert here.digest() == there.digest()
    assert here.digest() != recipe(dataset={"train": "file:///here/t.jsonl"}).digest()


DECISIVE = sorted(p for p in BOUNDS if not p.startswith(("output", "checkpoints", "budget")) and p != "dataset.train")


@pytest.mark.parametrize("path", DECISIVE)
def test_the_digest_sees_every_key_that_decides_the_weights(path: str) -> None:
    digests = {parse_recipe(with_value(path, value), name="r").digest() for value in BOUNDS[path][0]}
    digests.add(recipe(training={"early_stopping": {}}).digest() if "early" in path else recipe().digest())
    assert len(digests) > 1


@given(st.sampled_from(TAKEN))
def test_a_recipe_survives_being_stored(case: tuple[str, Any]) -> None:
    taken = parse_recipe(with_value(*case), name="r")
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
