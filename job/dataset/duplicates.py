"""Rows that are there twice, to the letter or nearly: what is kept of a row to find them, and the finding.

Near-duplicates are rows whose pairs of neighbouring words are mostly the same (shingles: Broder 1997, On the
resemblance and containment of documents). Of the pairs a row keeps a sketch of 32 bytes: one permutation hashing (Li,
Owen, Zhang 2012) with empty bins filled from the next one (Shrivastava, Li 2014), and of each bin's minimum one byte
(b-bit minwise hashing: Li, König 2010). Rows that agree in the 8 bins of one band are compared in all 32.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final
from zlib import crc32

_BINS: Final = 32
_EDGES: Final = tuple(range(0, 2**32, 2**32 // _BINS))
_BANDS: Final = 4
"""Of 8 bins. A pair that resembles at 0.95 meets in one with probability 1 - (1 - 0.95^8)^4 = 0.99, one at 0.5 with
0.02; see Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4."""
_ALIKE: Final = 28
"""Of 32 bins that agree: a resemblance of about 0.87 and more, 0.06 being one standard error."""
_FEW_WORDS: Final = 16
"""Of shorter texts a word makes too much of a difference: they are compared to the letter alone."""
_LONG_WORDS: Final = 16
"""Mean bytes of a word: above, a text beyond ASCII is in a writing without spaces, and two characters are a word."""
_AT_ONCE: Final = 1 << 20
"""Keys in one table: 100 MB. Of more rows the keys are gone through several times."""


@dataclass
class RowDigests:
    """What is kept of every row of a file, in order: 32 bytes, and 36 more of one that is not short.

    Args:
        lines: its number.
        digests: of roles and contents, two words of 64 bits.
        answers: of its last turn of the assistant.
        sizes: bytes of its contents.
        sketched: places of the rows that have a sketch.
        sketches: four words of 64 bits for each of these: its bands.
    """

    lines: array[int] = field(default_factory=lambda: array("I"))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    answers: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    sketched: array[int] = field(default_factory=lambda: array("I"))
    sketches: array[int] = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, turns: Sequence[tuple[str, str]]) -> None:
        """Keep a row."""
        contents = [content for _, content in turns]
        text = "".join(contents).encode()
        # With every length, or two rows with their text cut elsewhere would be one.
        shape = ",".join([f"{role}{len(content)}" for role, content in turns])
        answer = contents[-1] if turns[-1][0] == "assistant" else _last_answer(turns)
        self.lines.append(line)
        self.digests.frombytes(blake2b(b"%b\n%b" % (shape.encode(), text), digest_size=16).digest())
        # White space around it makes no other answer.
        self.answers.frombytes(blake2b(answer.strip().encode(), digest_size=8).digest())
        self.sizes.append(len(text))
        # What the system is told is the same in every row of many a dataset.
        spoken = text if turns[0][0] != "system" else text[len(contents[0].encode()) :]
        bands = sketch(spoken)
        if bands:
            self.sketched.append(len(self.lines) - 1)
            self.sketches.frombytes(bands)

    def extend(self, other: RowDigests) -> None:
        """Append rows that come after these."""
        before = len(self.lines)
        self.lines.extend(other.lines)
        self.digests.extend(other.digests)
        self.answers.extend(other.answers)
        self.sizes.extend(other.sizes)
        self.sketched.extend(place + before for place in other.sketched)
        self.sketches.extend(other.sketches)


def _last_answer(turns: Sequence[tuple[str, str]]) -> str:
    return next(content for role, content in reversed(turns) if role == "assistant")


def sketch(text: bytes) -> bytes | None:
    """32 bytes, most of them equal for texts that are nearly the same; None for a short one."""
    words = text.split()
    if len(text) > _LONG_WORDS * len(words) and not text.isascii():
        characters = text.decode()
        words = [characters[place : place + 2].encode() for place in range(len(characters) - 1)]
    if len(words) < _FEW_WORDS:
        return None
    pairs = sorted(map(crc32, words[1:], map(crc32, words)))
    end = len(pairs)
    pairs.append(pairs[0])
    return bytes([pairs[bisect_left(pairs, edge, 0, end)] & 0xFF for edge in _EDGES])


def find_equal(rows: RowDigests) -> Iterator[tuple[int, int]]:
    """Places (of a row, of the first one that is the same to the letter), in order."""
    found = array("I", range(len(rows)))
    for place, first in _met_before(rows.digests[0::2]):
        if rows.digests[2 * place + 1] == rows.digests[2 * first + 1]:
            found[place] = first
    yield from ((place, first) for place, first in enumerate(found) if first != place)


def find_alike(rows: RowDigests) -> Iterator[tuple[int, int]]:
    """Places (of a row, of one before it that is nearly, but not quite, the same), in order."""
    found = array("I", range(len(rows.sketched)))
    sketches = memoryview(rows.sketches.tobytes())
    for band in range(_BANDS):
        for place, first in _met_before(rows.sketches[band::_BANDS]):
            if found[place] != place:
                continue
            one, other = rows.sketched[place], rows.sketched[first]
            equal = rows.digests[2 * one : 2 * one + 2] == rows.digests[2 * other : 2 * other + 2]
            if not equal and _agreeing(sketches, place, first) >= _ALIKE:
                found[place] = first
    for place, first in enumerate(found):
        if first != place:
            yield rows.sketched[place], rows.sketched[first]


def _agreeing(sketches: memoryview, one: int, other: int) -> int:
    left, right = (int.from_bytes(sketches[_BINS * place : _BINS * (place + 1)], "big") for place in (one, other))
    return (left ^ right).to_bytes(_BINS, "big").count(0)


def _met_before(keys: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(its place, that of the first) for each key that was there before."""
    parts = -(-len(keys) // _AT_ONCE)
    for part in range(parts):
        first: dict[int, int] = {}
        for place, key in enumerate(keys):
            if parts == 1 or key % parts == part:
                earlier = first.setdefault(key, place)
                if earlier != place:
                    yield place, earlier
