"""A base model's own chat template: what it makes of a conversation, and where in it the assistant's turns stand.

The template's text is never changed: what is trained is written by the very template that inference uses. Where a turn
stands is found with sentinels, and verified (job/dataset/sentinels.py); where the assistant begins to speak, from the
prompts that the same template writes for inference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, Final, Protocol, cast

from job.contract.errors import ModelInvalid
from job.dataset.reader import Row
from job.dataset.refused import RowRefused
from job.dataset.sentinels import SENTINELS, Shape, Skeleton, sentinels_in, skeleton_of, tail_of, with_sentinels

TODAY: Final = datetime(2024, 7, 26)
"""What "today" is in every rendering: the default of Llama 3.1's own template. With a clock, a run that is resumed on
the next day would not be the same run."""

_MARKER: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Not the word alone: nearly every template has an `add_generation_prompt`."""

_TAG: Final = re.compile(r"</?[a-z_]+>")
"""What a template may look for in a text: <think>, </think>, <tool_response>, ..."""

_SHAPES: Final = 4096
"""Outlines that are kept: rows have few shapes, and the sentinels of a shape are written once."""

_EDGE: Final = 60
"""Characters of a prompt that a message shows."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Spoken:
    """Where an assistant's turn stands in the rendered text, in characters."""

    turn: int
    """From 1."""
    start: int
    """Behind what the template puts there to ask for an answer: from here on the model speaks."""
    said: int
    """Behind the turn's own text."""
    limit: int
    """The end of what may belong to the turn: where the text of the next one begins."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as text."""

    text: str
    answers: tuple[Spoken, ...]
    others: tuple[tuple[int, int, int], ...]
    """(turn from 1, start, end) of each text of those who are not the assistant, in characters."""
    notes: frozenset[str]
    """Codes of warnings."""


@dataclass(frozen=True)
class _Place:
    turn: int
    """From 0."""
    first: int
    """Place of its first text among all texts, in the order of the rendering."""
    last: int
    inserted: str
    """What the template writes behind the prompt, before the first text: the model has to say it."""
    prompt: int
    """Characters of what stands before the first text that belong to the prompt."""
    held: bool
    """The rendering begins with the prompt that inference would send for this turn."""


@dataclass(frozen=True)
class _Outline:
    """What rows of one shape have in common."""

    skeleton: Skeleton
    answers: tuple[_Place, ...]
    notes: frozenset[str]


