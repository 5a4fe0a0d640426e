"""Promise: a row that the base model cannot take, or could only learn wrongly, is refused before its weights come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from job.contract.errors import ModelInvalid
from job.dataset.bounds import Bounds, bounds_of
from job.dataset.reader import LineNumber, Message, Row
from job.dataset.render import Renderer
from job.tiny import SPECIAL_TOKENS, write_tiny_model
from job.tokenising import Measured, Refusal, Rendering, measure_rows
from tests.job.templates import FAMILIES


def row(answer: str, line: int = 1) -> Row:
    return Row(LineNumber(line), (Message("user", "hello"), Message("assistant", answer)))


def configured(folder: Path, **keys: Any) -> Path:
    """The built-in model's small files, with other keys in its config.json."""
    write_tiny_model(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def measured(folder: Path, *rows: Row, max_length: int = 1000) -> list[Measured | Refusal]:
    return list(measure_rows(rows, Rendering(folder, max_length), processes=1))


def test_the_built_in_model_knows_all_of_its_tokens(tmp_path: Path) -> None:
    [found] = measured(configured(tmp_path), row("as you say 🎉"))
    assert isinstance(found, Measured)
    assert found.warnings == ()


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    """A tokenizer with added tokens, and a model that was never resized: on a GPU that is an assertion, and a bill."""
    last = 255 + len(SPECIAL_TOKENS)
    with pytest.raises(ModelInvalid, match=rf"holds '<\|im_end\|>', token {last} of .* embeddings for {last} "):
        Rendering(configured(tmp_path, vocab_size=last), 1000).open()


def test_a_row_alone_may_hold_a_token_without_an_embedding(tmp_path: Path) -> None:
    configured(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(path))
    good, bad = measured(tmp_path, row("yes"), row("<think>no", line=2))
    assert isinstance(good, Measured)
    assert isinstance(bad, Refusal)
    assert (bad.line, bad.code) == (2, "no-embedding")


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
def test_the_part_about_text_counts_in_a_model_that_sees(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: 7, "text_config": {key: 9}}))
    assert 9 in (bounds_of(tmp_path).tokens, bounds_of(tmp_path).positions)


def test_what_a_config_does_not_tell_is_no_bound(tmp_path: Path) -> None:
    assert bounds_of(tmp_path) == Bounds()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": True, "n_positions": "many", "text_config": []}))
    assert bounds_of(tmp_path) == Bounds()


def test_a_row_longer_than_the_model_was_made_for_is_told(tmp_path: Path) -> None:
    folder = configured(tmp_path, max_position_embeddings=64)
    short, long = measured(folder, row("yes"), row("x" * 100))
    assert isinstance(short, Measured)
    assert isinstance(long, Measured)
    assert ([code for code, _, _ in short.warnings], [code for code, _, _ in long.warnings]) == ([], ["beyond-context"])
    [cut] = measured(folder, row("x" * 100), max_length=64)
    assert isinstance(cut, Measured)
    assert "beyond-context" not in [code for code, _, _ in cut.warnings]


def test_a_row_at_which_the_model_would_fail_is_refused(tmp_path: Path) -> None:
    """GPT-2 looks its positions up in a table."""
    folder = configured(tmp_path, model_type="gpt2", max_position_embeddings=64)
    short, long = measured(folder, row("yes"), row("x" * 100, line=2))
    assert isinstance(short, Measured)
    assert isinstance(long, Refusal)
    assert (long.line, long.code) == (2, "beyond-context")
    assert "max_length to 64" in long.hint


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "t5", "of-their-own-code"])
def test_what_is_no_language_model_of_transformers_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelInvalid, match=f"of the type '{kind}', and transformers has no language model"):
        Rendering(configured(tmp_path, model_type=kind), 1000).open()


def test_an_answer_with_a_character_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    """Without bytes to fall back on it writes <unk>, and the model would learn to say that."""
    family = replace(FAMILIES["mistral-0.1"], control=("<s>", "</s>"))
    folder = family.write(tmp_path)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["byte_fallback"] = False
    path.write_text(json.dumps(whole))
    good, asked, bad = measured(
        folder,
        row("as you say"),
        Row(LineNumber(2), (Message("user", "漢"), Message("assistant", "us"))),
        row("us 漢字", line=3),
    )
    assert isinstance(good, Measured)
    assert isinstance(asked, Measured)  # that it is asked so is no harm
    assert isinstance(bad, Refusal)
    assert (bad.line, bad.code) == (3, "unknown-character")
    assert "'漢" in bad.message
    assert "<unk>" in bad.message


def test_where_bytes_are_fallen_back_on_every_character_is_known(tmp_path: Path) -> None:
    [found] = measured(FAMILIES["mistral-0.1"].write(tmp_path), row("us 漢字 🎉"))
    assert isinstance(found, Measured)


def test_bounds_are_none_unless_they_are_told(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    renderer = Renderer(tokenizer, max_length=10_000, stops=frozenset({tokenizer.eos_token_id}))
    assert renderer.render(row("x" * 9000)).notes == ()
