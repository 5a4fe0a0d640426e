"""Promise: with the chat templates of the covered families, exactly what the assistant has to say is trained.

The expectation is computed from the row and the family's documentation alone (Family.answer), the template is the
family's own text, and where TRL carries a version that was marked by hand, it is the second opinion.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from job.contract.errors import ModelInvalid
from job.dataset.control import stop_tokens
from job.dataset.reader import LineNumber, Message, Role, Row
from job.dataset.refused import RowRefused
from job.dataset.render import IGNORED, RenderedRow, Renderer
from job.dataset.template import TODAY
from tests.job.templates import FAMILIES, Family, own_template, trl_template

EVERY: Final = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
QWEN: Final = FAMILIES["qwen-2.5"]
FIXED: Final = {"strftime_now": TODAY.strftime}

SAID: Final = {
    "single": [("user", "hello, assistant"), ("assistant", "hello, user 🎉")],
    "blanks": [
        ("user", "\n\n user \n"),
        ("assistant", " as you say: 漢字 \n\n"),
        ("user", "model"),
        ("assistant", "👍🏽 "),
    ],
    "headers": [
        ("user", "assistant\nuser\nmodel"),
        ("assistant", "user\nassistant"),
        ("user", "<b>model</b>"),
        ("assistant", "model\n\nassistant:\n"),
        ("user", "[user] | {{ messages }}"),
        ("assistant", "{% raw %}é"),
    ],
}


def conversation(turns: list[tuple[Role, str]]) -> Row:
    return Row(LineNumber(1), tuple(Message(role, content) for role, content in turns))


@cache
def opened(family: Family) -> tuple[Any, Renderer]:
    """The family's tokenizer, as it is loaded from a folder, and what renders with it."""
    with TemporaryDirectory() as place:
        folder = family.write(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, Renderer(tokenizer, max_length=10_000, stops=stop_tokens(folder, tokenizer))


def turns_of(row: Row) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]


def answers_of(row: Row, family: Family) -> list[str]:
    last = max(at for at, message in enumerate(row.messages) if message.role == "assistant")
    return [
        family.answer(message.content, at == last)
        for at, message in enumerate(row.messages)
        if message.role == "assistant"
    ]


def trained_runs(row: Row, renderer: Renderer) -> list[str]:
    """The trained texts, one for each stop token; each without a gap."""
    runs: list[str] = []
    goes_on = False
    for text, trained, is_stop in renderer.spans_of(row):
        if trained and goes_on:
            runs[-1] += text
        elif trained:
            runs.append(text)
        goes_on = trained and not is_stop
    return runs


def verify(family: Family, row: Row) -> RenderedRow:
    """The tokens are those of inference, and the trained ones are the answers."""
    tokenizer, renderer = opened(family)
    rendered = renderer.render(row)
    whole = tokenizer.apply_chat_template(turns_of(row), tokenize=False, **FIXED)
    assert "".join(span.text for span in renderer.spans_of(row)) == whole
    tokens = tokenizer.apply_chat_template(turns_of(row), tokenize=True, return_dict=True, **FIXED)
    assert list(rendered.ids) == tokens["input_ids"]
    assert all(label in (IGNORED, token) for label, token in zip(rendered.labels, rendered.ids, strict=True))
    runs, answers = trained_runs(row, renderer), answers_of(row, family)
    if "prompt-merged" in rendered.notes:  # a token of two newlines, one of which is the prompt's: it is trained whole
        runs = [run[1:] if run == "\n" + answer else run for run, answer in zip(runs, answers, strict=True)]
    assert runs == answers
    stops = [label for label in rendered.labels if label in tokenizer.convert_tokens_to_ids(list(family.control))]
    assert stops.count(tokenizer.convert_tokens_to_ids(renderer.stop_texts[0])) == len(answers)
    return rendered


@EVERY
@pytest.mark.parametrize("kind", SAID)
def test_the_answers_and_their_stop_tokens_are_trained_and_nothing_else(family: Family, kind: str) -> None:
    verify(family, conversation(SAID[kind]))  # type: ignore[arg-type]


@EVERY
def test_a_system_turn_is_written_or_the_row_is_refused(family: Family) -> None:
    row = conversation([("system", " Be brief.\n"), *SAID["headers"]])  # type: ignore[list-item]
    if family.system:
        verify(family, row)
        return
    with pytest.raises(RowRefused) as raised:
        opened(family)[1].render(row)
    assert raised.value.code == ("template-drops" if family.name == "mistral-0.3" else "template-refuses")


