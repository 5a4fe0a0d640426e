"""Promise: the built-in model is an ordinary folder, and the same bytes on every machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.tiny import SPECIAL_TOKENS, write_tiny_model
from job.weights import Base
from tests.job import stack

GOLDEN = {
    "config.json": "53426a71fbf671652cae440397b7c2ea99184b2c7b23f061331e58996580a23b",
    "model.safetensors": "6cb0432eb25afdf3b81a35c7dfc2f82adafe44f3c279dda063ebd2bd022bdf62",
    "tokenizer.json": "7d03bd786c1ab5555f6eed23ee96d3c6e0cefc322fa42fd4653893c09b2f017f",
    "tokenizer_config.json": "c2f37ad1f576aaaab1fe702292298dedf559731657e5a1bda7d7e1a989cb0682",
}
"""A change here changes every quickstart's adapter, and refuses the resume of runs that are under way."""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_these_are_its_bytes(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    assert digests(tmp_path) == GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, name: str) -> None:
    """One that another attempt may find free again, and no bug: the libraries that make the files say otherwise."""
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_tiny_model(tmp_path)


def test_writing_it_again_over_a_torn_one_gives_the_same_bytes(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "folder" / "below")
    (tmp_path / "folder" / "below" / "model.safetensors").write_bytes(b"torn")
    write_tiny_model(tmp_path / "folder" / "below")
    assert digests(tmp_path / "folder" / "below") == GOLDEN


def test_the_command_of_the_model_card_writes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "job.tiny", str(tmp_path / "tiny")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "tiny") == GOLDEN


def test_it_loads_with_transformers_and_uses_every_weight(base: Base) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model: Any
    model, told = AutoModelForCausalLM.from_pretrained(base.folder, local_files_only=True, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    stored = load_file(base.folder / "model.safetensors")
    state = model.state_dict()
    assert stored.keys() == state.keys()
    assert all(stack.same_tensor(stored[name], state[name]) for name in stored)


def test_it_adds_up(base: Base) -> None:
    """Logits of a usable spread: a random base whose signal dies in its layers could not be adapted."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, local_files_only=True)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(64)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_its_special_tokens_are_the_last_and_known_by_their_roles(tokenizer: Any) -> None:
    assert len(tokenizer) == 256 + len(SPECIAL_TOKENS)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [256, 257, 258]


@given(text=st.text())
@settings(deadline=None)
def test_every_text_comes_back_from_its_tokens(session_tokenizer: Any, text: str) -> None:
    ids = session_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert session_tokenizer.decode(ids) == text
    if not any(token in text for token in SPECIAL_TOKENS):
        assert len(ids) == len(text.encode())


@pytest.fixture(scope="module")
def session_tokenizer(base: Base) -> Any:
    from job.model import load_tokenizer

    return load_tokenizer(base)


def test_the_template_is_chatml_and_says_who_answers_next(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    said = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == said
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert said.startswith(asked)  # what is trained is what will be asked for
