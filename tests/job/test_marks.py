"""Promise: where a template marks what the assistant says, that is trained, all of it, and nobody else's words."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final

import pytest
from transformers import AutoTokenizer

from job.contract.errors import ModelInvalid
from job.dataset.control import stop_tokens
from job.dataset.reader import LineNumber, Message, Role, Row
from job.dataset.render import Renderer
from tests.job.templates import FAMILIES, Family, trl_template

OPEN, CLOSE = "{%- generation -%}", "{%- endgeneration -%}"
HEADER: Final = "'<|start_header_id|>' + message['role'] + '\\n'"
TEMPLATE: Final = (
    "{%- for message in messages -%}"
    f"{{{{- {HEADER} -}}}}"
    "{%- if message['role'] == 'assistant' -%}"
    f"{OPEN}{{{{- message['content'] + '<|eot_id|>' -}}}}{CLOSE}"
    "{%- else -%}{{- message['content'] + '<|eot_id|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant\\n' -}}{%- endif -%}"
)
TURNS: Final[tuple[tuple[Role, str], ...]] = (
    ("user", "hello"),
    ("assistant", "as you say"),
    ("user", "model"),
    ("assistant", "us"),
)


def row(*turns: tuple[Role, str]) -> Row:
    return Row(LineNumber(1), tuple(Message(role, content) for role, content in turns))


def opened(folder: Path, template: str, family: Family = FAMILIES["llama-3"]) -> Renderer:
    """Llama 3's tokenizer, unless told otherwise: it counts a blank before a word to none of its tokens' places."""
    replace(family, template=template).write(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Renderer(tokenizer, max_length=1000, stops=stop_tokens(folder, tokenizer))


def trained(renderer: Renderer, said: Row) -> list[str]:
    """What is trained, one text for each run of tokens."""
    runs = groupby(renderer.spans_of(said), key=lambda span: span.trained)
    return ["".join(span.text for span in run) for is_trained, run in runs if is_trained]


@pytest.mark.parametrize("blank", ["", " ", "  ", " \n"])
def test_an_answer_that_begins_with_a_blank_is_trained_and_so_are_those_behind_it(tmp_path: Path, blank: str) -> None:
    renderer = opened(tmp_path, TEMPLATE)
    said = row(TURNS[0], ("assistant", f"{blank}as you say"), *TURNS[2:])
    assert trained(renderer, said) == [f"{blank}as you say<|eot_id|>", "us<|eot_id|>"]


@pytest.mark.parametrize("blank", [" ", "\n", " \n "])
def test_a_mark_that_ends_with_a_blank_ends_there(tmp_path: Path, blank: str) -> None:
    template = TEMPLATE.replace(CLOSE, f"{{{{- {blank!r} -}}}}{CLOSE}")
    assert trained(opened(tmp_path, template), row(*TURNS)) == [
        f"as you say<|eot_id|>{blank}",
        f"us<|eot_id|>{blank}",
    ]


@pytest.mark.parametrize("name", ["qwen3_instruct_2507_training", "lfm2_training", "qwen2_5_vl_training"])
def test_so_it_is_with_the_templates_that_others_marked(tmp_path: Path, name: str) -> None:
    family = replace(
        FAMILIES["llama-3"], control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>", stops=()
    )
    renderer = opened(tmp_path, trl_template(name), replace(family, bos="<|endoftext|>"))
    assert trained(renderer, row(("user", "hello"), ("assistant", " us"))) == [" us<|im_end|>\n"]


def test_markers_around_what_the_user_says_are_refused(tmp_path: Path) -> None:
    everybody = TEMPLATE.replace("message['role'] == 'assistant'", "true")
    with pytest.raises(ModelInvalid, match="markers cover turn 1, which is not the assistant's"):
        opened(tmp_path, everybody)


def test_markers_that_begin_a_token_too_late_are_refused(tmp_path: Path) -> None:
    late = TEMPLATE.replace(
        OPEN + "{{- message['content']", "{{- message['content'][:1] -}}" + OPEN + "{{- message['content'][1:]"
    )
    with pytest.raises(ModelInvalid, match="markers leave out the beginning of the answer in turn 2"):
        opened(tmp_path, late)


def test_an_answer_that_the_markers_leave_out_is_told(tmp_path: Path) -> None:
    renderer = opened(tmp_path, TEMPLATE.replace("== 'assistant'", "== 'assistant' and loop.last"))
    said = row(*TURNS)
    assert trained(renderer, said) == ["us<|eot_id|>"]
    assert [code for code, _, _ in renderer.warnings_of(renderer.render(said))] == ["answer-unmarked"]


def test_a_blank_that_merges_with_an_answer_is_told(tmp_path: Path) -> None:
    """Inference sends the blank as a token of its own."""
    bare = TEMPLATE.replace(OPEN, "").replace(CLOSE, "").replace("'\\n'", "': '").replace("assistant\\n", "assistant: ")
    renderer = opened(tmp_path, bare)
    merged = row(("user", "hello"), ("assistant", "as you say"))
    assert [code for code, _, _ in renderer.warnings_of(renderer.render(merged))] == ["prompt-merged"]
    apart = row(("user", "hello"), ("assistant", "us"))
    assert renderer.warnings_of(renderer.render(apart)) == []
