"""Promise: `examine` tells everything that is wrong with a dataset, at once, and accounts for every line of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.contract.errors import DatasetInvalid, FtjobError
from job.dataset.duplicates import RowDigests, find_alike, find_equal
from job.dataset.examine import Examination, examine, shared_by_split, shared_rows
from job.dataset.problems import FEW_ROWS, KINDS
from job.dataset.reader import LineRefused, read_line, read_rows, whole_lines
from job.dataset.schema import MOST_LINE
from tests.job.broken_datasets import CONTROL_TOKENS, CORPUS, GOOD, LONG, assistant, chat, line, turns, user
from tests.watching import wait_for

ALL = 10**9
NAME = "rows.jsonl"


def write(folder: Path, data: bytes, name: str = NAME) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def look(folder: Path, data: bytes, **options: Any) -> Examination:
    return examine(write(folder, data), name=NAME, **{"few_rows": 0, "shown": ALL, **options})


def said(found: Examination) -> list[tuple[str, int | None, str]]:
    return [(problem.code, problem.line, problem.message) for problem in found.problems]


# The corpus


@pytest.mark.parametrize("case", CORPUS)
def test_what_is_wrong_is_told_exactly(tmp_path: Path, case: str) -> None:
    broken = CORPUS[case]
    found = look(tmp_path, broken.data, control_tokens=CONTROL_TOKENS, few_rows=broken.few_rows)
    assert said(found) == broken.said
    for problem in found.problems:
        kind = KINDS[problem.code]
        assert (problem.severity, problem.hint, problem.file) == (kind.severity, kind.hint, NAME)
    check = found.file
    assert check.lines == check.blank + check.rows + check.bad == broken.data.count(b"\n") + bool(last(broken.data))
    errors = {p.line for p in found.problems if p.severity == "error" and p.line is not None}
    assert len(errors) == check.bad
    assert check.digest.sha256 == hashlib.sha256(broken.data).hexdigest()


def last(data: bytes) -> bytes:
    return data.rpartition(b"\n")[2]


@pytest.mark.parametrize("case", CORPUS)
def test_the_job_refuses_what_the_check_refuses_and_for_the_first_of_its_reasons(tmp_path: Path, case: str) -> None:
    broken = CORPUS[case]
    found = look(tmp_path, broken.data)
    errors = [p for p in found.problems if p.severity == "error" and p.line is not None]
    if errors:
        with pytest.raises(DatasetInvalid) as refused:
            list(read_rows(tmp_path / NAME, name=NAME))
        assert (refused.value.message, refused.value.hint) == (f"dataset {errors[0].text}", errors[0].hint)
        return
    assert [row.line for row in read_rows(tmp_path / NAME, name=NAME)] == list(found.digests.lines)


def test_every_kind_of_problem_is_seen_in_the_corpus_and_its_hint_says_what_to_do() -> None:
    of_two_files, of_size = {"shared", "all-shared", "shared-near", "shared-split"}, {"line-too-long", "one-row"}
    assert {code for broken in CORPUS.values() for code, _, _ in broken.said} == KINDS.keys() - of_two_files - of_size
    assert all(kind.hint for kind in KINDS.values() if kind.severity != "notice")
    assert len(CORPUS) >= 60


def test_what_is_good_is_told_to_be_good(tmp_path: Path) -> None:
    rows = b"".join(chat(number) for number in range(FEW_ROWS))
    found = examine(write(tmp_path, rows), name=NAME, control_tokens=CONTROL_TOKENS)
    assert (found.problems, found.counts, found.file.rows) == ((), {}, FEW_ROWS)


# Counting


def test_problems_are_listed_up_to_a_number_of_each_kind_and_all_are_counted(tmp_path: Path) -> None:
    data = (line({}) + line(3)) * 30 + GOOD * 40
    for processes in (1, 2):
        found = look(tmp_path, data, shown=4, processes=processes)
        assert [(code, at) for code, at, _ in said(found) if at] == [
            *[("schema", 1), ("not-object", 2), ("schema", 3), ("not-object", 4)],
            *[("schema", 5), ("not-object", 6), ("schema", 7), ("not-object", 8)],
            *[("duplicate", at) for at in range(62, 66)],
        ]
        assert found.counts["schema"] == found.counts["not-object"] == 30
        assert found.counts["duplicate"] == 39


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Pieces of a few lines, so that every kind of problem is met in one piece or another."""
    parts = [broken.data for broken in CORPUS.values() if b"\x00" not in broken.data] + [GOOD] * 5
    random.Random(5).shuffle(parts)
    data = b"".join(part if part.endswith(b"\n") else part + b"\n" for part in parts) * 45 + chat(7)[:30]
    assert len(data) > 2 * 2 * 1024 * 1024  # as many pieces
    for shown in (3, ALL):
        alone, together = (
            look(tmp_path, data, control_tokens=CONTROL_TOKENS, shown=shown, processes=processes)
            for processes in (1, 2)
        )
        assert together == alone
        assert alone.file.lines == data.count(b"\n") + 1


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_sums_up_to_the_size(tmp_path: Path, processes: int) -> None:
    data = b"".join(turns(user("x" * 5000), assistant(str(n))) for n in range(1300))  # 6.5 MB
    counts: list[int] = []
    found = look(tmp_path, data, progress=counts.append, processes=processes)
    assert sum(counts) == found.file.digest.size == len(data)
    assert len(counts) >= 3


