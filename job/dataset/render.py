"""Rows to tokens: the base model's own chat template, and the mask of what the assistant says. No torch.

Only what the model has to say is trained: from behind the prompt that inference sends, to the token at which inference
stops, inclusive. Where the template has {% generation %} markers they are used; where it has none, the turns are found
in its rendering, and verified (job/dataset/template.py).
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from job.contract.errors import ModelInvalid
from job.dataset.bounds import Bounds, unknown_character, unknown_tokens
from job.dataset.marks import refuse_half_marked, refuse_others
from job.dataset.reader import LineNumber, Message, Row
from job.dataset.refused import RowRefused
from job.dataset.template import TODAY, ChatTemplate, Spoken, Tokenizer

IGNORED: Final = -100
"""Label of a token that is not trained (torch.nn.CrossEntropyLoss's ignore_index)."""

_PROBE: Final = Row(LineNumber(1), (Message("user", "hi"), Message("assistant", "yo")))

_WARNINGS: Final = {
    "reasoning-dropped": (
        "the chat template leaves out the reasoning (<think>) of an answer, so it is not trained",
        "most templates keep that of the last answer: make a row of each answer, with the turns before it",
    ),
    "earlier-turns-differ": (
        "the chat template writes an earlier answer otherwise than the last one, so the model is trained on both forms",
        "make a row of each answer, with the turns before it, to train only the form that inference asks for",
    ),
    "answer-unmarked": (
        "the chat template's markers leave out an answer, so it is not trained",
        "make a row of each answer, with the turns before it, if only that of the last one is marked",
    ),
    "beyond-context": (
        "it is longer than any text that the base model was made for (max_position_embeddings of its config.json)",
        "beyond them it knows no positions, and servers send it none: set training.max_length to that number, or "
        "shorten the row",
    ),
    "prompt-merged": (
        "a token covers the end of the prompt and the beginning of an answer: it is trained, but inference sends the "
        "prompt's part as a token of its own, which the model has not been trained to continue",
        "begin answers without newlines; where the template itself opens <think>, give every answer reasoning",
    ),
}


@dataclass(frozen=True)
class RenderedRow:
    """One row as tokens. `labels[i]` is `ids[i]` where the assistant speaks, IGNORED elsewhere."""

    line: LineNumber
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0
    """Tokens that were cut away, to keep max_length."""
    cut_trained: int = 0
    """How many of them would have been trained."""
    notes: tuple[str, ...] = ()
    """Codes of what is worth a warning; Renderer.warnings_of puts them into words."""

    @property
    def whole(self) -> int:
        """Tokens before the row was cut."""
        return len(self.ids) + self.cut

    @property
    def trained_tokens(self) -> int:
        # The first token has nothing before it to be predicted from.
        return len(self.labels) - self.labels.count(IGNORED) - (self.labels[:1] not in ((), (IGNORED,)))

    @cached_property
    def digest(self) -> bytes:
        """Sha256 over the line, every token and every label."""
        numbers = array("q", (self.line, len(self.ids), *self.ids, *self.labels))
        if sys.byteorder == "big":
            numbers.byteswap()
        return hashlib.sha256(numbers.tobytes()).digest()


class Span(NamedTuple):
    """A token as text; or several, where they share a character."""

    text: str
    trained: bool
    is_stop: bool
    """The model ends its turn with it: trained, and among the tokens at which inference stops."""


class _Labelled(NamedTuple):
    """A whole row, before it is cut."""

    ids: list[int]
    labels: list[int]
    offsets: list[tuple[int, int]]
    """Of each token, where it stands in the text."""
    text: str
    notes: set[str]


_UNKNOWN: Final = Bounds()


class Renderer:
    """Rows to tokens, one at a time.

    Args:
        tokenizer: the base model's own.
        max_length: tokens that are kept of a row.
        stops: tokens at which inference ends an answer (job.dataset.control.stop_tokens).
        bounds: of what the model can take.

    Raises:
        ModelInvalid: no chat template, or one of which it cannot be told what the assistant says, or one that ends an
            answer with a token at which the model would not stop.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int, stops: frozenset[int], bounds: Bounds = _UNKNOWN
    ) -> None:
        self.tokenizer: Final = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._max_length = max_length
        self._stops = stops
        self._bounds = bounds
        self._unknown = unknown_tokens(tokenizer) - stops
        if not getattr(tokenizer, "is_fast", False):
            raise ModelInvalid(
                "the base model's tokenizer cannot say which characters a token covers: it is not a fast one",
                hint="a tokenizer.json is needed: save it once with transformers' AutoTokenizer",
            )
        if not stops:
            raise ModelInvalid(
                "the base model names no token that ends an answer",
                hint="set eos_token_id in its generation_config.json",
            )
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._control = frozenset(at for at, token in added.items() if str(token).strip(" \t\r\n▁")) | stops
        try:
            probe = self._labelled(_PROBE)
        except RowRefused as error:
            raise ModelInvalid(f"the base model cannot be trained: {error.message}", hint=error.hint) from error
        trained = sorted(stops.intersection(probe.labels))
        if not trained:
            raise ModelInvalid(
                "the chat template's markers mark nothing of what the assistant says",
                hint="{% generation %} and {% endgeneration %} have to stand around an answer and its end",
            )
        self.stop_texts: Final[tuple[str, ...]] = tuple(tokenizer.decode([stop]) for stop in trained)
        """Of the tokens that end an answer in this template."""

    @property
    def masked_by(self) -> str:
        """How it is known what the assistant says."""
        if self._template.marked:
            return "the chat template's own markers"
        return "the turns found in the chat template's rendering, and verified character by character"

    @property
    def notices(self) -> list[tuple[str, str, str]]:
        """(code, message, hint) of what is to be known about the base model."""
        if not self._template.dated:
            return []
        day = f"{TODAY:%d %b %Y}"
        return [
            (
                "fixed-date",
                f"the chat template writes the day into the prompt: rows are trained with {day}, always, so that a run "
                "that is resumed on another day is the same run",
                "",
            )
        ]

    def render(self, row: Row) -> RenderedRow:
        """The row as tokens, cut to max_length.

        Raises:
            RowRefused: the template refuses the row, or does not write what it says, or nothing of it would be trained.
        """
        ids, labels, _, _, notes = self._labelled(row)
        if self._bounds.passed(min(len(ids), self._max_length)):
            notes.add("beyond-context")
        cut = labels[self._max_length :]
        found = RenderedRow(
            row.line,
            tuple(ids[: self._max_length]),
            tuple(labels[: self._max_length]),
            cut=len(cut),
            cut_trained=len(cut) - cut.count(IGNORED),
            notes=tuple(sorted(notes)),
        )
        if found.trained_tokens == 0:
            why = (
                f"its prompt alone fills max_length ({self._max_length} of {len(ids)} tokens)"
                if len(ids) > self._max_length
                else "the chat template marks none of its tokens as the assistant's"
            )
            raise RowRefused(
                "nothing-trained",
                f"no token of it would be trained: {why}",
                hint="raise training.max_length, or shorten or remove the row",
            )
        return found

    def warnings_of(self, rendered: RenderedRow) -> list[tuple[str, str, str]]:
        """(code, message, hint) of what is worth a warning: what was cut, what the template leaves out."""
        found = []
        if rendered.cut_trained:
            how_much = (
                f"{rendered.whole} tokens are cut to {len(rendered.ids)}: {rendered.cut_trained} of the answers' "
                "are lost"
            )
            last = rendered.labels[-1]
            if last != IGNORED and last not in self._stops:
                code, also = "answer-cut", ", and the stop token: the model learns an answer that does not end"
            else:
                code, also = "answers-lost", ", whole answers; those that are left are complete"
            found.append((code, how_much + also, "raise training.max_length, or shorten or remove the row"))
        return found + [(note, *_WARNINGS[note]) for note in rendered.notes]

    def spans_of(self, row: Row) -> list[Span]:
        """The row's tokens as texts, as far as max_length goes: together they are its rendering, to the character.

        Raises:
            RowRefused: as render().
        """
        ids, labels, offsets, text, _ = self._labelled(row)
        found: list[Span] = []
        done = 0
        for token, label, (_, end) in list(zip(ids, labels, offsets, strict=True))[: self._max_length]:
            trained = label != IGNORED
            if end > done:  # else it is another token of the same character
                found.append(Span(text[done:end], trained, trained and token in self._stops))
                done = end
        if len(ids) <= self._max_length and done < len(text):
            found.append(Span(text[done:], False, False))
        return found

    def _labelled(self, row: Row) -> _Labelled:
        rendering = self._template.render(row)
        encoded = self.tokenizer(
            rendering.text,
            add_special_tokens=False,  # as apply_chat_template: the template writes them
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [IGNORED] * len(ids)
        notes = set(rendering.notes)
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        marks = self._template.marks(row) if self._template.marked else []
        for start, end in marks:
            refuse_others(start, end, rendering)
            first, _ = self._first_of(start, ids, starts, ends)
            # The last one may begin behind what it covers: of a blank many tokenizers count nothing to its token.
            behind = max(bisect_left(starts, end), bisect_left(ends, end) + 1)
            labels[first:behind] = ids[first:behind]
        for spoken in rendering.answers:
            stop = self._stop_of(spoken, ids, starts, ends)
            first, merged = self._first_of(spoken.start, ids, starts, ends)
            if merged:
                notes.add("prompt-merged")
            if not self._template.marked:
                labels[first : stop + 1] = ids[first : stop + 1]
            elif labels[first : stop + 1].count(IGNORED) == stop + 1 - first:
                notes.add("answer-unmarked")
            else:
                refuse_half_marked(spoken, first=labels[first] != IGNORED, stop=labels[stop] != IGNORED)
        if self._bounds.tokens is not None and max(ids, default=0) >= self._bounds.tokens:
            raise self._bounds.no_embedding(max(ids), self.tokenizer)
        if self._unknown and not self._unknown.isdisjoint(labels):
            at = next(place for place, label in enumerate(labels) if label in self._unknown)
            raise unknown_character(rendering.text[starts[at] : ends[at]], self.tokenizer.decode([ids[at]]))
        return _Labelled(ids, labels, offsets, rendering.text, notes)

    def _first_of(self, start: int, ids: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> tuple[int, bool]:
        """The first token of what begins at a character, and whether it covers something of what stands before."""
        first = bisect_right(ends, start)
        if first == len(ids):
            return first, False
        # A blank may belong to a token whose place begins behind it ("trim_offsets": Llama 3).
        blank = first > 0 and ends[first - 1] < start and self.tokenizer.decode([ids[first]])[:1].isspace()
        if starts[first] >= start and not blank:
            return first, False
        if ids[first] in self._control:
            return first + 1, False  # a control token that takes the blanks behind it (Phi 3); inference's does, too
        return first, True

    def _stop_of(self, spoken: Spoken, ids: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> int:
        """Which token ends the turn.

        Raises:
            RowRefused: none, or one at which inference does not stop.
        """
        at = bisect_right(ends, spoken.said)
        end = bisect_left(starts, spoken.limit)
        found = next((place for place in range(at, end) if ids[place] in self._control), None)
        if found is not None and ids[found] in self._stops:
            return found
        ends_with = repr(self.tokenizer.decode(ids[at:end] if found is None else [ids[found]])[:40])
        stops = ", ".join(sorted(self.tokenizer.decode([stop]) for stop in self._stops))
        raise RowRefused(
            "stop-not-trained",
            f"the chat template ends the answer in turn {spoken.turn} with {ends_with}, but the model stops at {stops} "
            "only: it would be trained to write on",
            hint="use the -Instruct variant, or name the end of the turn in eos_token_id of generation_config.json",
        )
