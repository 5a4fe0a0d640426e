"""Promise: what is trained is what the assistant says, to the end of its turns, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from job.contract.errors import DatasetInvalid, ModelInvalid
from job.dataset.reader import ROLES, LineNumber, Message, Row
from job.dataset.render import IGNORED, RenderedRow, render, split, tokens_digest
from job.model import load_tokenizer
from job.tiny import SPECIAL_TOKENS
from job.weights import Base
from tests.job import stack

END = "<|im_end|>"


@pytest.fixture(scope="module")
def plain(base: Base) -> Any:
    """The tokenizer, for tests that leave it as it is."""
    return load_tokenizer(base)


def conversation(*turns: tuple[str, str], line: int = 1) -> Row:
    return Row(LineNumber(line), tuple(Message(role, content) for role, content in turns))  # type: ignore[arg-type]


def rendered(row: Row, tokenizer: Any, *, max_length: int = 10_000) -> RenderedRow:
    [found] = render([row], tokenizer, max_length=max_length, name="rows.jsonl")
    return found


def spoken(row: RenderedRow, tokenizer: Any) -> str:
    text: str = tokenizer.decode([label for label in row.labels if label != IGNORED])
    return text


contents = st.text(min_size=1, max_size=20).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
turns = st.lists(st.tuples(st.sampled_from(ROLES), contents), min_size=1, max_size=6)


@given(said=turns)
@settings(deadline=None)
def test_the_trained_tokens_are_the_assistants_turns_and_their_ends(plain: Any, said: list[tuple[str, str]]) -> None:
    assume(any(role == "assistant" for role, _ in said))
    found = rendered(conversation(*said), plain)
    assert spoken(found, plain) == "".join(text + END for role, text in said if role == "assistant")
    whole = "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in said)
    assert plain.decode(found.ids) == whole
    assert all(label in (IGNORED, token) for label, token in zip(found.labels, found.ids, strict=True))
    assert found.trained_tokens == sum(label != IGNORED for label in found.labels)  # the first is never the assistant's


def test_the_header_of_an_assistants_turn_is_not_trained(plain: Any) -> None:
    found = rendered(conversation(("user", "hi"), ("assistant", "yo")), plain)
    first = next(at for at, label in enumerate(found.labels) if label != IGNORED)
    assert plain.decode(found.ids[:first]).endswith("<|im_start|>assistant\n")


@given(length=st.integers(1, 60))
@settings(deadline=None)
def test_a_row_is_cut_at_max_length_and_otherwise_unchanged(plain: Any, length: int) -> None:
    row = conversation(("user", "hello"), ("assistant", "good morning"), ("user", "and"), ("assistant", "bye"))
    whole = rendered(row, plain)
    first = next(at for at, label in enumerate(whole.labels) if label != IGNORED)
    if length <= first:
        with pytest.raises(DatasetInvalid):
            rendered(row, plain, max_length=length)
        return
    cut = rendered(row, plain, max_length=length)
    assert (cut.ids, cut.labels) == (whole.ids[:length], whole.labels[:length])
    assert cut.line == whole.line


def test_a_row_whose_prompt_fills_max_length_is_refused_with_its_line_and_why(plain: Any) -> None:
    good = conversation(("user", "a"), ("assistant", "b"), line=1)
    bad = conversation(("user", "a" * 100), ("assistant", "b"), line=7)
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl line 7: .*fills max_length \(50 of \d+ tokens\)") as raised:
        render([good, bad], plain, max_length=50, name="rows.jsonl")
    assert "max_length" in raised.value.hint


def test_a_row_in_which_the_template_marks_nothing_is_refused_with_its_line(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant'", "'nobody'")
    with pytest.raises(DatasetInvalid, match="line 3: no token of it would be trained: the chat template marks none"):
        rendered(conversation(("user", "a"), ("assistant", "b"), line=3), tokenizer)


def test_a_marked_first_token_is_not_enough(tokenizer: Any) -> None:
    """Nothing stands before it from which it could be predicted."""
    tokenizer.chat_template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    with pytest.raises(DatasetInvalid, match="no token of it would be trained"):
        rendered(conversation(("assistant", "b")), tokenizer)
    assert rendered(conversation(("assistant", "bc")), tokenizer).trained_tokens == 1


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelInvalid, match="no chat template"):
        rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def test_a_template_without_markers_is_refused_and_not_taken_for_one_by_its_generation_prompt(tokenizer: Any) -> None:
    bare = tokenizer.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert "add_generation_prompt" in bare
    tokenizer.chat_template = bare
    with pytest.raises(ModelInvalid, match="does not mark what the assistant says"):
        rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer)


@pytest.mark.parametrize("marker", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-  generation %}"])
def test_every_way_to_write_the_marker_is_known(tokenizer: Any, marker: str) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation -%}", marker)
    assert spoken(rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer), tokenizer).strip() == "b" + END


def test_what_the_template_refuses_names_the_line_and_its_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        + tokenizer.chat_template
    )
    row = conversation(("system", "s"), ("user", "a"), ("assistant", "b"), line=12)
    with pytest.raises(DatasetInvalid, match="line 12: the chat template refuses it: no system turns here"):
        rendered(row, tokenizer)


some_rows = st.lists(st.integers(2, 9), min_size=2, max_size=40).map(
    lambda found: [stack.row(line, length) for line, length in enumerate(found, start=1)]
)
fractions = st.floats(0, 0.5, exclude_min=True)


@given(some_rows, fractions, st.integers(0, 2**32 - 1))
def test_a_split_is_complete_disjoint_in_order_and_the_same_every_time(
    rows: list[RenderedRow], held_out: float, seed: int
) -> None:
    train, judged = split(rows, held_out=held_out, seed=seed)
    assert (train, judged) == split(rows, held_out=held_out, seed=seed)
    assert sorted([*train, *judged], key=lambda one: one.line) == rows
    assert train == sorted(train, key=lambda one: one.line)
    assert judged == sorted(judged, key=lambda one: one.line)
    assert train
    assert judged
    assert abs(len(judged) - len(rows) * held_out) <= 1


def test_another_seed_holds_out_other_rows() -> None:
    rows = [stack.row(line, 4) for line in range(1, 41)]
    chosen = {tuple(one.line for one in split(rows, held_out=0.25, seed=seed)[1]) for seed in range(5)}
    assert len(chosen) == 5


@pytest.mark.parametrize("count", [0, 1])
def test_what_cannot_be_split_is_refused(count: int) -> None:
    with pytest.raises(DatasetInvalid, match="cannot be split"):
        split([stack.row(1, 4)] * count, held_out=0.1, seed=1)


@given(some_rows, st.data())
def test_the_digest_changes_with_any_token_label_or_line_and_with_the_parts(
    rows: list[RenderedRow], data: st.DataObject
) -> None:
    digest = tokens_digest(rows, rows[:1])
    assert digest == tokens_digest(iter(rows), iter(rows[:1]))
    number = data.draw(st.integers(0, len(rows) - 1))
    one = rows[number]
    at = data.draw(st.integers(0, len(one.ids) - 1))

    def changed(values: tuple[int, ...]) -> tuple[int, ...]:
        return (*values[:at], values[at] + 1, *values[at + 1 :])

    others = [
        RenderedRow(one.line, changed(one.ids), one.labels),
        RenderedRow(one.line, one.ids, changed(one.labels)),
        RenderedRow(LineNumber(one.line + 1), one.ids, one.labels),
        RenderedRow(one.line, one.ids[:-1], one.labels[:-1]),
    ]
    for other in others:
        assert tokens_digest([*rows[:number], other, *rows[number + 1 :]], rows[:1]) != digest
    assert tokens_digest(rows[:-1], rows[:1]) != digest
    assert tokens_digest(rows, []) != digest
    assert tokens_digest([*rows, rows[0]], []) != digest  # the same rows, otherwise parted
    assert tokens_digest(rows[::-1], rows[:1]) != digest
