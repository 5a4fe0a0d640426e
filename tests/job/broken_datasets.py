"""Datasets that are broken, each in one way, with everything that the check is to say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

CONTROL_TOKENS: Final = frozenset({"<|im_start|>", "<|im_end|", "<|im_end|>", "<|im|>", "[INST]"})

Said = tuple[str, int | None, str]
"""Code, line (None: of the whole file), message."""


@dataclass(frozen=True)
class Broken:
    """A dataset's bytes and what is wrong with it.

    Args:
        few_rows: what `examine` is given.
    """

    data: bytes
    said: list[Said]
    few_rows: int = 0


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def turns(*messages: Any, **more: Any) -> bytes:
    return line({"messages": list(messages)} | more)


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content} | more


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | more


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def chat(number: int) -> bytes:
    """A good row, unlike those of other numbers."""
    return turns(user(f"What is {number} + 1?"), assistant(f"{number + 1}."))


LONG: Final = " ".join(f"word{number}" for number in range(60))
"""A text long enough to be compared with others."""
CHINESE: Final = "".join(chr(0x4E00 + number * 7) for number in range(80))
GOOD: Final = chat(0)

CORPUS: Final[dict[str, Broken]] = {
    "UTF-16 with a mark": Broken(json.dumps({"a": 1}).encode("utf-16"), [("utf-16", 1, "UTF-16, not UTF-8")]),
    "UTF-16 of a Chinese text": Broken("\ufeff二三".encode("utf-16-le"), [("utf-16", 1, "UTF-16, not UTF-8")]),
    "UTF-16 without a mark": Broken(
        GOOD.decode().encode("utf-16-le").rstrip(b"\n\x00"), [("utf-16", 1, "UTF-16, not UTF-8")]
    ),
    "UTF-16 big-endian": Broken(GOOD + GOOD.decode().strip().encode("utf-16-be"), [("utf-16", 2, "UTF-16, not UTF-8")]),
    "latin-1": Broken(GOOD + '{"é": 1}\n'.encode("latin-1"), [("not-utf-8", 2, "not UTF-8 at byte 3 of the line")]),
    "a broken character after a byte order mark": Broken(
        b'\xef\xbb\xbf{"\xff": 1}\n',
        [
            ("byte-order-mark", None, "it begins with a byte order mark, which is skipped"),
            ("not-utf-8", 1, "not UTF-8 at byte 6 of the line"),
        ],
    ),
    "a UTF-8 character cut in two": Broken(b'{"\xe2\x82\n', [("not-utf-8", 1, "not UTF-8 at byte 3 of the line")]),
    "a surrogate in raw bytes": Broken(b'{"\xed\xa0\xbd": 1}\n', [("not-utf-8", 1, "not UTF-8 at byte 3 of the line")]),
    "a byte order mark in the middle": Broken(
        GOOD + b"\xef\xbb\xbf" + chat(1), [("json", 2, "not JSON: Expecting value at column 1")]
    ),
    "a binary file": Broken(b"PAR1\xff\xfe\x00\x01", [("not-utf-8", 1, "not UTF-8 at byte 5 of the line")]),
    "Python instead of JSON": Broken(
        b"{'a': 1}\n", [("json", 1, "not JSON: Expecting property name enclosed in double quotes at column 2")]
    ),
    "two objects on a line": Broken(GOOD.strip() + GOOD, [("json", 1, "not JSON: Extra data at column 102")]),
    "pretty-printed": Broken(
        b'{\n"messages": []\n}\n',
        [
            ("json", 1, "not JSON: Expecting property name enclosed in double quotes at column 2"),
            ("json", 2, "not JSON: Extra data at column 11"),
            ("json", 3, "not JSON: Expecting value at column 1"),
        ],
    ),
    "a list over several lines": Broken(
        b"[\n" + GOOD.strip() + b",\n" + chat(1) + b"]\n",
        [
            ("json", 1, "not JSON: Expecting value at column 2"),
            ("json", 2, "not JSON: Extra data at column 102"),
            ("json", 4, "not JSON: Expecting value at column 1"),
        ],
    ),
    "a comma behind each row": Broken(GOOD.strip() + b",\n", [("json", 1, "not JSON: Extra data at column 102")]),
    "CSV": Broken(
        b"prompt,completion\na,b\n",
        [("json", 1, "not JSON: Expecting value at column 1"), ("json", 2, "not JSON: Expecting value at column 1")],
    ),
    "line ends of an old Mac": Broken(
        GOOD.strip() + b"\r" + chat(1), [("json", 1, "not JSON: Extra data at column 103")]
    ),
    "the last line cut in a text": Broken(
        GOOD + chat(1)[:40],
        [("json-cut", 2, "not JSON: Expecting ':' delimiter at column 41, and there the file ends")],
    ),
    "the last line cut between": Broken(
        GOOD + b'{"messages": [', [("json-cut", 2, "not JSON: Expecting value at column 15, and there the file ends")]
    ),
    "the last line malformed and not cut": Broken(
        GOOD + b"{'a': 1}", [("json", 2, "not JSON: Expecting property name enclosed in double quotes at column 2")]
    ),
    "a cut line that is not the last": Broken(
        GOOD[:40] + b"\n" + chat(1), [("json", 1, "not JSON: Expecting ':' delimiter at column 41")]
    ),
    "nested too deeply": Broken(b"[" * 100_000 + b"\n", [("json-depth", 1, "nested too deeply")]),
    "a number without end": Broken(
        b'{"id": ' + b"1" * 5000 + b"}\n", [("json-number", 1, "a number of thousands of digits")]
    ),
    "a key twice in the row": Broken(
        b'{"messages": [], ' + GOOD[1:], [("duplicate-key", 1, "the key 'messages' stands twice in one object")]
    ),
    "a key twice in a turn": Broken(
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}\n',
        [("duplicate-key", 1, "the key 'role' stands twice in one object")],
    ),
    "a key twice in what is ignored": Broken(
        b'{"meta": {"a": 1, "a": 2}, ' + GOOD[1:], [("duplicate-key", 1, "the key 'a' stands twice in one object")]
    ),
    "a list": Broken(line([{"role": "user", "content": "a"}]), [("not-object", 1, "a list, not an object")]),
    "a text": Broken(line("text"), [("not-object", 1, "a text, not an object")]),
    "a number": Broken(line(1.5), [("not-object", 1, "a number, not an object")]),
    "a boolean": Broken(line(True), [("not-object", 1, "a boolean, not an object")]),
    "null": Broken(line(None), [("not-object", 1, "nothing, not an object")]),
    "an empty object": Broken(
        line({}), [("schema", 1, "neither messages nor prompt and completion nor conversations (keys: none)")]
    ),
    "a column of text": Broken(
        line({"text": "Once upon a time"}),
        [("schema", 1, "neither messages nor prompt and completion nor conversations (keys: text)")],
    ),
    "instruction, input and output": Broken(
        line({"instruction": "a", "input": "", "output": "b"}),
        [
            (
                "schema",
                1,
                "neither messages nor prompt and completion nor conversations (keys: input, instruction, output)",
            )
        ],
    ),
    "a prompt alone": Broken(
        line({"prompt": "a"}),
        [("schema", 1, "neither messages nor prompt and completion nor conversations (keys: prompt)")],
    ),
    "messages null": Broken(
        line({"messages": None}), [("no-turns", 1, "messages is not a list of turns, or is empty")]
    ),
    "messages a text": Broken(
        line({"messages": "[]"}), [("no-turns", 1, "messages is not a list of turns, or is empty")]
    ),
    "messages an object": Broken(
        line({"messages": {}}), [("no-turns", 1, "messages is not a list of turns, or is empty")]
    ),
    "messages empty": Broken(line({"messages": []}), [("no-turns", 1, "messages is not a list of turns, or is empty")]),
    "messages and conversations": Broken(
        turns(user("a"), assistant("b"), conversations=[human("a"), gpt("b")]),
        [("ambiguous", 1, "both messages and conversations: which is the row?")],
    ),
    "messages and a pair": Broken(
        turns(user("a"), assistant("b"), prompt="a", completion="b"),
        [("ambiguous", 1, "both messages and prompt and completion: which is the row?")],
    ),
    "a turn that is a text": Broken(turns("hello"), [("turn-not-object", 1, "turn 1 is a text, not an object")]),
    "a turn that is null": Broken(turns(user("a"), None), [("turn-not-object", 1, "turn 2 is nothing, not an object")]),
    "no role": Broken(turns({"content": "b"}, assistant("a")), [("role-missing", 1, "turn 1 has no role")]),
    "ShareGPT turns under messages": Broken(
        turns(human("a"), gpt("b")),
        [("role-missing", 1, "turn 1 has no role"), ("role-missing", 1, "turn 2 has no role")],
    ),
    "the role bot": Broken(
        turns(user("a"), {"role": "bot", "content": "b"}), [("role-unknown", 1, 'turn 2 has the role "bot"')]
    ),
    "the role Assistant": Broken(
        turns(user("a"), {"role": "Assistant", "content": "b"}),
        [("role-unknown", 1, 'turn 2 has the role "Assistant"')],
    ),
    "the role model": Broken(
        turns({"role": "model", "content": "b"}), [("role-unknown", 1, 'turn 1 has the role "model"')]
    ),
    "the role developer": Broken(
        turns({"role": "developer", "content": "b"}, user("a"), assistant("b")),
        [("role-unknown", 1, 'turn 1 has the role "developer"')],
    ),
    "a role that is a list": Broken(
        turns({"role": ["user"], "content": "b"}), [("role-unknown", 1, 'turn 1 has the role ["user"]')]
    ),
    "a role with half a surrogate": Broken(
        turns({"role": "\ud83d", "content": "b"}), [("role-unknown", 1, 'turn 1 has the role "\\ud83d"')]
    ),
    "the system in the middle": Broken(
        turns(user("a"), system("s"), assistant("b")),
        [("system-late", 1, "turn 2 is of the system, which speaks first or not at all")],
    ),
    "the system twice": Broken(
        turns(system("s"), system("s"), user("a"), assistant("b")),
        [("system-late", 1, "turn 2 is of the system, which speaks first or not at all")],
    ),
    "no assistant": Broken(
        turns(system("s"), user("a")), [("no-assistant", 1, "no assistant turn: nothing in it would be trained")]
    ),
    "content missing": Broken(
        turns({"role": "user"}, assistant("b")),
        [("content-kind", 1, "turn 1 (user) has nothing as content, not a text")],
    ),
    "content null": Broken(
        turns(user("a"), assistant(None)),
        [("content-kind", 1, "turn 2 (assistant) has nothing as content, not a text")],
    ),
    "content a number": Broken(
        turns(user(4), assistant("b")), [("content-kind", 1, "turn 1 (user) has a number as content, not a text")]
    ),
    "content in parts": Broken(
        turns(user([{"type": "text", "text": "a"}]), assistant("b")),
        [("content-kind", 1, "turn 1 (user) has a list as content, not a text")],
    ),
    "content an object": Broken(
        turns(user({}), assistant("b")), [("content-kind", 1, "turn 1 (user) has an object as content, not a text")]
    ),
    "an empty answer": Broken(turns(user("a"), assistant("")), [("content-empty", 1, "turn 2 (assistant) is empty")]),
    "a blank question": Broken(
        turns(user(" \n\t\u3000"), assistant("b")), [("content-empty", 1, "turn 1 (user) is empty")]
    ),
    "an empty system": Broken(
        turns(system(""), user("a"), assistant("b")), [("content-empty", 1, "turn 1 (system) is empty")]
    ),
    "half of a surrogate pair": Broken(
        turns(user("\ud83d"), assistant("b")), [("surrogate", 1, "turn 1 (user) holds half of a surrogate pair")]
    ),
    "a prompt that is a number": Broken(
        line({"prompt": 1, "completion": "b"}), [("content-kind", 1, "prompt has a number as content, not a text")]
    ),
    "a completion that is null": Broken(
        line({"prompt": "a", "completion": None}),
        [("content-kind", 1, "completion has nothing as content, not a text")],
    ),
    "an empty completion": Broken(
        line({"prompt": "a", "completion": " "}), [("content-empty", 1, "completion is empty")]
    ),
    "a tool call": Broken(
        turns(user("a"), assistant(None, tool_calls=[{}])), [("tool-call", 1, "turn 2 has tool_calls")]
    ),
    "a function call": Broken(
        turns(user("a"), assistant("b", function_call={"name": "f"})), [("tool-call", 1, "turn 2 has function_call")]
    ),
    "a tool's answer": Broken(
        turns(user("a"), {"role": "tool", "content": "b", "tool_call_id": "1"}, assistant("c")),
        [("tool-turn", 1, 'turn 2 has the role "tool"')],
    ),
    "a function's answer": Broken(
        turns(user("a"), {"role": "function", "content": "b"}, assistant("c")),
        [("tool-turn", 1, 'turn 2 has the role "function"')],
    ),
    "tools of the row": Broken(
        turns(user("a"), assistant("b"), tools=[{"type": "function"}]), [("tools", 1, "the row has tools")]
    ),
    "images of the row": Broken(
        turns(user("<image>What is it?"), assistant("A cat."), images=["cat.png"]),
        [("media", 1, "the row has images, which the model would not be shown")],
    ),
    "an image of a turn": Broken(
        turns(user("What is it?", image="cat.png"), assistant("A cat.")),
        [("media", 1, "turn 1 has image, which the model would not be shown")],
    ),
    "no images": Broken(turns(user("What is it?", image=None), assistant("A cat."), images=[]), []),
    "an unwanted answer": Broken(
        line({"prompt": "a", "completion": "b", "label": True})
        + line({"prompt": "c", "completion": "d", "label": False}),
        [
            (
                "prompt-completion",
                None,
                "prompt and completion, read as a turn of the user and one of the assistant (rows: 1)",
            ),
            ("unwanted", 2, "the row has label false, which marks an unwanted answer in preference data"),
        ],
    ),
    "an unwanted conversation": Broken(
        line({"conversations": [human("a"), gpt("b")], "kto_tag": False}),
        [("unwanted", 1, "the row has kto_tag false, which marks an unwanted answer in preference data")],
    ),
    "a label of a classification": Broken(turns(user("a"), assistant("b"), label=False), []),
    "a function call of ShareGPT": Broken(
        line({"conversations": [human("a"), {"from": "function_call", "value": "b"}, gpt("c")]}),
        [("tool-turn", 1, 'turn 2 has the role "function_call"')],
    ),
    "a control token in a question": Broken(
        turns(user("a<|im_end|>\n<|im_start|>assistant"), assistant("b")),
        [("control-token", 1, "turn 1 (user) holds <|im_end|>, a control token of the base model")],
    ),
    "a control token in an answer": Broken(
        turns(user("a"), assistant("b<|im_end|>")),
        [("control-token", 1, "turn 2 (assistant) holds <|im_end|>, a control token of the base model")],
    ),
    "a control token in the system's text": Broken(
        turns(system("[INST]"), user("a"), assistant("b")),
        [("control-token", 1, "turn 1 (system) holds [INST], a control token of the base model")],
    ),
    "a control token that is escaped": Broken(
        b'{"prompt": "\\u003c|im|>", "completion": "b"}\n',
        [("control-token", 1, "turn 1 (user) holds <|im|>, a control token of the base model")],
    ),
    "a control token behind a bad turn": Broken(
        turns(user(1), assistant("[INST]")),
        [
            ("content-kind", 1, "turn 1 (user) has a number as content, not a text"),
            ("control-token", 1, "turn 2 (assistant) holds [INST], a control token of the base model"),
        ],
    ),
    "a control token in ShareGPT's system": Broken(
        line({"system": "<|im|>", "conversations": [human("a"), gpt("b")]}),
        [("control-token", 1, "system holds <|im|>, a control token of the base model")],
    ),
    "conversations empty": Broken(
        line({"conversations": []}), [("no-turns", 1, "conversations is not a list of turns, or is empty")]
    ),
    "conversations null": Broken(
        line({"conversations": None}),
        [("schema", 1, "neither messages nor prompt and completion nor conversations (keys: conversations)")],
    ),
    "an unknown speaker": Broken(
        line({"conversations": [human("a"), {"from": "bing", "value": "b"}]}),
        [("role-unknown", 1, 'turn 2 has the role "bing"')],
    ),
    "nobody speaks": Broken(
        line({"conversations": [human("a"), {"value": "b"}]}), [("role-missing", 1, "turn 2 has no role")]
    ),
    "ShareGPT without value": Broken(
        line({"conversations": [human("a"), {"from": "gpt"}]}),
        [("content-kind", 1, "turn 2 (assistant) has nothing as content, not a text")],
    ),
    "ShareGPT that is not answered": Broken(
        line({"conversations": [human("a")]}),
        [("no-assistant", 1, "no assistant turn: nothing in it would be trained")],
    ),
    "nothing": Broken(b"", [("no-rows", None, "it has no rows")]),
    "blank lines alone": Broken(
        b"\n \r\n\n",
        [
            ("no-rows", None, "it has no rows"),
            ("crlf", None, "lines that end with CR LF, as Windows writes them (lines: 1)"),
        ],
    ),
    "a byte order mark alone": Broken(
        b"\xef\xbb\xbf",
        [
            ("no-rows", None, "it has no rows"),
            ("byte-order-mark", None, "it begins with a byte order mark, which is skipped"),
        ],
    ),
    "several problems of one row": Broken(
        turns(user(1), {"role": "bot"}, assistant(""), system("s"), tools=[1]),
        [
            ("content-kind", 1, "turn 1 (user) has a number as content, not a text"),
            ("role-unknown", 1, 'turn 2 has the role "bot"'),
            ("content-empty", 1, "turn 3 (assistant) is empty"),
            ("tools", 1, "the row has tools"),
        ],
    ),
    "several bad rows": Broken(
        line({}) + b"\n" + chat(1) + line(3) + b"{",
        [
            ("schema", 1, "neither messages nor prompt and completion nor conversations (keys: none)"),
            ("not-object", 4, "a number, not an object"),
            (
                "json-cut",
                5,
                "not JSON: Expecting property name enclosed in double quotes at column 2, and there the file ends",
            ),
        ],
    ),
    "few rows": Broken(b"".join(map(chat, range(3))), [("few-rows", None, "it has few rows: 3")], few_rows=4),
    "two questions in a row": Broken(
        turns(user("a"), user("b"), assistant("c")), [("same-role", 1, "turns 1 and 2 are both of the user")]
    ),
    "two answers in a row": Broken(
        turns(user("a"), assistant("b"), assistant("c")), [("same-role", 1, "turns 2 and 3 are both of the assistant")]
    ),
    "the last question is not answered": Broken(
        turns(user("a"), assistant("b"), user("c")),
        [("unanswered", 1, "the last turn is of the user, and nothing answers it")],
    ),
    "a weight": Broken(
        turns(user("a"), assistant("b", weight=0)), [("ignored-key", 1, "turn 2 has weight, which is ignored here")]
    ),
    "a name and a thought": Broken(
        turns(user("a", name="Ann"), assistant("b", reasoning_content="c")),
        [
            ("ignored-key", 1, "turn 1 has name, which is ignored here"),
            ("ignored-key", 1, "turn 2 has reasoning_content, which is ignored here"),
        ],
    ),
    "a system beside messages": Broken(
        turns(user("a"), assistant("b"), system="s"), [("system-key", 1, "the key system beside messages is ignored")]
    ),
    "a system beside a pair": Broken(
        line({"prompt": "a", "completion": "b", "system": "s"}),
        [
            (
                "prompt-completion",
                None,
                "prompt and completion, read as a turn of the user and one of the assistant (rows: 1)",
            ),
            ("system-key", 1, "the key system beside prompt and completion is ignored"),
        ],
    ),
    "the same row three times": Broken(
        chat(1) + chat(2) + chat(1) + b"\n" + chat(1),
        [("duplicate", 3, "the same row as line 1"), ("duplicate", 5, "the same row as line 1")],
    ),
    "the same long row": Broken(turns(user(LONG), assistant("b")) * 2, [("duplicate", 2, "the same row as line 1")]),
    "the same row written otherwise": Broken(
        turns(user("a"), assistant("b")) + line({"prompt": "a", "completion": "b"}),
        [
            (
                "prompt-completion",
                None,
                "prompt and completion, read as a turn of the user and one of the assistant (rows: 1)",
            ),
            ("duplicate", 2, "the same row as line 1"),
        ],
    ),
    "nearly the same row": Broken(
        turns(user(LONG), assistant("b")) + chat(1) + turns(user(LONG + " more"), assistant("b")),
        [("near-duplicate", 3, "about the same row as line 1")],
    ),
    "nearly the same row in Chinese": Broken(
        turns(user(CHINESE), assistant("b")) + turns(user(CHINESE + "一"), assistant("b")),
        [("near-duplicate", 2, "about the same row as line 1")],
    ),
    "questions with a prefix in some rows": Broken(
        b"".join(map(chat, range(4))) + b"".join(turns(user(f"User: {n}"), assistant(f"n{n}")) for n in range(2)),
        [("prefix-mixed", None, 'turns of the user begin with "User:" (2) and with no such prefix (4)')],
    ),
    "two prefixes": Broken(
        b"".join(turns(user(f"{who}: {who}"), assistant(f"{who}.")) for who in ("Human", "User")),
        [("prefix-mixed", None, 'turns of the user begin with "Human:" (1) and with "User:" (1)')],
    ),
    "answers with a prefix in some rows": Broken(
        b"".join(map(chat, range(2))) + b"".join(turns(user(f"{n}"), assistant(f"AI: {n}")) for n in range(2)),
        [("prefix-mixed", None, 'turns of the assistant begin with "AI:" (2) and with no such prefix (2)')],
    ),
    "one row holds the text": Broken(
        b"".join(map(chat, range(20))) + turns(user(LONG * 5), assistant("b")),
        [("unbalanced", None, "the longest row holds 86% of the text")],
    ),
    "one answer everywhere": Broken(
        b"".join(map(chat, range(15))) + b"".join(turns(user(f"{n}"), assistant("No." + " " * n)) for n in range(5)),
        [("answer-repeated", None, "5 rows (25%) end with the same answer, as line 16 does")],
    ),
    "ShareGPT": Broken(
        line({"conversations": [human("a"), gpt("b")], "id": 1}) * 1
        + line({"system": "s", "conversations": [human("a"), gpt("b")]}),
        [("sharegpt", None, "ShareGPT conversations, read as messages (rows: 2)")],
    ),
    "pairs": Broken(
        line({"prompt": "a", "completion": "b"}) + line({"prompt": "c", "completion": "d"}),
        [
            (
                "prompt-completion",
                None,
                "prompt and completion, read as a turn of the user and one of the assistant (rows: 2)",
            )
        ],
    ),
    "made on Windows": Broken(
        b"\xef\xbb\xbf" + chat(1).strip() + b"\r\n" + chat(2),
        [
            ("byte-order-mark", None, "it begins with a byte order mark, which is skipped"),
            ("crlf", None, "lines that end with CR LF, as Windows writes them (lines: 1)"),
        ],
    ),
    "mixed schemas": Broken(
        chat(1) + line({"prompt": "a", "completion": "b"}) + line({"conversations": [human("c"), gpt("d")]}),
        [
            ("sharegpt", None, "ShareGPT conversations, read as messages (rows: 1)"),
            (
                "prompt-completion",
                None,
                "prompt and completion, read as a turn of the user and one of the assistant (rows: 1)",
            ),
        ],
    ),
}
