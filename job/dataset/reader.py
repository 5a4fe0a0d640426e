"""JSONL to rows. Every line is a row, blank, or an error with its number; nothing is dropped in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NewType, cast, get_args

from job.contract.errors import DatasetInvalid, FtjobError
from job.contract.records import DatasetDigest
from job.storage import Progress

Role = Literal["system", "user", "assistant"]
ROLES: Final = get_args(Role)

_READABLE: Final = "name a JSONL file that you may read"
_PROGRESS_BYTES: Final = 1024 * 1024

LineNumber = NewType("LineNumber", int)
"""Of a row in its file, from 1: what an editor shows."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Row:
    """One conversation and the line it stands on."""

    line: LineNumber
    messages: tuple[Message, ...]


def read_rows(path: Path, *, name: str) -> Iterator[Row]:
    """The rows of a JSONL file, in order; `name` is what errors call it.

    Blank lines are skipped; a byte order mark and CRLF line ends are accepted.

    Raises:
        DatasetInvalid: at the first line that is not a row, with its number.
    """
    try:
        with path.open("rb") as file:
            yield from _rows(file, name)
    except OSError as error:
        raise DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}", hint=_READABLE) from error


def fingerprint(path: Path, *, name: str, progress: Progress | None = None) -> DatasetDigest:
    """Validate every row, and digest the file's bytes: the very bytes that were validated, in one pass.

    Raises:
        DatasetInvalid: a line is not a row, or there is none.
    """
    digest = hashlib.sha256()
    size = 0

    def digested(lines: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal size
        reported = 0
        for raw in lines:
            digest.update(raw)
            size += len(raw)
            if progress is not None and size - reported >= _PROGRESS_BYTES:
                progress(size - reported)
                reported = size
            yield raw
        if progress is not None and size > reported:
            progress(size - reported)

    try:
        with path.open("rb") as file:
            rows = sum(1 for _ in _rows(digested(file), name))
    except OSError as error:
        raise DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}", hint=_READABLE) from error
    if rows == 0:
        raise DatasetInvalid(f"dataset {name} has no rows", hint='one {"messages": [...]} a line')
    return DatasetDigest(uri=name, sha256=digest.hexdigest(), size=size, rows=rows)


def _rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    for number, raw in enumerate(lines, start=1):
        text = _decode(raw, number, name).rstrip()  # with its line end, a cut line would fail on the next one
        if text:
            yield _parse(text, LineNumber(number), name)


def _decode(raw: bytes, number: int, name: str) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DatasetInvalid(
            f"dataset {name} line {number}: not UTF-8 at byte {error.start + 1} of the line",
            hint="save the file as UTF-8",
        ) from error


def _parse(text: str, line: LineNumber, name: str) -> Row:
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicate_keys)
    except _NotARow as error:
        raise DatasetInvalid(f"dataset {name} line {line}: {error.message}", hint=error.hint) from error
    except json.JSONDecodeError as error:
        raise DatasetInvalid(
            f"dataset {name} line {line}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}",
            hint="one complete JSON object a line",
        ) from error
    except RecursionError as error:
        raise DatasetInvalid(f"dataset {name} line {line}: nested too deeply") from error
    except ValueError as error:
        raise DatasetInvalid(f"dataset {name} line {line}: a number of thousands of digits") from error
    try:
        return Row(line, _messages(data))
    except _NotARow as error:
        raise DatasetInvalid(f"dataset {name} line {line}: {error.message}", hint=error.hint) from error


class _NotARow(FtjobError):
    pass


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The parser would keep the last and drop the others in silence.
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise _NotARow(f"the key {twice!r} stands twice in one object", hint="keep one")
    return found


def _messages(data: Any) -> tuple[Message, ...]:
    if not isinstance(data, dict):
        raise _NotARow(f"{_kind(data)}, not an object", hint='write {"messages": [...]}')
    if "messages" in data:
        turns = data["messages"]
        if not isinstance(turns, list) or not turns:
            raise _NotARow("messages is not a list of turns, or is empty")
        messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    elif "prompt" in data and "completion" in data:
        messages = (
            Message("user", _content(data["prompt"], "prompt")),
            Message("assistant", _content(data["completion"], "completion")),
        )
    else:
        keys = _shorten(", ".join(sorted(data)) or "none")
        raise _NotARow(
            f"neither messages nor prompt and completion (keys: {keys})",
            hint='write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        )
    if not any(message.role == "assistant" for message in messages):
        raise _NotARow("no assistant turn: nothing in it would be trained")
    return messages


def _message(turn: Any, index: int) -> Message:
    if not isinstance(turn, dict):
        raise _NotARow(f"turn {index + 1} is {_kind(turn)}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        said = "no role" if role is None else f"the role {_shorten(json.dumps(role))}"
        raise _NotARow(f"turn {index + 1} has {said}", hint=f"roles are {', '.join(ROLES)}")
    return Message(cast(Role, role), _content(content, f"turn {index + 1} ({role})"))


def _content(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _NotARow(f"{what} has {_kind(value)} as content, not a text")
    if not value.strip():
        raise _NotARow(f"{what} is empty", hint="remove the row, or write what should be said")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _NotARow(f"{what} holds half of a surrogate pair", hint="re-export it as UTF-8") from error
    return value


def _shorten(text: str) -> str:
    # Also for a terminal: half of a surrogate pair cannot be printed.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")
