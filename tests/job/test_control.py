"""Promise: it is known at which tokens inference ends an answer, and which texts no one may write by accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from job.contract.errors import ModelInvalid
from job.dataset.control import control_tokens, stop_tokens
from job.tiny import SPECIAL_TOKENS, write_tiny_model
from tests.job.templates import FAMILIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # nothing here needs weights
    return tmp_path


def change(path: Path, **keys: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | keys))


def stops_of(folder: Path) -> frozenset[int]:
    return stop_tokens(folder, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def test_the_built_in_model_stops_at_the_end_of_a_turn(folder: Path) -> None:
    assert stops_of(folder) == {258}
    assert control_tokens(folder) == set(SPECIAL_TOKENS)


@pytest.mark.parametrize(("named", "found"), [(7, {7, 258}), ([7, 8], {7, 8, 258}), (None, {258}), ([], {258})])
def test_generation_config_names_one_stop_token_or_several(folder: Path, named: Any, found: set[int]) -> None:
    change(folder / "generation_config.json", eos_token_id=named)
    assert stops_of(folder) == found


def test_config_and_the_part_of_it_that_is_about_text_name_them_too(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=[3], text_config={"eos_token_id": 4})
    assert stops_of(folder) == {3, 4, 258}


def test_the_tokenizers_own_is_enough(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert stops_of(folder) == {258}


@pytest.mark.parametrize("named", ["</s>", [1, "</s>"], True, 1.5, {"id": 1}])
def test_a_stop_token_that_is_not_a_number_is_refused(folder: Path, named: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    change(folder / "generation_config.json", eos_token_id=named)
    with pytest.raises(ModelInvalid, match=r"eos_token_id in generation_config\.json is not a number"):
        stop_tokens(folder, tokenizer)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("text", "why"), [(b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[]", "an object")])
def test_a_damaged_file_is_refused_by_its_name(folder: Path, name: str, text: bytes, why: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    (folder / name).write_bytes(text)
    with pytest.raises(ModelInvalid, match=rf"{name} .*{why}"):
        stop_tokens(folder, tokenizer)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_control_token_of_a_family_is_known_but_for_the_reasoning(family: Any, tmp_path: Path) -> None:
    found = control_tokens(family.write(tmp_path))
    assert found == set(family.control) - {"<think>", "</think>"}
    assert set(family.stops or (family.eos,)) <= found


def test_what_may_be_said_is_no_control_token(folder: Path) -> None:
    """Added tokens as Phi, Gemma, Llama 2 and Qwen have them, and as people add words of their trade."""
    harmless = [
        "  ",
        "\n\n",
        "▁▁",
        "<0x0A>",
        "<table>",
        "</table>",
        "<tool_call>",
        "</tool_call>",
        "metformin",
        "x-ray",
    ]
    control = ["<start_of_turn>", "[INST]", "<|fim_prefix|>", "<unused5>"]
    listed = [{"content": text, "special": False} for text in [*harmless, *control]]
    change(folder / "tokenizer.json", added_tokens=[*listed, {"content": "<s>", "special": True}])
    assert control_tokens(folder) == {*control, "<s>", "<|im_end|>", "<|pad|>"}  # the last two: of tokenizer_config


def test_a_pair_of_special_tokens_is_not_a_pair_of_tags(folder: Path) -> None:
    change(folder / "tokenizer.json", added_tokens=[{"content": text, "special": True} for text in ("<s>", "</s>")])
    assert {"<s>", "</s>"} <= control_tokens(folder)


def test_every_file_that_may_list_them_is_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder={"9": {"content": "<|a|>", "special": True}},
        additional_special_tokens=["<|b|>", {"content": "<|c|>"}],
        extra_special_tokens={"image_token": "<|d|>"},
        bos_token={"content": "<|e|>"},
    )
    change(folder / "added_tokens.json", **{"<|f|>": 12})
    change(folder / "special_tokens_map.json", unk_token="<|g|>")
    assert {f"<|{letter}|>" for letter in "abcdefg"} <= control_tokens(folder)


def test_no_files_no_control_tokens(tmp_path: Path) -> None:
    assert control_tokens(tmp_path) == frozenset()
