"""JSONL to rows. Every line is a row, blank, or an error with its number; nothing is dropped in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NewType, cast, get_args

from job.contract.errors import DatasetInvalid, FtjobError
from job.contract.records import DatasetDigest
from job.storage import Progress

Role = Literal["system", "user", "assistant"]
ROLES: Final = get_args(Role)

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
            for number, raw in enumerate(file, start=1):
                text = _decode(raw, number, name)
                if text.strip():
                    yield _parse(text, LineNumber(number), name)
    except OSError as error:
        raise DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}") from error


def fingerprint(path: Path, *, name: str, progress: Progress | None = None) -> DatasetDigest:
    """Validate every row, and digest the file's bytes. One pass over the disk each.

    Raises:
        DatasetInvalid: a line is not a row, or there is none.
    """
    rows = sum(1 for _ in read_rows(path, name=name))
    if rows == 0:
        raise DatasetInvalid(f"dataset {name} has no rows", hint='one {"messages": [...]} a line')
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return DatasetDigest(uri=name, sha256=digest.hexdigest(), size=path.stat().st_size, rows=rows)


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
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetInvalid(
            f"dataset {name} line {line}: not JSON: {error.msg} at column {error.colno}",
            hint="one complete JSON object a line",
        ) from error
    except RecursionError as error:
        raise DatasetInvalid(f"dataset {name} line {line}: nested too deeply") from error
    try:
        return Row(line, _messages(data))
    except _NotARow as error:
        raise DatasetInvalid(f"dataset {name} line {line}: {error.message}", hint=error.hint) from error


class _NotARow(FtjobError):
    pass


def _messages(data: Any) -> tuple[Message, ...]:
    if not isinstance(data, dict):
        raise _NotARow(f"a {_kind(data)}, not an object", hint='write {"messages": [...]}')
    if "messages" in data:
        turns = data["messages"]
        if not isinstance(turns, list) or not turns:
            raise _NotARow("messages is not a list of turns, or is empty")
        messages = tuple(_message(turn, index) for index, turn in enumerate(turns))
    elif "prompt" in data and "completion" in data:
        messages = (_message({"role": "user", "content": data["prompt"]}, 0),)
        messages += (_message({"role": "assistant", "content": data["completion"]}, 1),)
    else:
        keys = ", ".join(sorted(map(str, data))) or "none"
        raise _NotARow(
            f"neither messages nor prompt and completion (keys: {keys})",
            hint='write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        )
    if not any(message.role == "assistant" for message in messages):
        raise _NotARow("no assistant turn: nothing in it would be trained")
    return messages


def _message(turn: Any, index: int) -> Message:
    if not isinstance(turn, dict):
        raise _NotARow(f"turn {index + 1} is a {_kind(turn)}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise _NotARow(f"turn {index + 1} has the role {role!r}", hint=f"roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _NotARow(f"turn {index + 1} ({role}) has a {_kind(content)} as content, not a text")
    if not content.strip():
        raise _NotARow(f"turn {index + 1} ({role}) is empty", hint="remove the row, or write what should be said")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise _NotARow(f"turn {index + 1} ({role}) holds half of a surrogate pair", hint="re-export it as UTF-8")
    return Message(cast(Role, role), content)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