# Fuzzing: nothing but an FtjobError, and every line accounted for


def assert_accounted_for(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found = examine(path, name=NAME, control_tokens=CONTROL_TOKENS, shown=ALL)
    check = found.file
    lines = list(io.BytesIO(data))
    assert check.lines == len(lines) == check.blank + check.rows + check.bad
    assert check.digest.sha256 == hashlib.sha256(data).hexdigest()
    with_error = {p.line for p in found.problems if p.severity == "error" and p.line is not None}
    assert check.bad == len(with_error)
    assert sum(found.counts.get(code, 0) for code in KINDS) == sum(found.counts.values())
    json.dumps([problem.text for problem in found.problems], ensure_ascii=False).encode()  # can be printed
    refused = set()
    rows = []
    for number, raw in enumerate(lines, start=1):
        try:
            row = read_line(raw, number)
        except LineRefused:
            refused.add(number)
        else:
            if row is not None:
                rows.append(row)
    assert refused == {p.line for p in found.problems if p.severity == "error" and p.code != "control-token"} - {None}
    if not with_error:
        assert list(read_rows(path, name=NAME)) == rows
        assert list(found.digests.lines) == [row.line for row in rows]
        assert check.rows == len(rows)


KEYS = st.sampled_from(
    ["messages", "role", "content", "prompt", "completion", "conversations", "from", "value", "system", "tools"]
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "<|im_end|>", "\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
TURN = st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON, "from": JSON, "value": JSON, "weight": JSON})
ROW = st.fixed_dictionaries({"messages": st.lists(TURN | JSON, max_size=3)}) | st.fixed_dictionaries(
    {"conversations": st.lists(TURN, max_size=3)}, optional={"system": JSON}
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), max_size=6))
def test_arbitrary_bytes_are_accounted_for(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    assert_accounted_for(tmp_path_factory.getbasetemp() / NAME, b"\n".join(parts))


@settings(max_examples=120, deadline=None)
@given(st.lists((JSON | ROW).map(line), max_size=4))
def test_arbitrary_json_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    assert_accounted_for(tmp_path_factory.getbasetemp() / NAME, b"".join(parts))


SEED = (
    b"\xef\xbb\xbf"
    + b"".join(map(chat, range(3)))
    + CORPUS["ShareGPT"].data
    + CORPUS["pairs"].data
    + turns(user("é 🧮"), assistant("<|im|>"))
)
CHANGE = st.tuples(st.integers(0, len(SEED)), st.integers(0, 12), st.binary(max_size=4) | st.just(SEED[3:90]))


@settings(max_examples=120, deadline=None)
@given(st.lists(CHANGE, min_size=1, max_size=4))
def test_a_damaged_file_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bytes]]
) -> None:
    data = SEED
    for at, cut, put in changes:
        data = data[:at] + put + data[at + cut :]
    assert_accounted_for(tmp_path_factory.getbasetemp() / NAME, data)


# Files


