"""What a chat template writes around the texts of a conversation, and the proof that it wrote those texts.

A conversation is written with a sentinel, one character of a private plane, in place of each text. What stands between
the sentinels is the skeleton. A real rendering has to be the skeleton with the texts put back, character by character:
so nothing was dropped, moved, repeated or rewritten, and it is known where each text stands.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from job.dataset.refused import RowRefused

SENTINELS: Final = 0xFFFE
"""How many there are."""

_REASONING_ENDS: Final = "</think>"
_FIRST: Final = 0xF0000
_SENTINEL: Final = re.compile("[\U000f0000-\U000ffffd]")
"""Supplementary private use area A: no character of it has a meaning (The Unicode Standard, chapter 23.5)."""

Shape = tuple[tuple[str, tuple[str | None, ...]], ...]
"""Of each turn its role, and the parts of its content: None for a text, or what stays as it is: a tag, or blanks."""


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the texts of a shape: one literal before each text, and one behind the last."""

    literals: tuple[str, ...]
    order: tuple[int, ...]
    """Numbers of the texts, counted through the conversation, as they appear."""
    turns: tuple[int, ...]
    """Of each text in that order, the turn it belongs to, from 0."""
    lacks_reasoning: bool
    """Of an earlier answer."""

    def texts_of(self, turn: int) -> tuple[int, int]:
        """Places of the turn's first and last text in the order; they stand together."""
        first = self.turns.index(turn)
        return first, first + self.turns.count(turn) - 1

    def put_back(self, texts: Sequence[str], written: str) -> list[tuple[int, int]]:
        """(start, end) of each text in a real rendering, in order: the proof that it is these texts.

        Templates may trim a text. Which blanks they trim is found by trying; with the literal that follows, few fit.

        Raises:
            RowRefused: it is not.
        """
        places: list[tuple[int, int]] = []
        tries = [iter(_trimmed(texts[self.order[0]]))] if written.startswith(self.literals[0]) else []
        furthest = 0
        hopeless: set[tuple[int, int]] = set()
        while tries:
            at = len(tries) - 1
            start = (places[-1][1] if places else 0) + len(self.literals[at])
            text = next(tries[-1], None)
            if text is None:
                hopeless.add((at, start))
                tries.pop()
                places = places[:-1]
                continue
            end = start + len(text)
            behind = end + len(self.literals[at + 1])
            if not (written.startswith(text, start) and written.startswith(self.literals[at + 1], end)):
                continue
            if at + 1 == len(self.order):
                if behind == len(written):
                    return [*places, (start, end)]
            elif (at + 1, behind) not in hopeless:
                places.append((start, end))
                furthest = max(furthest, at + 1)
                tries.append(iter(_trimmed(texts[self.order[at + 1]])))
        raise RowRefused(
            "template-rewrites",
            f"the chat template does not write turn {self.turns[furthest] + 1} as it is, so it cannot be told what "
            "would be trained",
            hint="look in its text for markup that the template treats in its own way",
        )


def with_sentinels(shape: Shape) -> list[tuple[str, str]]:
    """(role, content) of each turn, a sentinel for each text."""
    turns: list[tuple[str, str]] = []
    number = _FIRST
    for role, parts in shape:
        content = ""
        for part in parts:
            content += chr(number) if part is None else part
            number += part is None
        turns.append((role, content))
    return turns


def sentinels_in(written: str) -> list[int]:
    """Numbers of the texts that stand there."""
    return [ord(found) - _FIRST for found in _SENTINEL.findall(written)]


def tail_of(written: str) -> str:
    """What stands behind the last text."""
    return _SENTINEL.split(written)[-1]


def skeleton_of(written: str, shape: Shape) -> Skeleton:
    """Of a rendering with sentinels, in which every turn has its place.

    Raises:
        RowRefused: a turn was dropped, repeated or moved. What reasoning an earlier answer holds may be left out.
    """
    owners = [turn for turn, (_, parts) in enumerate(shape) for part in parts if part is None]
    order = sentinels_in(written)
    times = Counter(order)
    if twice := [number for number in order if times[number] > 1]:
        raise _refused("repeats", owners[twice[0]], shape)
    dropped = {turn for number, turn in enumerate(owners) if number not in times}
    for turn in sorted(dropped):
        if not _only_reasoning_is_left_out(owners, times, turn, shape):
            raise _refused("drops", turn, shape)
    turns = tuple(owners[number] for number in order)
    # A system turn may be written into a user's; every other one has its place.
    placed = [number for number in order if shape[owners[number]][0] != "system"]
    moved = [owners[one] for one, after in pairwise(placed) if after < one]
    torn = [turn for turn, after in pairwise(turns) if turn != after and turns.index(after) < turns.index(turn)]
    for turn in [*moved, *torn]:
        raise _refused("moves", turn, shape)
    return Skeleton(tuple(_SENTINEL.split(written)), tuple(order), turns, bool(dropped))


def _refused(does: str, turn: int, shape: Shape) -> RowRefused:
    role = shape[turn][0]
    hint = "put its text into the first user turn" if role == "system" else "remove it, or end the row before it"
    return RowRefused(f"template-{does}", f"the chat template {does} turn {turn + 1} ({role})", hint=hint)


def _only_reasoning_is_left_out(owners: Sequence[int], times: Counter[int], turn: int, shape: Shape) -> bool:
    role, parts = shape[turn]
    if role != "assistant" or _REASONING_ENDS not in parts:
        return False
    reasoning_ends = len(parts) - 1 - parts[::-1].index(_REASONING_ENDS)
    first = owners.index(turn)
    answer = [first + parts[:at].count(None) for at, part in enumerate(parts) if part is None and at > reasoning_ends]
    return bool(answer) and all(number in times for number in answer)


def _trimmed(text: str) -> tuple[str, ...]:
    """The ways in which templates write a text."""
    if not (text[:1].isspace() or text[-1:].isspace()):
        return (text,)
    newline = "\n"
    ways = [text, text.strip(), text.strip(newline), text.lstrip(), text.rstrip()]
    return tuple(dict.fromkeys([*ways, text.lstrip(newline), text.rstrip(newline)]))
