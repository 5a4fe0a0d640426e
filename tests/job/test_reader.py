"""Reading a dataset: every line is a row, blank, or an error with its number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.errors import DatasetInvalid
from job.dataset.reader import ROLES, Message, Row, fingerprint, read_rows

GOOD = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
NAME = "s3://b/rows.jsonl"


def write(folder: Path, data: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> list[Row]:
    return list(read_rows(write(folder, data), name=NAME))


def line(value: Any) -> bytes:
    return json.dumps(value).encode()


def turns(*messages: Any) -> bytes:
    return line({"messages": messages})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ROW_HINT = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
ROLES_HINT = "roles are system, user, assistant"
SAY_HINT = "remove the row, or write what should be said"
TURN_HINT = 'a turn is {"role": "user", "content": "..."}'
CONTENT_HINT = "a content is one text"
TOOLS_HINT = (
    "tool calls are not trained: most chat templates drop them, and would train the stop token alone; "
    "write the turn as text, or remove the row"
)
JSON_HINT = "one complete JSON object a line"

BAD: dict[str, tuple[bytes, str, str]] = {
    "not JSON": (b"{'a': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2", JSON_HINT),
    "cut last line": (line(GOOD)[:-10], "not JSON: Unterminated string starting at column 76", JSON_HINT),
    "two objects": (line(GOOD) * 2, "not JSON: Extra data at column 93", JSON_HINT),
    "first line of pretty JSON": (
        b"{",
        "not JSON: Expecting property name enclosed in double quotes at column 2",
        JSON_HINT,
    ),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "UTF-16, not UTF-8", "save the file as UTF-8"),
    "latin-1": ('{"é": 1}'.encode("latin-1"), "not UTF-8 at byte 3 of the line", "save the file as UTF-8"),
    "lone surrogate": (
        turns(user("\ud83d"), assistant("a")),
        "turn 1 (user) holds half of a surrogate pair",
        "re-export it as UTF-8",
    ),
    "duplicate key": (
        b'{"messages": [], ' + line(GOOD)[1:],
        "the key 'messages' stands twice in one object",
        "keep one",
    ),
    "duplicate key within": (
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "the key 'content' stands twice in one object",
        "keep one",
    ),
    "array": (line([GOOD]), "a list, not an object", 'write {"messages": [...]}'),
    "text": (b'"text"', "a text, not an object", 'write {"messages": [...]}'),
    "number": (b"1.5", "a number, not an object", 'write {"messages": [...]}'),
    "boolean": (b"true", "a boolean, not an object", 'write {"messages": [...]}'),
    "null": (b"null", "nothing, not an object", 'write {"messages": [...]}'),
    "empty object": (b"{}", "neither messages nor prompt and completion nor conversations (keys: none)", ROW_HINT),
    "prompt alone": (
        line({"prompt": "a"}),
        "neither messages nor prompt and completion nor conversations (keys: prompt)",
        ROW_HINT,
    ),
    "messages null": (line({"messages": None}), "messages is not a list of turns, or is empty", ROW_HINT),
    "messages an object": (line({"messages": {}}), "messages is not a list of turns, or is empty", ROW_HINT),
    "messages empty": (line({"messages": []}), "messages is not a list of turns, or is empty", ROW_HINT),
    "turn a text": (turns("hello"), "turn 1 is a text, not an object", TURN_HINT),
    "turn null": (turns(user("a"), None), "turn 2 is nothing, not an object", TURN_HINT),
    "role missing": (turns(user("a"), {"content": "b"}), "turn 2 has no role", ROLES_HINT),
    "role bot": (turns(user("a"), {"role": "bot", "content": "b"}), 'turn 2 has the role "bot"', ROLES_HINT),
    "role Assistant": (
        turns(user("a"), {"role": "Assistant", "content": "b"}),
        'turn 2 has the role "Assistant"',
        ROLES_HINT,
    ),
    "role model": (turns({"role": "model", "content": "b"}), 'turn 1 has the role "model"', ROLES_HINT),
    "role tool": (turns({"role": "tool", "content": "b"}), 'turn 1 has the role "tool"', TOOLS_HINT),
    "role a list": (turns({"role": ["user"], "content": "b"}), 'turn 1 has the role ["user"]', ROLES_HINT),
    "ShareGPT turn": (turns({"from": "human", "value": "a"}), "turn 1 has no role", ROLES_HINT),
    "content missing": (turns({"role": "user"}), "turn 1 (user) has nothing as content, not a text", CONTENT_HINT),
    "content null": (
        turns(user("a"), assistant(None)),
        "turn 2 (assistant) has nothing as content, not a text",
        CONTENT_HINT,
    ),
    "content number": (turns(user(4)), "turn 1 (user) has a number as content, not a text", CONTENT_HINT),
    "content list": (
        turns(user([{"type": "text", "text": "a"}])),
        "turn 1 (user) has a list as content, not a text",
        CONTENT_HINT,
    ),
    "content object": (turns(user({})), "turn 1 (user) has an object as content, not a text", CONTENT_HINT),
    "tool call": (
        turns(user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}),
        "turn 2 has tool_calls",
        TOOLS_HINT,
    ),
    "empty assistant": (turns(user("a"), assistant("")), "turn 2 (assistant) is empty", SAY_HINT),
    "blank user": (turns(user(" \n\t"), assistant("a")), "turn 1 (user) is empty", SAY_HINT),
    "no assistant": (
        turns({"role": "system", "content": "s"}, user("a")),
        "no assistant turn: nothing in it would be trained",
        "add the answer, or remove the row",
    ),
    "prompt a number": (
        line({"prompt": 1, "completion": "b"}),
        "prompt has a number as content, not a text",
        CONTENT_HINT,
    ),
    "completion empty": (line({"prompt": "a", "completion": " "}), "completion is empty", SAY_HINT),
    "nested too deeply": (b"[" * 100_000, "nested too deeply", "a row is " + ROW_HINT.removeprefix("write ")),
    "endless number": (b'{"id": ' + b"1" * 5000 + b"}", "a number of thousands of digits", "write it as a text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("before", [0, 3])
def test_a_bad_line_is_told_with_its_number_its_reason_and_what_to_do(tmp_path: Path, case: str, before: int) -> None:
    bad, message, hint = BAD[case]
    good = (line(GOOD) + b"\n") * before
    with pytest.raises(DatasetInvalid) as caught:
        read(tmp_path, good + bad + b"\n")
    assert caught.value.message == f"dataset {NAME} line {before + 1}: {message}"
    assert caught.value.hint == hint


def test_a_bad_last_line_without_a_line_end_is_told_too(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match="line 2: not JSON"):
        read(tmp_path, line(GOOD) + b"\n" + line(GOOD)[:40])


def test_numbers_are_those_an_editor_shows(tmp_path: Path) -> None:
    rows = read(tmp_path, b"\n\r\n" + line(GOOD) + b"\r\n  \n" + line(GOOD))
    assert [row.line for row in rows] == [3, 5]


def test_a_message_can_be_printed_and_is_short_whatever_the_line_holds(tmp_path: Path) -> None:
    for bad in (
        line({"\ud83d": 1}),
        line({"k" * 10_000: 1}),
        turns({"role": "r" * 10_000}),
        turns({"role": "\ud83d"}),
        b'{"\\ud83d": 1, "\\ud83d": 2}',
    ):
        with pytest.raises(DatasetInvalid) as caught:
            read(tmp_path, bad)
        assert len(str(caught.value).encode()) < 400


def test_all_ways_to_write_a_row_are_the_same_row(tmp_path: Path) -> None:
    expected = (Message("user", "2 + 2?"), Message("assistant", "4"))
    assert [row.messages for row in read(tmp_path, line({"prompt": "2 + 2?", "completion": "4"}))] == [expected]
    assert [row.messages for row in read(tmp_path, line(GOOD))] == [expected]
    for speakers in [("human", "gpt"), ("user", "assistant")]:
        said = [{"from": who, "value": text} for who, text in zip(speakers, ("2 + 2?", "4"), strict=True)]
        assert [row.messages for row in read(tmp_path, line({"conversations": said, "id": 1}))] == [expected]
    with_system = line({"system": "Be brief.", "conversations": said})
    assert [row.messages for row in read(tmp_path, with_system)] == [(Message("system", "Be brief."), *expected)]


def test_columns_that_are_null_are_not_there(tmp_path: Path) -> None:
    """As a table with rows of several kinds is exported."""
    nulls: dict[str, None] = dict.fromkeys(["prompt", "completion", "conversations", "tools"])
    (row,) = read(tmp_path, line({**GOOD, **nulls}))
    assert len(row.messages) == 2
    (row,) = read(tmp_path, line({"prompt": "a", "completion": "b", "messages": None, "conversations": None}))
    assert len(row.messages) == 2


@pytest.mark.parametrize(
    "accepted",
    [
        b"\xef\xbb\xbf" + line(GOOD),
        line(GOOD) + b"\r\n",
        line({**GOOD, "id": 7, "meta": {"x": None}}),
        json.dumps(GOOD, ensure_ascii=False).replace("2 + 2?", "二加二 🧮\u2028?").encode(),
        turns({**user("a"), "name": "Ann"}, assistant("b"), user("a last user turn")),
        turns({"role": "system", "content": "first"}, user("a"), user("two in a row"), assistant("b")),
        turns(user("<|im_end|><|im_start|>assistant"), assistant("b")),
    ],
)
def test_what_is_unusual_and_harmless_here_is_one_row(tmp_path: Path, accepted: bytes) -> None:
    (row,) = read(tmp_path, accepted)
    assert row.line == 1


def test_texts_are_kept_to_the_letter(tmp_path: Path) -> None:
    content = "  two\r\nlines\t\u2028 é 🧮 \x00 "
    (row,) = read(tmp_path, turns(user(content), assistant(content)))
    assert [message.content for message in row.messages] == [content, content]


TEXT = st.text(min_size=1).filter(lambda text: text.strip() != "" and not any("\ud800" <= c <= "\udfff" for c in text))
TURN = st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")), "content": TEXT})
SYSTEM = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": TEXT}), max_size=1)
MESSAGES = st.tuples(SYSTEM, st.lists(TURN, max_size=4)).map(lambda parts: [*parts[0], *parts[1], assistant("said")])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\n"])


@given(rows=st.lists(st.tuples(MESSAGES, ENDS, st.booleans())), mark=st.booleans())
def test_rows_in_are_rows_out(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], mark: bool) -> None:
    data, expected, number = b"\xef\xbb\xbf" if mark else b"", [], 1
    for messages, after, escaped in rows:
        data += json.dumps({"messages": messages}, ensure_ascii=escaped).encode() + after
        expected.append((number, [(message["role"], message["content"]) for message in messages]))
        number += after.count(b"\n")
    path = write(tmp_path_factory.getbasetemp(), data)
    found = [(row.line, [(m.role, m.content) for m in row.messages]) for row in read_rows(path, name=NAME)]
    assert found == expected
    if rows:
        digest = fingerprint(path, name=NAME)
        assert (digest.rows, digest.size, digest.sha256) == (len(rows), len(data), hashlib.sha256(data).hexdigest())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ROLES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["messages", "role", "content", "prompt", "completion"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")) | JSON.map(line))
def test_any_bytes_are_rows_or_an_invalid_dataset_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), data)
    try:
        rows = list(read_rows(path, name=NAME))
    except DatasetInvalid as refused:
        said = str(refused)
        assert said.encode().startswith(f"dataset {NAME} line ".encode())
    else:
        assert len(rows) <= data.count(b"\n") + 1


# Files and digests


def test_a_file_that_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    for path, why in [(tmp_path / "missing", "No such file or directory"), (tmp_path, "Is a directory")]:
        for call in (lambda path: list(read_rows(path, name=NAME)), lambda path: fingerprint(path, name=NAME)):
            with pytest.raises(DatasetInvalid) as caught:
                call(path)
            assert caught.value.message == f"dataset {NAME} cannot be read: {why}"


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_a_dataset_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) == []
    with pytest.raises(DatasetInvalid, match=f"dataset {NAME} has no rows"):
        fingerprint(tmp_path / "rows.jsonl", name=NAME)


def test_a_bad_line_is_refused_before_it_is_digested(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match="line 2"):
        fingerprint(write(tmp_path, line(GOOD) + b"\n{}"), name=NAME)


def test_progress_sums_up_to_the_size_in_steps_worth_showing(tmp_path: Path) -> None:
    data = (turns(user("x" * 5000), assistant("y")) + b"\n") * 700  # 3.5 MB
    counts: list[int] = []
    digest = fingerprint(write(tmp_path, data), name=NAME, progress=counts.append)
    assert sum(counts) == digest.size == len(data)
    assert len(counts) == 4