@given(st.lists(st.binary(max_size=12), max_size=8), st.integers(1, 20))
def test_pieces_end_where_lines_end_and_lose_nothing(parts: list[bytes], size: int) -> None:
    data = b"\n".join(parts)
    blocks: list[bytes] = []
    pieces: list[bytes] = []
    for piece in whole_lines(io.BytesIO(data), blocks.append, size=size):
        pieces.append(piece)
        assert b"\n" not in b"".join(blocks).removeprefix(b"".join(pieces))  # no whole line is kept back
    assert b"".join(pieces) == b"".join(blocks) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("over", "ending"), [(0, b"\n" + GOOD), (0, b""), (1, b"\n"), (1, b""), (2**22, b""), (2**22, b"\n" + GOOD)]
)
def test_a_line_too_long_is_one_bad_line_and_is_not_held_in_memory(tmp_path: Path, ending: bytes, over: int) -> None:
    head = b'{"prompt": "a", "completion": "b'
    long = head + b" " * (MOST_LINE + over - len(head) - len(ending[:1]) - 2) + b'"}'
    data = GOOD + long + ending
    counts: list[int] = []
    found = look(tmp_path, data, progress=counts.append)
    assert sum(counts) == len(data)
    bad = [("line-too-long", 2, "longer than 16 MiB")] if over else []
    assert [each for each in said(found) if each[0] == "line-too-long"] == bad
    assert found.file.lines == 2 + (GOOD in ending)
    assert found.file.bad == bool(over)
    assert (found.file.digest.size, found.file.digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    longest = max(map(len, whole_lines(io.BytesIO(data), lambda _: None)))
    assert longest <= MOST_LINE + 1024 * 1024


def test_a_file_that_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    for path, why in [(tmp_path / "missing", "No such file or directory"), (tmp_path, "Is a directory")]:
        with pytest.raises(DatasetInvalid) as caught:
            examine(path, name=NAME)
        assert caught.value.message == f"dataset {NAME} cannot be read: {why}"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_grows_and_is_replaced_meanwhile_is_checked_as_it_was_digested(
    tmp_path: Path, processes: int
) -> None:
    # Of so much that some is not read yet when the first piece is done.
    rows = 600 if processes == 1 else 5000
    before = b"".join(turns(user(f"{n} " + "x" * 3000), assistant(str(n))) for n in range(rows))
    path = write(tmp_path, before)
    changed: list[bytes] = []

    def change(_: int) -> None:
        if not changed:
            with path.open("ab") as file:
                file.write(line({}) * 5)
            changed.append(path.read_bytes())
            (tmp_path / "other").write_bytes(b"another file\n")
            (tmp_path / "other").rename(path)

    found = examine(path, name=NAME, progress=change, processes=processes)
    assert found.file.digest.sha256 == hashlib.sha256(changed[0]).hexdigest()
    assert (found.file.rows, found.file.bad) == (rows, 5)


def test_a_checking_process_that_is_killed_is_told(tmp_path: Path) -> None:
    data = b"".join(turns(user(f"{n} " + "x" * 3000), assistant(str(n))) for n in range(5000))  # 15 MB

    killed: list[int] = []

    def kill(_: int) -> None:
        if not killed:  # now some pieces are still to be read
            for pid in children_of(os.getpid()):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    with pytest.raises(FtjobError, match="a process that checked it was killed"):
        look(tmp_path, data, progress=kill, processes=2)


ENDLESS = """
import sys
from pathlib import Path
from job.dataset.examine import examine

if __name__ == "__main__":
    examine(Path(sys.argv[1]), name="fifo", processes=2, progress=lambda _: print("begun", flush=True))
"""


def test_no_process_outlives_the_one_that_asked(tmp_path: Path) -> None:
    fifo, script = tmp_path / "fifo", tmp_path / "ask.py"
    os.mkfifo(fifo)
    script.write_text(ENDLESS)
    asking = subprocess.Popen([sys.executable, str(script), str(fifo)], stdout=subprocess.PIPE)
    with asking, fifo.open("wb", buffering=0) as file:  # is never ended, so neither is the asking
        file.write(b"".join(turns(user(f"{n} " + "x" * 3000), assistant("b")) for n in range(5000)))
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"begun\n"
        children = children_of(asking.pid)
        assert len(children) >= 2
        asking.kill()
        asking.wait()
        wait_for(lambda: not any(alive(pid) for pid in children))


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Copies


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{draw.randint(0, 300)}" for _ in range(count)]


def about(share_changed: float, seed: int, count: int = 200) -> tuple[str, str]:
    """A text, and it with so many of its words changed."""
    text = words(seed, count)
    other, draw = list(text), random.Random(seed + 1)
    for place in draw.sample(range(count), round(share_changed * count)):
        other[place] = f"changed{draw.random()}"
    return " ".join(text), " ".join(other)


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.005, 0.97, 1), (0.02, 0.75, 1), (0.12, 0, 0.03), (0.3, 0, 0), (1, 0, 0)]
)
def test_nearly_the_same_rows_are_found_and_others_are_not(share: float, least: float, most: float) -> None:
    digests = RowDigests()
    pairs = 200
    for seed in range(pairs):
        for text in about(share, seed * 1000):
            digests.add(len(digests) + 1, [("user", text), ("assistant", "b")])
    found = list(find_alike(digests))
    assert all(first == place - 1 for place, first in found)
    assert least <= len(found) / pairs <= most


