"""A recipe as a file: what a person wrote is read, and refused in sentences; and the schema that editors hold it to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.contract.errors import RecipeInvalid
from job.contract.recipe import Recipe


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        RecipeInvalid: it cannot be read, is not JSON (with line and column), or breaks a bound (with every key).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeInvalid(f"recipe {path} does not exist", hint="start from examples/quickstart.json") from error
    except (OSError, ValueError) as error:  # not UTF-8, or a path that cannot be one
        raise RecipeInvalid(f"recipe {path} cannot be read: {error}") from error
    return parse_recipe(text, name=str(path))


def parse_recipe(text: str, *, name: str) -> Recipe:
    """The recipe in a text; `name` is what errors call it.

    Raises:
        RecipeInvalid: as `read_recipe`.
    """
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicate_keys)
    except json.JSONDecodeError as error:
        raise RecipeInvalid(
            f"recipe {name} is not JSON: {error.msg.removesuffix(' at')} at line {error.lineno} column {error.colno}",
            hint="`ftjob schema` prints the JSON Schema that editors complete and check against",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeInvalid(
            f"recipe {name} is nested too deeply, or holds a number of thousands of digits", hint="this is no recipe"
        ) from error
    except _DuplicateKeyError as error:
        raise RecipeInvalid(f"recipe {name} has the key {error.args[0]!r} twice", hint="keep one") from error
    if isinstance(data, dict):
        data.pop("$schema", None)  # editors find the JSON Schema through it
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeInvalid(
            f"recipe {name}: " + "; ".join(_describe(detail) for detail in error.errors()),
            hint="`ftjob schema` lists every key with its bounds",
        ) from error


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, as editors want it."""
    schema = Recipe.model_json_schema()
    # A recipe may name its schema, and a closed object would refuse that key.
    schema["properties"] = {"$schema": {"type": "string"}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ftjob recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }


class _DuplicateKeyError(Exception):
    pass


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _DuplicateKeyError(key)
        seen[key] = value
    return seen


def _describe(detail: Any) -> str:
    where = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "extra_forbidden":
            return f"{where} is not a key of a recipe"
        case "missing":
            return f"{where} is missing"
        case "model_type" | "model_attributes_type":
            says = "should be an object"
        case "bool_type":
            says = "should be true or false"
        case _:
            says = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    value = detail["input"]
    shown = "" if isinstance(value, dict) else f" (it is {_shorten(json.dumps(value, default=str))})"
    return (
        f"{where or 'it'} {says}{shown}"
        if says.startswith("should")
        else f"{where + ': ' if where else ''}{says}{shown}"
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
