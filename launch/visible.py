"""Text of somebody's dataset, made safe for a terminal."""

from __future__ import annotations

import unicodedata
from typing import Final

LINE_END: Final = "⏎"
_HARMLESS: Final = "\u200d"
"""Joins emoji."""


def visible(text: str, *, lines: bool = False) -> str:
    """The text without anything that a terminal would obey: control characters, and those that turn its direction.

    Args:
        lines: show where a line ends, and end it there.
    """
    return "".join(_visible(character, lines) for character in text)


def _visible(character: str, lines: bool) -> str:
    if lines and character == "\n":
        return f"{LINE_END}\n"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of the control characters
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != _HARMLESS:
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
