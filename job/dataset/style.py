"""What makes good rows teach the wrong thing: control tokens in a text, prefixes, one answer everywhere, and a few
long rows that outweigh the others."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from job.dataset.problems import Finding, find

_PREFIX: Final = re.compile(
    r"\s*(user|human|q|question|assistant|ai|bot|gpt|answer|instruction|input|response|output)\s?:", re.IGNORECASE
)
"""Not "A:", which begins many an answer to a multiple choice."""
_PREFIX_SHARE: Final = 0.01
"""Of the turns of a role; fewer may well be quotations."""
_LONGEST: Final = 0.01
"""Of the rows: these shall not hold half of the text. In a log-normal distribution with a standard deviation of 1.2,
which is wide for conversations, they hold 13 %."""
_UNBALANCED: Final = 0.5
_ENOUGH_ROWS: Final = 20
"""Fewer say little about shares."""
_REPEATED: Final = 0.2
_SAMPLE: Final = 100_000
"""Answers among which a frequent one is looked for: one of 20 % is the first of so many, beyond any doubt."""


def tokens_in(turns: Sequence[tuple[str, str]], control_tokens: frozenset[str], *, first: int = 1) -> list[Finding]:
    """The first control token of each turn that has one.

    Args:
        first: number of the first turn; 0 is a system text that stands beside the turns.
    """
    beginnings, pattern = _searched(control_tokens)
    found = []
    for number, (role, content) in enumerate(turns, start=first):
        for beginning in beginnings:
            # A plain search for a few beginnings is 20 times as fast as one for hundreds of tokens.
            if beginning in content:
                if match := pattern.search(content):
                    what = f"turn {number} ({role})" if number else role
                    found.append(find("control-token", what=what, token=match.group()))
                break
    return found


@lru_cache(maxsize=8)
def _searched(control_tokens: frozenset[str]) -> tuple[frozenset[str], re.Pattern[str]]:
    tokens = sorted((token for token in control_tokens if token), key=len, reverse=True)  # the longest that is there
    return frozenset(token[:2] for token in tokens), re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class Prefixes:
    """How turns begin, counted by role."""

    turns: Counter[str] = field(default_factory=Counter)
    said: Counter[tuple[str, str]] = field(default_factory=Counter)

    def see(self, turns: Sequence[tuple[str, str]]) -> None:
        """Take the turns of a row."""
        for role, content in turns:
            self.turns[role] += 1
            if ":" in content[:16] and (match := _PREFIX.match(content)):
                self.said[role, match.group(1) + ":"] += 1

    def add(self, other: Prefixes) -> None:
        """Add those of other rows."""
        self.turns.update(other.turns)
        self.said.update(other.said)

    def findings(self) -> Iterator[tuple[Finding, int]]:
        """Roles of which some turns have a prefix and others none, or another one; with the turns that have one."""
        for role in ("user", "assistant"):
            said = {prefix: count for (who, prefix), count in sorted(self.said.items()) if who == role}
            turns, count = self.turns[role], sum(said.values())
            if count < max(2, _PREFIX_SHARE * turns) or (count == turns and len(said) == 1):
                continue
            parts = [f'"{prefix}" ({number})' for prefix, number in said.items()]
            if count < turns:
                parts.append(f"no such prefix ({turns - count})")
            yield find("prefix-mixed", role=role, said=", ".join(parts[:-1]) + " and with " + parts[-1]), count


def find_unbalanced(sizes: Sequence[int]) -> Iterator[tuple[Finding, int]]:
    """Whether a few rows hold most of the text.

    Args:
        sizes: bytes of each row.
    """
    if len(sizes) < _ENOUGH_ROWS:
        return
    count = max(1, round(len(sizes) * _LONGEST))
    share = sum(heapq.nlargest(count, sizes)) / sum(sizes)
    if share >= _UNBALANCED:
        yield find("unbalanced", rows="row holds" if count == 1 else f"{count} rows hold", share=share), count


def find_repeated(answers: Sequence[int], lines: Sequence[int]) -> Iterator[tuple[Finding, int]]:
    """Whether many rows end with one answer.

    Args:
        answers: a digest of each row's.
        lines: of the rows.
    """
    rows = len(answers)
    if rows < _ENOUGH_ROWS:
        return
    sample = answers if rows <= _SAMPLE else random.Random(0).choices(answers, k=_SAMPLE)
    [(answer, _)] = Counter(sample).most_common(1)
    count = sum(each == answer for each in answers)
    if count > _REPEATED * rows:
        place = next(place for place, each in enumerate(answers) if each == answer)
        yield find("answer-repeated", rows=count, share=count / rows, line=lines[place]), count