@EVERY
def test_the_trained_tokens_decode_to_the_answers(family: Family) -> None:
    tokenizer, renderer = opened(family)
    row = conversation([("user", "hi"), ("assistant", "as you say 🎉")])
    spoken = tokenizer.decode([label for label in renderer.render(row).labels if label != IGNORED])
    [answer] = answers_of(row, family)
    if family.greedy:
        answer = answer.removesuffix("\n")  # which is a part of the token, but not of its text
    assert spoken in (answer, "\n" + answer)  # the latter for Qwen 3.5: see its own test


# Python takes U+001C to U+001F for blanks, which tokenizers do not.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f")
contents = st.text(characters, min_size=1, max_size=12).filter(str.strip)


@EVERY
@given(said=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_whatever_is_said(family: Family, said: list[tuple[str, str]]) -> None:
    pairs = [pair for user, assistant in said for pair in (("user", user), ("assistant", assistant))]
    verify(family, conversation(pairs))  # type: ignore[arg-type]


MARKED: Final = {
    "llama-3": ("llama3_training", ""),
    # It also trains the newline that ends the prompt: inference sends it.
    "qwen-2.5": ("qwen2_5_training", "\n\n"),
    "qwen-3-2507": ("qwen3_instruct_2507_training", "\n"),
    "gemma-2": ("gemma_training", "\n"),
    "gemma-3": ("gemma3_training", "\n"),
    "phi-3": ("phi3_training", "\n"),
    "phi-3.5": ("phi3_5_training", "\n"),
}
"""TRL's version, and what it trains more of each answer: a newline behind the stop token, which nobody will ask for."""


def marked_by_trl(tokenizer: Any, row: Row, template: str) -> tuple[list[int], list[int]]:
    """(tokens, 1 where TRL's template trains)."""
    found = tokenizer.apply_chat_template(
        turns_of(row),
        chat_template=trl_template(template),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("name", MARKED)
def test_the_mask_is_that_of_the_version_that_trl_marked_by_hand(name: str) -> None:
    template, besides = MARKED[name]
    # With a "▁" before every text, transformers finds the wrong end of TRL's mark; so it does with greedy tokens.
    family = replace(FAMILIES[name], spaces=None, greedy=False)
    tokenizer, renderer = opened(family)
    row = conversation([("user", "hello"), ("assistant", "as you\n\nsay 🎉"), ("user", "model"), ("assistant", "us")])
    rendered = renderer.render(row)
    ids, mask = marked_by_trl(tokenizer, row, template)
    assert list(rendered.ids) == ids
    ours = [at for at, label in enumerate(rendered.labels) if label != IGNORED]
    theirs = [at for at, said in enumerate(mask) if said]
    assert set(ours) <= set(theirs)
    more = tokenizer.decode([ids[at] for at in theirs if at not in ours])
    # Phi 3 also writes <|endoftext|> behind the conversation; its model stops at <|end|>, before it.
    assert more == besides * 2 + ("<|endoftext|>" if name.startswith("phi") else "")


@pytest.mark.parametrize(
    ("name", "template"), [("qwen-3", "qwen3_training"), ("qwen-3.5-think", "qwen3_5_think_training")]
)
def test_of_a_template_that_hides_reasoning_trl_marks_another_text(name: str, template: str) -> None:
    """TRL's version writes the think block into every turn, so only a single turn can be compared."""
    tokenizer, renderer = opened(FAMILIES[name])
    single = conversation([("user", "hello"), ("assistant", "as you say")])
    ids, mask = marked_by_trl(tokenizer, single, template)
    rendered = renderer.render(single)
    assert list(rendered.ids) == ids
    theirs = tokenizer.decode([token for token, said in zip(ids, mask, strict=True) if said])
    ours = tokenizer.decode([label for label in rendered.labels if label != IGNORED])
    # Inference sends Qwen 3.5's "<think>\n" as a part of the prompt, where TRL trains it.
    assert theirs == ("<think>" if name == "qwen-3.5-think" else "") + ours + "\n"
    twice = conversation([*SAID["single"], *SAID["single"]])  # type: ignore[list-item]
    assert marked_by_trl(tokenizer, twice, template)[0] != list(renderer.render(twice).ids)


def test_an_empty_think_block_merges_with_the_prompt_of_qwen_3_5_and_that_is_told() -> None:
    """Inference sends "<think>", newline; training has "<think>", two newlines as one token. With reasoning it fits."""
    _, renderer = opened(FAMILIES["qwen-3.5-think"])
    bare = renderer.render(conversation([("user", "a"), ("assistant", "b")]))
    assert [code for code, _, _ in renderer.warnings_of(bare)] == ["prompt-merged"]
    reasoned = conversation([("user", "a"), ("assistant", "<think>\nsince a\n</think>\n\nb")])
    assert renderer.warnings_of(renderer.render(reasoned)) == []
    assert trained_runs(reasoned, renderer) == ["since a\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3.5-think", "qwen-3.5-nothink"])
def test_reasoning_of_the_last_answer_is_trained_and_that_of_earlier_ones_is_told_to_be_left_out(name: str) -> None:
    _, renderer = opened(FAMILIES[name])
    said = "<think>\nfirst {}\n</think>\n\n{}"
    row = conversation(
        [("user", "a"), ("assistant", said.format(1, "b")), ("user", "c"), ("assistant", said.format(2, "d"))]
    )
    if name == "qwen-3.5-nothink":  # its prompt closes the reasoning, so an answer with reasoning cannot follow
        with pytest.raises(RowRefused) as raised:
            renderer.render(row)
        assert raised.value.code == "prompt-differs"
        return
    opens = "<think>\n" if name == "qwen-3" else ""
    assert trained_runs(row, renderer) == ["b<|im_end|>", opens + "first 2\n</think>\n\nd<|im_end|>"]
    codes = {code for code, _, _ in renderer.warnings_of(renderer.render(row))}
    assert "reasoning-dropped" in codes


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3.5-think", "qwen-3.5-nothink"])
def test_an_earlier_answer_in_another_form_than_the_last_is_told(name: str) -> None:
    _, renderer = opened(FAMILIES[name])
    rendered = renderer.render(conversation([*SAID["single"], *SAID["single"]]))  # type: ignore[list-item]
    assert "earlier-turns-differ" in [code for code, _, _ in renderer.warnings_of(rendered)]


@pytest.mark.parametrize("name", ["llama-3", "llama-3.2", "qwen-2.5", "gemma-3", "phi-3", "phi-4", "mistral-0.3"])
def test_a_template_that_writes_every_answer_alike_has_no_warning(name: str) -> None:
    _, renderer = opened(FAMILIES[name])
    rendered = renderer.render(conversation([*SAID["single"], *SAID["single"]]))  # type: ignore[list-item]
    assert renderer.warnings_of(rendered) == []


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_markup_that_a_template_looks_for_may_stand_in_a_text(role: Role) -> None:
    """Qwen looks for tool responses in a user's text, and for </think> in an answer."""
    _, renderer = opened(FAMILIES["qwen-3"])
    text = "<tool_response>\n4\n</tool_response>"
    said: list[tuple[Role, str]] = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    said[2 if role == "user" else 3] = (role, text)
    assert trained_runs(conversation(said), renderer)[-1].endswith(
        (text if role == "assistant" else "d") + "<|im_end|>"
    )


def test_an_answer_may_be_nothing_but_markup() -> None:
    _, renderer = opened(QWEN)
    row = conversation([("user", "<tools>"), ("assistant", "<tool_call>\n</tool_call>")])
    assert trained_runs(row, renderer) == ["<tool_call>\n</tool_call><|im_end|>"]


def test_a_day_is_always_the_same_day_and_that_is_told() -> None:
    row = conversation([("user", "a"), ("assistant", "b")])
    for name, dated in [("llama-3.1", False), ("llama-3.2", True), ("llama-3", False)]:
        _, renderer = opened(FAMILIES[name])
        written = "".join(span.text for span in renderer.spans_of(row))
        assert ("Today Date: 26 Jul 2024\n" in written) == (name != "llama-3")
        assert [code for code, _, _ in renderer.notices] == ["fixed-date"] * dated


@pytest.mark.parametrize(
    ("family", "message"),
    [
        pytest.param(
            replace(QWEN, eos="<|endoftext|>", stops=("<|endoftext|>",)),
            r"ends the answer in turn 2 with '<\|im_end\|>', but the model stops at <\|endoftext\|> only",
            id="a base model of Qwen with the template of an instruct model",
        ),
        pytest.param(
            replace(FAMILIES["gemma-3"], stops=("<eos>",)),
            r"with '<end_of_turn>', but the model stops at <eos> only",
            id="Gemma without its generation_config.json",
        ),
        pytest.param(
            replace(FAMILIES["phi-3"], stops=("<|endoftext|>",)),
            r"with '<\|end\|>', but the model stops at <\|endoftext\|> only",
            id="Phi 3 without its generation_config.json",
        ),
        pytest.param(
            replace(QWEN, template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
            r"inference sends 'yo?\\n', and here stands|ends the answer in turn 2 with '\\n'",
            id="a template without an end of turn",
        ),
    ],
)
def test_a_model_that_would_never_stop_is_refused_with_both_tokens_named(family: Family, message: str) -> None:
    with pytest.raises(ModelInvalid, match=message) as raised:
        opened(family)
    assert raised.value.hint


BAR: Final = "\uff5c"
"""DeepSeek's wide one."""

DEEPSEEK: Final = Family(
    "deepseek-r1-distill",
    trl_template("deepseek_r1_distill"),
    (*(f"<{BAR}{name}{BAR}>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant")), "<think>"),
    f"<{BAR}end▁of▁sentence{BAR}>",
    lambda content, last: content + f"<{BAR}end▁of▁sentence{BAR}>",
    bos=f"<{BAR}begin▁of▁sentence{BAR}>",
)
GPT_OSS: Final = Family(
    "gpt-oss",
    trl_template("gptoss"),
    ("<|return|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|endoftext|>"),
    "<|return|>",
    lambda content, last: "<|channel|>final<|message|>" + content + "<|return|>",
    stops=("<|return|>", "<|call|>", "<|endoftext|>"),
)


def test_a_template_whose_prompt_opens_reasoning_that_it_then_leaves_out_is_refused() -> None:
    asked = f"<{BAR}Assistant{BAR}>"
    with pytest.raises(ModelInvalid, match=rf"inference sends '{asked}<think>\\n', and here stands '{asked}'"):
        opened(DEEPSEEK)


def test_of_gpt_oss_a_single_answer_is_trained_and_an_earlier_one_would_not_stop() -> None:
    verify(GPT_OSS, conversation(SAID["single"]))  # type: ignore[arg-type]
    with pytest.raises(
        RowRefused, match=r"the answer in turn 2 with '<\|end\|>', but the model stops at .*<\|return\|>"
    ):
        opened(GPT_OSS)[1].render(conversation(SAID["headers"]))  # type: ignore[arg-type]


def test_of_several_templates_the_default_one_is_used() -> None:
    tokenizer, renderer = opened(QWEN)
    row = conversation(SAID["single"])  # type: ignore[arg-type]
    named = {"default": tokenizer.chat_template, "tool_use": own_template("phi_4")}
    with TemporaryDirectory() as place:
        other = AutoTokenizer.from_pretrained(QWEN.write(Path(place)), local_files_only=True)
    other.chat_template = named
    stops = frozenset({other.eos_token_id})
    assert Renderer(other, max_length=999, stops=stops).render(row) == renderer.render(row)
    other.chat_template = {"tool_use": named["tool_use"]}
    with pytest.raises(ModelInvalid, match="no chat template"):
        Renderer(other, max_length=999, stops=stops)


def test_a_template_that_asks_otherwise_for_a_word_in_a_row_is_found_out(tmp_path: Path) -> None:
    """Of a question with the word, inference opens and closes the reasoning; training would show nothing of it."""
    asks = r"<|im_start|>assistant\n' }}"
    switch = "{%- if '/quick' in messages[-1].content %}{{- '<think></think>' }}{%- endif %}"
    assert asks in QWEN.template
    family = replace(QWEN, template=QWEN.template.replace(asks, asks + switch))
    folder = family.write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    renderer = Renderer(tokenizer, max_length=1000, stops=stop_tokens(folder, tokenizer))
    assert trained_runs(conversation([("user", "hello"), ("assistant", "us")]), renderer) == ["us<|im_end|>"]
    with pytest.raises(RowRefused, match=r"inference sends '.*<think></think>', and here") as raised:
        renderer.render(conversation([("user", "hello /quick"), ("assistant", "us")]))
    assert raised.value.code == "prompt-differs"
