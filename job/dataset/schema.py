"""One line's JSON to turns: three ways to write a row, and everything that can be wrong with one, found at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, get_args

from job.contract.errors import FtjobError
from job.dataset.problems import Finding, find

Role = Literal["system", "user", "assistant"]
ROLES: Final = get_args(Role)

Shape = Literal["messages", "prompt-completion", "sharegpt"]
"""prompt-completion and sharegpt are also the codes of the notices that tell of them."""

MOST_LINE: Final = 16 * 1024 * 1024
"""Bytes of a line: 100 times what any model reads. A file that is one endless line is never held in memory."""

_ROLES: Final = frozenset(ROLES)
_SHAREGPT: Final = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
"""Source: the ShareGPT section of LLaMA-Factory's data/README.md."""
_TOOL_ROLES: Final = frozenset({"tool", "function", "ipython", "observation", "function_call"})
_TOOL_KEYS: Final = ("tool_calls", "function_call", "tool_call_id")
_ROW_TOOL_KEYS: Final = ("tools", "functions")
_MEDIA_KEYS: Final = ("images", "image", "videos", "video", "audios", "audio")
"""Of a row or a turn, as TRL, LLaMA-Factory and LLaVA have them."""
_IGNORED_KEYS: Final = ("weight", "name", "train", "loss", "prefix", "reasoning_content", "reasoning", "thinking")
"""Keys of a turn that OpenAI, Mistral, axolotl, DeepSeek or TRL give a meaning."""
_BOM: Final = "\ufeff"


