"""What a base model's files say of its tokens: at which an answer ends, and which texts are control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from job.contract.errors import ModelInvalid

_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MARKUP: Final = frozenset("<>[]{}|")
"""Every control token has one of them; blanks and words that were added to a vocabulary do not."""
_REASONING: Final = frozenset({"<think>", "</think>"})
"""Answers of reasoning data hold them, and templates expect them there."""


def stop_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens at which inference ends an answer: eos_token_id of generation_config.json and of config.json, and the
    tokenizer's own. Servers look at all three (Gemma's <end_of_turn> stands in generation_config.json only).

    Raises:
        ModelInvalid: a file is there and is not JSON, or names something else than numbers.
    """
    config = read_object(folder / "config.json")
    text = config.get("text_config")  # of a model that sees, too
    found = _numbers(read_object(folder / "generation_config.json"), "generation_config.json")
    found |= _numbers(config, "config.json") | _numbers(text if isinstance(text, dict) else {}, "config.json")
    return frozenset(found if tokenizer.eos_token_id is None else found | {tokenizer.eos_token_id})


def _numbers(data: dict[str, Any], name: str) -> set[int]:
    value = data.get("eos_token_id")
    named = value if isinstance(value, list) else [] if value is None else [value]
    for one in named:
        if type(one) is not int:  # True is an int
            raise ModelInvalid(f"eos_token_id in {name} is not a number: {one!r}", hint="write a token's number there")
    return set(named)


def control_tokens(folder: Path) -> frozenset[str]:
    """Texts that the tokenizer turns into a control token wherever they stand, also in what a person wrote.

    Left out is what may be said: blanks, single bytes, words, <think>, and pairs of tags that are not special
    (<tool_call> and </tool_call>, <table> and </table>).

    Raises:
        ModelInvalid: a file is there and is not JSON.
    """
    special: dict[str, bool] = {}
    for text, is_special in _added_tokens(folder):
        special[text] = special.get(text, False) or is_special
    return frozenset(text for text, is_special in special.items() if not _may_be_said(text, is_special, special))


def _may_be_said(text: str, is_special: bool, special: dict[str, bool]) -> bool:
    if text in _REASONING or _BYTE.fullmatch(text) or not _MARKUP.intersection(text):
        return True
    if is_special:
        return False
    inside = text.removeprefix("</").removeprefix("<").removesuffix(">")
    return f"<{inside}>" in special and f"</{inside}>" in special


def _added_tokens(folder: Path) -> Iterator[tuple[str, bool]]:
    """(text, whether it is special) of every token that was added to the vocabulary, from all files that list them."""
    whole = read_object(folder / "tokenizer.json")
    config = read_object(folder / "tokenizer_config.json")
    listed = whole.get("added_tokens")
    decoder = config.get("added_tokens_decoder")
    for one in [
        *(listed if isinstance(listed, list) else []),
        *(decoder.values() if isinstance(decoder, dict) else []),
    ]:
        if isinstance(one, dict) and isinstance(one.get("content"), str):
            yield one["content"], one.get("special") is True
    for text in read_object(folder / "added_tokens.json"):
        yield text, False
    for holder in (config, read_object(folder / "special_tokens_map.json")):
        for key, value in holder.items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                yield from ((text, True) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """A special token is written as a text, or as an object with its content; several, as a list or by name."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file.

    Raises:
        ModelInvalid: it cannot be read, or is no object.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelInvalid(f"the base model's {path.name} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelInvalid(f"the base model's {path.name} is not an object")
    return data
