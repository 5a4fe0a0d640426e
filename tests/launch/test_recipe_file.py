"""A recipe that somebody wrote: what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.errors import RecipeInvalid
from launch.recipe_file import parse_recipe, read_recipe
from tests.contract.bounds import REFUSED, SECTIONS, with_value
from tests.contract.examples import recipe, recipe_data

JARGON = re.compile(
    r"constrained|literal\[|function-|tuple\[|union|tag|pydantic|Input|dictionary|instance of|\bNone\b|\bTrue\b"
    r"|model_type|Value error"
)


def text_with(path: str, value: object) -> str:
    return json.dumps(with_value(path, value))


@pytest.mark.parametrize(("path", "value"), REFUSED)
def test_a_value_beyond_its_bounds_is_refused_in_one_readable_sentence_that_names_the_key(
    path: str, value: object
) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe(text_with(path, value), name="my/recipe.json")
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
        parse_recipe(text_with(path, "@").replace('"@"', number), name="r")


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
        parse_recipe(text_with(path, value), name="r")
    assert caught.value.message.startswith(f"recipe r: {path} {sentence}")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_refuses_an_unknown_key_and_anything_but_an_object(section: str) -> None:
    with pytest.raises(RecipeInvalid, match=re.escape(f"{section}.strength is not a key of a recipe")):
        parse_recipe(text_with(f"{section}.strength", 1), name="r")
    values: tuple[object, ...] = (1, "text", [], True)
    for value in values:
        with pytest.raises(RecipeInvalid, match=re.escape(f"{section} should be an object")):
            parse_recipe(text_with(section, value), name="r")


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
        parse_recipe(text_with("method", "x" * 10_000), name="r")
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


def test_the_key_for_editors_is_allowed_at_the_top_only() -> None:
    assert parse_recipe(text_with("$schema", "recipe.schema.json"), name="r") == recipe()
    with pytest.raises(RecipeInvalid, match=r"lora\.\$schema is not a key"):
        parse_recipe(text_with("lora.$schema", "x"), name="r")


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