@dataclass(slots=True)
class Parsed:
    """A line that is not blank: its turns, those that cannot be read as empty texts, and all that was found."""

    turns: list[tuple[Role, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    shape: Shape = "messages"
    first: int = 1
    """Number of the first turn; 0 where the system's text stands beside the turns."""

    @property
    def is_row(self) -> bool:
        return not any(finding.is_error for finding in self.findings)

    def refuse(self, finding: Finding) -> None:
        """A turn that cannot be read."""
        self.findings.append(finding)
        self.turns.append(("user", ""))


def parse(raw: bytes, number: int) -> Parsed | None:
    """What a line holds; None for a blank one.

    Args:
        raw: with its line end; without one it is the file's last.
        number: from 1; the first may begin with a byte order mark.
    """
    if len(raw) > MOST_LINE:
        return Parsed(findings=[find("line-too-long", mib=MOST_LINE // 2**20)])
    try:
        text = raw.decode("utf-8").rstrip()  # with its line end, a cut line would fail on the next one
        if number == 1:
            text = text.removeprefix(_BOM)
        if not text:
            return None
        data = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Parsed(findings=[_wide(raw) or find("not-utf-8", byte=error.start + 1)])
    except _KeyTwice as error:
        return Parsed(findings=[find("duplicate-key", key=shorten(repr(error.message)))])
    except json.JSONDecodeError as error:
        return Parsed(findings=[_wide(raw) or _not_json(error, ends=not raw.endswith(b"\n"))])
    except RecursionError:
        return Parsed(findings=[find("json-depth")])
    except ValueError:  # Python's limit of 4300 digits
        return Parsed(findings=[find("json-number")])
    return _row(data)


def shorten(text: str, most: int = 80) -> str:
    """For a message. Also for a terminal: half of a surrogate pair cannot be printed, and no line end should be."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= most else text[: most - 3] + "..."


class _KeyTwice(FtjobError):
    pass


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The parser would keep the last and drop the others in silence.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _KeyTwice(next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index])))
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_no_duplicate_keys)


def _wide(raw: bytes) -> Finding | None:
    """UTF-16 has a zero byte in every second place where the text is western; JSON has none anywhere."""
    marked = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    return find("utf-16") if marked or raw.count(0) > len(raw) // 4 else None


def _not_json(error: json.JSONDecodeError, *, ends: bool) -> Finding:
    cut = ends and (error.msg.startswith("Unterminated string") or error.pos >= len(error.doc))
    return find("json-cut" if cut else "json", why=error.msg.removesuffix(" at"), column=error.colno)


def _row(data: Any) -> Parsed:
    parsed = Parsed()
    found = parsed.findings
    if not isinstance(data, dict):
        found.append(find("not-object", kind=_kind(data)))
        return parsed
    # A table that was exported has every column in every row, null where it does not apply.
    has_messages, has_conversations = data.get("messages") is not None, data.get("conversations") is not None
    has_pair = data.get("prompt") is not None and data.get("completion") is not None
    shapes = [("messages", has_messages), ("conversations", has_conversations), ("prompt and completion", has_pair)]
    present = [name for name, there in shapes if there]
    if len(present) > 1:
        found.append(find("ambiguous", one=present[0], other=present[1]))
        return parsed
    if has_conversations:
        parsed.shape = "sharegpt"
        _sharegpt(data, parsed)
    elif has_pair or ("messages" not in data and {"prompt", "completion"} <= data.keys()):
        parsed.shape = "prompt-completion"
        _content("user", data["prompt"], "prompt", parsed)
        _content("assistant", data["completion"], "completion", parsed)
    elif "messages" in data:
        _turns(data["messages"], "messages", parsed)
    else:
        keys = shorten(", ".join(sorted(data)) or "none")
        found.append(find("schema", keys=keys))
        return parsed
    for key in _ROW_TOOL_KEYS:
        if data.get(key):
            found.append(find("tools", key=key))
    found.extend(find("media", what="the row", key=key) for key in _MEDIA_KEYS if data.get(key))
    # TRL's unpaired preference, and LLaMA-Factory's name for it.
    unwanted = ("kto_tag", "label") if parsed.shape == "prompt-completion" else ("kto_tag",)
    found.extend(find("unwanted", key=key) for key in unwanted if data.get(key) is False)
    if data.get("system") and parsed.shape != "sharegpt":
        found.append(find("system-key", beside=(present or ["messages"])[0]))
    if parsed.is_row:
        _order(parsed)
    return parsed


def _sharegpt(data: dict[str, Any], parsed: Parsed) -> None:
    turns = data["conversations"]
    if isinstance(turns, list):
        turns = [_sharegpt_turn(turn) for turn in turns]
    if turns and data.get("system"):
        parsed.first = 0
        _content("system", data["system"], "system", parsed)
    _turns(turns, "conversations", parsed)


def _sharegpt_turn(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    role = _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**rest, "role": role, "content": turn.get("value")}


def _turns(turns: Any, key: str, parsed: Parsed) -> None:
    if not isinstance(turns, list) or not turns:
        parsed.findings.append(find("no-turns", key=key))
        return
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            parsed.refuse(find("turn-not-object", turn=number, kind=_kind(turn)))
            continue
        role = turn.get("role")
        if not (isinstance(role, str) and role in _ROLES):
            parsed.refuse(_no_role(turn, role, number))
            continue
        if len(turn) > 2 and _extra_keys(turn, number, parsed):
            continue
        content = turn.get("content")
        if isinstance(content, str) and content.isascii() and content and not content.isspace():
            parsed.turns.append((cast(Role, role), content))  # nearly all of them, and the rest takes time
        else:
            _content(role, content, f"turn {number} ({role})", parsed)


def _no_role(turn: dict[str, Any], role: Any, number: int) -> Finding:
    if role is None:
        return find("role-missing", turn=number)
    is_tool = isinstance(role, str) and role in _TOOL_ROLES
    return find("tool-turn" if is_tool else "role-unknown", turn=number, role=shorten(json.dumps(role)))


def _extra_keys(turn: dict[str, Any], number: int, parsed: Parsed) -> bool:
    """Tell of keys that a turn has besides; whether it calls a tool, or answers for one."""
    for key in _IGNORED_KEYS:
        if turn.get(key) is not None:
            parsed.findings.append(find("ignored-key", turn=number, key=key))
    parsed.findings.extend(find("media", what=f"turn {number}", key=key) for key in _MEDIA_KEYS if turn.get(key))
    called = [key for key in _TOOL_KEYS if turn.get(key)]
    if called:
        parsed.refuse(find("tool-call", turn=number, key=" and ".join(called)))
    return bool(called)


def _content(role: str, value: Any, what: str, parsed: Parsed) -> None:
    if not isinstance(value, str):
        parsed.refuse(find("content-kind", what=what, kind=_kind(value)))
    elif not value or value.isspace():
        parsed.refuse(find("content-empty", what=what))
    elif not value.isascii() and not _encodes(value):
        parsed.refuse(find("surrogate", what=what))
    else:
        parsed.turns.append((cast(Role, role), value))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order(parsed: Parsed) -> None:
    """What is wrong with who speaks when."""
    turns, before = parsed.turns, ""
    answered = False
    for number, (role, _) in enumerate(turns, start=parsed.first):
        if role == "system":
            if number > parsed.first:
                parsed.findings.append(find("system-late", turn=number))
        elif role == before:
            parsed.findings.append(find("same-role", one=number - 1, two=number, role=role))
        answered = answered or role == "assistant"
        before = role
    if not answered:
        parsed.findings.append(find("no-assistant"))
    elif before == "user":
        parsed.findings.append(find("unanswered"))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")