class ChatTemplate:
    """Raises ModelInvalid where the tokenizer has no template that could be used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise ModelInvalid("the base model's tokenizer has no chat template", hint="use the -Instruct variant")
        self.marked: Final = bool(_MARKER.search(text))
        """It says itself what the assistant speaks."""
        self.dated: Final = "strftime_now" in text
        """It asks what day it is, and writes it into the prompt."""
        tags = sorted(set(_TAG.findall(text)))
        self._tags: Final = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self._outline = lru_cache(_SHAPES)(self._outline_of)

    def marks(self, row: Row) -> list[tuple[int, int]]:
        """(start, end) of each part of the text, in characters, that the template's own markers say is the assistant's.

        transformers is asked with a tokenizer whose tokens are characters: of a real one it looks for a mark's first
        token by its first character, and where a tokenizer counts that, a blank, to no token, it forgets this mark and
        all that follow (5.17, `apply_chat_template`).

        Raises:
            RowRefused: the template refuses the row.
        """
        with _refusals():
            found = type(self._tokenizer).apply_chat_template(
                cast(Any, _Characters(self._tokenizer)),
                _conversation((message.role, message.content) for message in row.messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **self.variables,
            )
        marks, at = [], 0
        for said, run in groupby(found["assistant_masks"][1:]):
            end = at + sum(1 for _ in run)
            if said:
                marks.append((at, end))
            at = end
        return marks

    @property
    def variables(self) -> dict[str, Any]:
        """What the template is given besides the conversation: no clock."""
        if not self.dated:
            return {}
        return {"strftime_now": TODAY.strftime, "date_string": TODAY.strftime("%d %b %Y")}

    def render(self, row: Row) -> Rendering:
        """The row's text, and where the assistant speaks in it.

        Raises:
            RowRefused: the template refuses the row, or does not write what the row says.
        """
        shape, texts = self._parts(row)
        written = self._write([(message.role, message.content) for message in row.messages])
        outline = self._outline(shape)
        places = outline.skeleton.put_back(texts, written)
        answers = []
        for one in outline.answers:
            before = places[one.first - 1][1] if one.first else 0
            limit = places[one.last + 1][0] if one.last + 1 < len(places) else len(written)
            answers.append(Spoken(one.turn + 1, before + one.prompt, places[one.last][1], limit))
        if answers and answers[-1].turn == len(row.messages):
            # Sentinels do not show it all: a template may look for a word and ask otherwise.
            asked = self._prompt([(message.role, message.content) for message in row.messages[:-1]])
            stands = written[: answers[-1].start]
            if asked is not None and asked != stands:
                raise _prompt_differs(len(row.messages), asked, stands)
        others = tuple(
            (turn + 1, *place)
            for turn, place in zip(outline.skeleton.turns, places, strict=True)
            if shape[turn][0] != "assistant"
        )
        return Rendering(written, tuple(answers), others, outline.notes)

    def _write(self, turns: Sequence[tuple[str, str]], *, prompt: bool = False) -> str:
        with _refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    _conversation(turns), tokenize=False, add_generation_prompt=prompt, **self.variables
                )
            )

    def _parts(self, row: Row) -> tuple[Shape, list[str]]:
        """The row's shape, and its texts."""
        shape: list[tuple[str, tuple[str | None, ...]]] = []
        texts: list[str] = []
        for message in row.messages:
            parts = self._tags.split(message.content) if self._tags else [message.content]
            # Tags and blanks stay: the template may look for them, or count on them.
            kept = [part if at % 2 or not part.strip() else None for at, part in enumerate(parts)]
            if None not in kept:
                parts, kept = [message.content], [None]
            texts += [part for part, keep in zip(parts, kept, strict=True) if keep is None]
            shape.append((message.role, tuple(kept)))
        if len(texts) > SENTINELS:
            raise RowRefused("too-many-turns", f"more than {SENTINELS} turns")
        return tuple(shape), texts

    def _outline_of(self, shape: Shape) -> _Outline:
        turns = with_sentinels(shape)
        written = self._write(turns)
        skeleton = skeleton_of(written, shape)
        answers = [
            self._place(turn, turns, skeleton, written) for turn, (role, _) in enumerate(shape) if role == "assistant"
        ]
        # Answers of one kind are written in one way, or the model is taught two.
        inserted = {shape[one.turn][1]: one.inserted for one in answers}
        differ = any(not one.held or one.inserted != inserted[shape[one.turn][1]] for one in answers)
        notes = {"earlier-turns-differ": differ, "reasoning-dropped": skeleton.lacks_reasoning}
        return _Outline(skeleton, tuple(answers), frozenset(note for note, applies in notes.items() if applies))

    def _place(self, turn: int, turns: Sequence[tuple[str, str]], skeleton: Skeleton, written: str) -> _Place:
        first, last = skeleton.texts_of(turn)
        before = skeleton.literals[first]
        asked = self._prompt(turns[:turn])
        if asked is None:
            if not self.marked:
                raise RowRefused(
                    "no-prompt",
                    f"the chat template has no prompt for turn {turn + 1} (assistant)",
                    hint="begin the conversation with a user turn",
                )
            return _Place(turn, first, last, "", len(before), True)
        held = written.startswith(asked)
        tail = tail_of(asked)
        # An earlier turn may stand in another form, as long as it can be told where it begins.
        alike = sentinels_in(asked)[-1:] == list(skeleton.order[:first][-1:])
        alike = alike and (before.startswith(tail) or tail.startswith(before))
        last_turn = turn == len(turns) - 1
        if not (held and alike if last_turn else alike or self.marked):
            raise _prompt_differs(turn + 1, tail, before)
        # Where only the markers tell, the answer begins with its text.
        prompt = min(len(tail), len(before)) if alike else len(before)
        return _Place(turn, first, last, before[prompt:], prompt, held)

    def _prompt(self, turns: Sequence[tuple[str, str]]) -> str | None:
        """What inference sends to get the turn after these; None where the template cannot say."""
        if not turns:
            return None
        try:
            return self._write(turns, prompt=True)
        except RowRefused:
            return None


def _prompt_differs(turn: int, asked: str, before: str) -> RowRefused:
    return RowRefused(
        "prompt-differs",
        f"the prompt that inference would send for turn {turn} (assistant) is not what the chat template writes in "
        f"training: inference sends {asked[-_EDGE:]!r}, and here stands {before[-_EDGE:]!r}",
        hint="use a base model whose chat template writes an answer as it asks for it",
    )


class _Characters:
    """The tokenizer in all things but one: its tokens are characters, and one before them, since 0 is none there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return _Encoded(input_ids=[0] * (len(text) + 1))


class _Encoded(dict[str, Any]):
    def char_to_token(self, _: int, character: int) -> int:
        return character + 1


def _conversation(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@contextmanager
def _refusals() -> Iterator[None]:
    """What a program in jinja can raise becomes the row's refusal."""
    from jinja2 import TemplateError  # comes with transformers, which is there when there is a tokenizer

    try:
        yield
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise RowRefused(
            "template-refuses",
            f"the chat template refuses it: {error}",
            hint="templates may forbid a role, or an order of roles",
        ) from error
