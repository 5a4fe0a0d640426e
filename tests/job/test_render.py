"""Promise: what is trained is what the assistant says, to the end of its turns, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from job.contract.errors import DatasetInvalid, ModelInvalid
from job.dataset.reader import ROLES, LineNumber, Message, Row
from job.dataset.refused import RowRefused
from job.dataset.render import IGNORED, RenderedRow, Renderer
from job.dataset.sentinels import Shape, skeleton_of, with_sentinels
from job.dataset.split import split, tokens_digest
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


def renderer(tokenizer: Any, *, max_length: int = 10_000) -> Renderer:
    return Renderer(tokenizer, max_length=max_length, stops=frozenset({tokenizer.eos_token_id}))


def rendered(row: Row, tokenizer: Any, *, max_length: int = 10_000) -> RenderedRow:
    return renderer(tokenizer, max_length=max_length).render(row)


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
        with pytest.raises(RowRefused):
            rendered(row, plain, max_length=length)
        return
    cut = rendered(row, plain, max_length=length)
    assert (cut.ids, cut.labels) == (whole.ids[:length], whole.labels[:length])
    assert cut.line == whole.line


def test_a_row_whose_prompt_fills_max_length_is_refused_and_why(plain: Any) -> None:
    row = conversation(("user", "a" * 100), ("assistant", "b"))
    with pytest.raises(RowRefused, match=r"no token .*fills max_length \(50 of \d+ tokens\)") as raised:
        rendered(row, plain, max_length=50)
    assert raised.value.code == "nothing-trained"
    assert "max_length" in raised.value.hint


def test_a_row_of_which_the_template_marks_nothing_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['role'] == 'assistant'", "message['role'] == 'assistant' and not messages[2:]"
    )
    row = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), line=3)
    with pytest.raises(RowRefused, match="no token of it would be trained: the chat template marks none"):
        rendered(row, tokenizer)


def test_a_template_that_marks_nothing_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant'", "'nobody'")
    with pytest.raises(ModelInvalid, match="markers mark nothing of what the assistant says"):
        rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def test_a_template_whose_markers_leave_out_the_stop_token_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    with pytest.raises(ModelInvalid, match=r"markers leave out the stop token .*the model would never stop"):
        rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def test_a_marked_first_token_is_not_enough() -> None:
    """Nothing stands before it from which it could be predicted."""
    row = RenderedRow(LineNumber(1), (5, 6, 7), (5, IGNORED, IGNORED))
    assert row.trained_tokens == 0
    assert RenderedRow(LineNumber(1), (5, 6, 7), (5, IGNORED, 7)).trained_tokens == 1
    assert RenderedRow(LineNumber(1), (), ()).trained_tokens == 0


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelInvalid, match="no chat template"):
        rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def without_markers(template: str) -> str:
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@given(said=turns)
@settings(deadline=None)
def test_without_markers_the_same_tokens_are_trained(plain: Any, bare: Any, said: list[tuple[str, str]]) -> None:
    said = [("user", "hi"), *said]  # without markers an answer needs something that it answers
    assume(any(role == "assistant" for role, _ in said))
    assert rendered(conversation(*said), bare) == rendered(conversation(*said), plain)


@pytest.fixture(scope="module")
def bare(base: Base) -> Any:
    """The tokenizer, with a template without markers."""
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = without_markers(tokenizer.chat_template)
    assert "add_generation_prompt" in tokenizer.chat_template  # is not taken for a marker
    return tokenizer


def test_how_the_mask_is_known_is_said(plain: Any, bare: Any) -> None:
    assert "own markers" in renderer(plain).masked_by
    assert "verified" in renderer(bare).masked_by
    assert renderer(plain).stop_texts == renderer(bare).stop_texts == (END,)


def test_a_row_that_begins_with_an_answer_needs_markers(plain: Any, bare: Any) -> None:
    row = conversation(("assistant", "b"), line=4)
    assert spoken(rendered(row, plain), plain) == "b" + END
    with pytest.raises(RowRefused, match=r"the chat template has no prompt for turn 1 \(assistant\)"):
        rendered(row, bare)


@pytest.mark.parametrize("marker", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-  generation %}"])
def test_every_way_to_write_the_marker_is_known(tokenizer: Any, marker: str) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation -%}", marker)
    assert spoken(rendered(conversation(("user", "a"), ("assistant", "b")), tokenizer), tokenizer).strip() == "b" + END


CUT = conversation(("user", "hello"), ("assistant", "good morning"), ("user", "and"), ("assistant", "bye"))


def test_what_is_cut_is_told(plain: Any, bare: Any) -> None:
    """Wherever the cut falls: the tokens of the answers are kept, or reported."""
    for tokenizer in (plain, bare):
        whole = rendered(CUT, tokenizer)
        first = next(at for at, label in enumerate(whole.labels) if label != IGNORED)
        ends = [at for at, label in enumerate(whole.labels) if label == tokenizer.eos_token_id]
        for length in range(first + 1, len(whole.ids) + 1):
            cutting = renderer(tokenizer, max_length=length)
            row = cutting.render(CUT)
            assert (row.whole, row.cut) == (len(whole.ids), len(whole.ids) - length)
            assert row.cut_trained == whole.trained_tokens - row.trained_tokens
            codes = [code for code, _, _ in cutting.warnings_of(row)]
            if row.labels[-1] not in (IGNORED, tokenizer.eos_token_id):
                assert codes == ["answer-cut"]
            else:
                assert codes == (["answers-lost"] if length <= ends[-1] else [])


def test_a_cut_is_told_with_its_numbers(plain: Any) -> None:
    cutting = renderer(plain, max_length=30)
    [(code, message, hint)] = cutting.warnings_of(cutting.render(CUT))
    assert code == "answer-cut"
    assert re.fullmatch(r"\d+ tokens are cut to 30: \d+ of the answers' are lost, and the stop token: .*", message)
    assert "training.max_length" in hint


@given(said=turns, length=st.integers(1, 200))
@settings(deadline=None)
def test_spans_are_the_rendering_and_tell_what_is_trained(
    plain: Any, bare: Any, said: list[tuple[str, str]], length: int
) -> None:
    row = conversation(("user", "hi"), *said, ("assistant", "🎉"))
    for tokenizer in (plain, bare):
        spans = renderer(tokenizer).spans_of(row)
        assert "".join(span.text for span in spans) == "".join(
            f"<|im_start|>{message.role}\n{message.content}{END}\n" for message in row.messages
        )
        assert all(span.text for span in spans)
        answers = [message.content + END for message in row.messages if message.role == "assistant"]
        assert "".join(span.text for span in spans if span.trained) == "".join(answers)
        assert [span.text for span in spans if span.is_stop] == [END] * len(answers)
        cut = renderer(tokenizer, max_length=length).spans_of(row)
        assert cut == spans[: len(cut)]


def test_a_tokenizer_that_names_no_stop_token_is_refused(plain: Any) -> None:
    with pytest.raises(ModelInvalid, match="names no token that ends an answer"):
        Renderer(plain, max_length=9, stops=frozenset())


def test_a_stop_token_that_the_template_does_not_write_is_refused_with_both_named(plain: Any, bare: Any) -> None:
    for tokenizer in (plain, bare):
        with pytest.raises(ModelInvalid, match=r"with '<\|im_end\|>', but the model stops at <\|pad\|> only"):
            Renderer(tokenizer, max_length=99, stops=frozenset({tokenizer.pad_token_id}))


def test_a_tokenizer_without_offsets_is_refused(plain: Any) -> None:
    class Slow:
        """A tokenizer written in Python: it has no offsets."""

        chat_template = plain.chat_template
        is_fast = False

        def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
            return plain.apply_chat_template(conversation, **kwargs)

        def __call__(self, text: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def decode(self, token_ids: Any, **kwargs: Any) -> Any:
            return plain.decode(token_ids, **kwargs)

    with pytest.raises(ModelInvalid, match="not a fast one"):
        Renderer(Slow(), max_length=9, stops=frozenset({1}))


def test_what_the_template_refuses_is_refused_with_its_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        + tokenizer.chat_template
    )
    row = conversation(("system", "s"), ("user", "a"), ("assistant", "b"), line=12)
    with pytest.raises(RowRefused, match="the chat template refuses it: no system turns here"):
        rendered(row, tokenizer)


@pytest.mark.parametrize(
    ("broken", "code", "message"),
    [
        ("{% for m in messages %}{% if loop.index != 3 %}", "template-drops", "drops turn 3 (user)"),
        ("{% for m in messages + messages[2:3] %}{% if true %}", "template-repeats", "repeats turn 3 (user)"),
        ("{% for m in messages[2:] + messages[:2] %}{% if true %}", "template-moves", "moves turn 4 (assistant)"),
        ("{% set up = true %}{% for m in messages %}{% if true %}", "template-rewrites", "does not write turn 3 as it"),
    ],
)
def test_a_template_that_does_not_write_what_the_row_says_is_refused(
    tokenizer: Any, broken: str, code: str, message: str
) -> None:
    said = "{% if up and loop.index == 3 %}{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}"
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}"
        + broken
        + "<|im_start|>{{ m.role }}\n"
        + said
        + "<|im_end|>\n{% endif %}{% endfor %}{% else %}"
        + without_markers(tokenizer.chat_template)
        + "{% endif %}{% if add_generation_prompt and messages | length > 2 %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RowRefused) as raised:
        renderer(tokenizer).render(CUT)
    assert raised.value.code == code
    assert message in raised.value.message


def test_a_template_that_adds_something_to_some_rows_is_refused(tokenizer: Any) -> None:
    """What is behind the last text is a part of the proof, too."""
    tokenizer.chat_template = (
        without_markers(tokenizer.chat_template) + "{% if messages[-1].content | length == 3 %}Good bye{% endif %}"
    )
    assert renderer(tokenizer).render(conversation(("user", "a"), ("assistant", "no"))).trained_tokens == 3
    with pytest.raises(RowRefused, match="does not write turn 4 as it is"):
        renderer(tokenizer).render(CUT)


def test_a_text_that_is_torn_apart_by_another_is_refused() -> None:
    shape: Shape = (("system", (None,)), ("assistant", (None, "<b>", None)))
    [(_, system), (_, answer)] = with_sentinels(shape)
    assert skeleton_of(system + answer, shape).texts_of(1) == (1, 2)
    with pytest.raises(RowRefused, match="moves turn"):
        skeleton_of(answer[:4] + system + answer[4:], shape)


@pytest.mark.parametrize("role", ROLES)
def test_only_an_answer_may_lose_its_reasoning(role: str) -> None:
    shape: Shape = (("user", (None,)), (role, (None, "</think>", None)))
    [(_, asked), (_, said)] = with_sentinels(shape)
    if role == "assistant":
        assert skeleton_of(asked + said[-1], shape).lacks_reasoning
        return
    with pytest.raises(RowRefused, match=rf"drops turn 2 \({role}\)"):
        skeleton_of(asked + said[-1], shape)


def test_a_template_that_trains_on_another_prompt_than_inference_sends_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = without_markers(tokenizer.chat_template).replace(
        "{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>model\\n' -}}"
    )
    with pytest.raises(ModelInvalid, match=r"inference sends '.*model\\n', and here stands '.*assistant\\n'"):
        renderer(tokenizer)


@pytest.mark.parametrize(
    ("written", "trim"),
    [
        ("(message['content'] | trim)", str.strip),
        ("message['content'].lstrip()", str.lstrip),
        ("message['content'].rstrip()", str.rstrip),
        ("message['content'].strip('\\n')", lambda text: text.strip("\n")),
    ],
)
def test_blanks_that_a_template_trims_are_not_looked_for(
    tokenizer: Any, written: str, trim: Callable[[str], str]
) -> None:
    tokenizer.chat_template = without_markers(tokenizer.chat_template).replace("message['content']", written)
    said = ["\n a\n \n", " b \n", "\t\n c\n", "\n\nd"]
    row = conversation(("user", said[0]), ("assistant", said[1]), ("user", said[2]), ("assistant", said[3]))
    assert spoken(rendered(row, tokenizer), tokenizer) == trim(said[1]) + END + trim(said[3]) + END


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
