"""Rows to tokens: the base model's own chat template, and the mask of what the assistant says. No torch.

Only assistant tokens are trained, the end of the turn included. The mask comes from the template's own
{% generation %} markers; a template without them is refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from job.contract.errors import DatasetInvalid, ModelInvalid
from job.dataset.reader import LineNumber, Row

IGNORED: Final = -100
"""Label of a token that is not trained (torch.nn.CrossEntropyLoss's ignore_index)."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: str | None

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


_MARKER: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Not the word alone: nearly every template has an `add_generation_prompt`."""


@dataclass(frozen=True)
class RenderedRow:
    """One row as tokens. `labels[i]` is `ids[i]` where the assistant speaks, IGNORED elsewhere."""

    line: LineNumber
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained_tokens(self) -> int:
        # The first token has nothing before it to be predicted from.
        return sum(label != IGNORED for label in self.labels[1:])


def render(rows: Iterable[Row], tokenizer: Tokenizer, *, max_length: int, name: str) -> list[RenderedRow]:
    """The rows as tokens, cut to max_length.

    Raises:
        ModelInvalid: the tokenizer has no chat template, or one that cannot say what the assistant speaks.
        DatasetInvalid: a row keeps no trained token; with its line.
    """
    if not tokenizer.chat_template:
        raise ModelInvalid("the base model's tokenizer has no chat template", hint="use the -Instruct variant")
    if not _MARKER.search(tokenizer.chat_template):
        raise ModelInvalid(
            "the base model's chat template does not mark what the assistant says ({% generation %})",
            hint="a template with markers is needed: training on all tokens would teach the model the user's part",
        )
    return [_render(row, tokenizer, max_length=max_length, name=name) for row in rows]


def _render(row: Row, tokenizer: Tokenizer, *, max_length: int, name: str) -> RenderedRow:
    from jinja2 import TemplateError  # comes with transformers, which is there when there is a tokenizer

    turns = [{"role": message.role, "content": message.content} for message in row.messages]
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a program in jinja can raise
        raise DatasetInvalid(
            f"dataset {name} line {row.line}: the chat template refuses it: {error}",
            hint="templates may forbid a role, or an order of roles",
        ) from error
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    labels = tuple(token if said else IGNORED for token, said in zip(ids, mask, strict=True))
    rendered = RenderedRow(row.line, tuple(ids[:max_length]), labels[:max_length])
    if rendered.trained_tokens == 0:
        why = (
            f"its prompt alone fills max_length ({max_length} of {len(ids)} tokens)"
            if len(ids) > max_length
            else "the chat template marks none of its tokens as the assistant's"
        )
        raise DatasetInvalid(
            f"dataset {name} line {row.line}: no token of it would be trained: {why}",
            hint="raise training.max_length, or shorten or remove the row",
        )
    return rendered


def split(rows: Sequence[RenderedRow], *, held_out: float, seed: int) -> tuple[list[RenderedRow], list[RenderedRow]]:
    """(train, held-out): the fraction `held_out` of the rows, at least one of each, chosen by the seed.

    Raises:
        DatasetInvalid: fewer than two rows.
    """
    if len(rows) < 2:
        raise DatasetInvalid(
            "one row cannot be split into train and held-out", hint="add rows, or set dataset.held_out to null"
        )
    count = min(max(1, round(len(rows) * held_out)), len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def tokens_digest(train: Iterable[RenderedRow], held_out: Iterable[RenderedRow]) -> str:
    """Sha256 over every token and label of both parts, in order: what is trained and what it is judged by."""
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(b"part\n")
        for row in part:
            digest.update(f"{row.line}:{row.ids}:{row.labels}\n".encode())
    return digest.hexdigest()
