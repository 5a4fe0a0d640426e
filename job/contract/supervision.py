"""What the launcher asks the process that renders rows (`python -m job.supervise`), and what that answers."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from job.contract.check import Problem
from job.contract.records import Part, Sha256

MOST_EXAMPLES: Final = 100
"""Rows that can be shown token by token."""


class Ask(Part):
    """What to render, and with what."""

    tokenizer: str
    """Folder of the base model's configuration and tokenizer, or the id of the built-in model."""
    train: str
    """Path of the file."""
    train_name: str
    """What problems call it."""
    held_out: str | None = None
    """Path of a file of its own."""
    held_out_name: str = ""
    share: float | None = None
    """Of the rows of `train`, held out."""
    seed: int
    max_length: int
    shown: int = Field(ge=0)
    """Problems of each kind that are listed; all are counted."""
    lines: tuple[int, ...] = ()
    """Only show these lines of `train`, token by token."""


class Token(Part):
    """A piece of a rendered row."""

    text: str
    trained: bool
    is_stop: bool
    """Whether it ends a turn."""


class ShownRow(Part):
    """A row as the model is shown it."""

    line: int
    tokens: tuple[Token, ...]
    of_tokens: int
    """Before cutting to max_length."""


class Supervised(Part):
    """What became of the rows. What is said of an epoch leaves the held-out rows out."""

    train_sha256: Sha256
    """Of the very bytes that were rendered."""
    held_out_sha256: Sha256 | None
    problems: tuple[Problem, ...]
    counts: dict[str, int]
    """Problems of each kind, by code."""
    lengths: tuple[int, ...]
    """Tokens of each row of the file `train`, before cutting; 0 for one that is refused."""
    held_out_lengths: tuple[int, ...]
    """The same of the file `held_out`."""
    rows: int
    held_out_rows: int
    tokens: int
    """Of an epoch, after cutting."""
    trained_tokens: int
    cut_rows: int
    stop_tokens: tuple[str, ...]
    """Texts of those that are trained."""
    masked_by: str
    tokens_sha256: Sha256
    examples: tuple[int, ...] = Field(max_length=MOST_EXAMPLES)
    """Lines worth showing: the first, the longest, the shortest, and others from all over the file."""


class Answer(Part):
    """One of the three."""

    supervised: Supervised | None = None
    shown: tuple[ShownRow, ...] | None = None
    refused: Problem | None = None
    """The base model cannot be used at all."""


class Said(Part):
    """One line of stdout."""

    bytes_done: int = 0
    """Since the last line."""
    answer: Answer | None = None