def test_a_long_text_of_the_system_makes_no_rows_alike(tmp_path: Path) -> None:
    rows = [
        turns({"role": "system", "content": " ".join(words(99, 1500))}, user(" ".join(words(n, 40))), assistant(f"{n}"))
        for n in range(5)
    ]
    assert said(look(tmp_path, b"".join(rows))) == []


def test_rows_are_the_same_only_to_the_letter_and_with_their_roles(tmp_path: Path) -> None:
    different = [
        turns(user("ab"), assistant("c")),
        turns(user("a"), assistant("bc")),
        turns(user("ab"), assistant("c ")),
        turns(assistant("ab"), assistant("c")),
        turns(user("a"), user("b"), assistant("c")),
    ]
    assert "duplicate" not in look(tmp_path, b"".join(different)).counts
    assert look(tmp_path, b"".join(different) + different[1]).counts["duplicate"] == 1


def test_rows_are_not_the_same_by_half_of_a_digest() -> None:
    digests = RowDigests()
    for line_number in range(1, 4):
        digests.add(line_number, [("user", "a"), ("assistant", "b")])
    digests.digests[3] += 1  # of the second row, the second half
    assert list(find_equal(digests)) == [(2, 0)]


def shared(folder: Path, train: bytes, held_out: bytes) -> list[tuple[str, str, str]]:
    parts = [
        examine(write(folder, data, name), name=name, few_rows=0)
        for name, data in [("train", train), ("held", held_out)]
    ]
    return [(problem.severity, problem.code, problem.text) for problem in shared_rows(*parts)]


def test_rows_of_both_files_are_told_with_both_lines(tmp_path: Path) -> None:
    train = b"".join(map(chat, range(20)))
    assert shared(tmp_path, train, b"".join(map(chat, range(20, 30)))) == []
    held_out = chat(30) * 2 + b"\n" + chat(3) + chat(4)
    assert shared(tmp_path, train * 2, held_out) == [
        ("warning", "shared", "held: 2 of 4 rows are in train too: line 4 (there 4), line 5 (there 5)")
    ]
    held_out = b"".join(map(chat, range(8))) + chat(30)
    assert shared(tmp_path, train, held_out)[0][2].endswith("line 5 (there 5), …")


def test_copies_that_a_split_separates_are_told(tmp_path: Path) -> None:
    nearly = turns(user(LONG + " more"), assistant("b"))
    rows = chat(0) + chat(1) + b"\n" + chat(0) + chat(2) + chat(0) + turns(user(LONG), assistant("b")) + nearly
    seen = examine(write(tmp_path, rows), name="rows", few_rows=0)

    def said(*held_out: int) -> list[str]:
        return [problem.text for problem in shared_by_split(seen, held_out)]

    assert said() == said(1) == said(0, 2, 4) == []
    assert said(4, 1)[0].startswith("rows: 1 of the 2 rows that are held out")
    assert said(4, 1)[0].endswith("line 6 (line 1)")
    assert said(0, 2)[0].endswith("line 1 (line 6), line 4 (line 6)")
    assert said(6)[0].endswith("line 8 (line 7)")


def test_held_out_rows_that_are_all_trained_are_refused(tmp_path: Path) -> None:
    train = b"".join(map(chat, range(20)))
    assert shared(tmp_path, train, chat(3) + chat(4)) == [("error", "all-shared", "held: all 2 rows are in train too")]
    nearly = turns(user(LONG), assistant("b")), turns(user(LONG + " more"), assistant("b"))
    assert shared(tmp_path, train + nearly[0], nearly[1] + chat(40)) == [
        ("warning", "shared-near", "held: 1 of 2 rows are about the same as rows of train: line 1 (there 21)")
    ]
