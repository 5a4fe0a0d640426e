"""Promise: rows are rendered the same in one process and in many, all of them, in order, and without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.contract.supervision import Ask, Said, Supervised
from job.dataset.reader import LineNumber, Message, Row
from job.dataset.render import RenderedRow
from job.dataset.split import split, tokens_digest
from job.supervise import answer, examples
from job.tiny import write_tiny_model
from job.tokenising import (
    ALONE_BYTES,
    ROWS_AT_ONCE,
    Measured,
    Refusal,
    Rendering,
    measure_rows,
    processes_for,
    render_rows,
)
from tests.watching import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Rendering:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return Rendering(folder, max_length=80)


def rows(count: int) -> Iterator[Row]:
    """Every seventh has a prompt that fills max_length."""
    for n in range(count):
        question = "x" * (90 if n % 7 == 3 else n % 30)
        yield Row(
            LineNumber(2 * n + 1), (Message("user", f"q{question}"), Message("assistant", "word " * (n % 20 + 1)))
        )


@pytest.mark.slow
def test_measuring_is_rendering_without_the_tokens(rendering: Rendering) -> None:
    rendered = list(render_rows(rows(30), rendering, processes=1))
    measured = list(measure_rows(rows(30), rendering, processes=1))
    assert len(rendered) == len(measured) == 30
    for row, numbers in zip(rendered, measured, strict=True):
        if isinstance(row, Refusal):
            assert numbers == row
            assert row.code == "nothing-trained"
            continue
        assert isinstance(numbers, Measured)
        assert (numbers.line, numbers.kept, numbers.whole) == (row.line, len(row.ids), row.whole)
        assert (numbers.trained, numbers.digest) == (row.trained_tokens, row.digest)
        assert bool(numbers.warnings) == (row.cut_trained > 0)


@pytest.mark.slow
def test_many_processes_render_what_one_does_in_the_same_order(rendering: Rendering) -> None:
    count = 12 * ROWS_AT_ONCE + 5  # more than are waited for at once
    alone = list(render_rows(rows(count), rendering, processes=1))
    together = list(render_rows(rows(count), rendering, processes=2))
    assert together == alone
    assert list(measure_rows(rows(count), rendering, processes=2)) == list(
        measure_rows(rows(count), rendering, processes=1)
    )
    kept = [row for row in alone if isinstance(row, RenderedRow)]
    numbers = [row for row in measure_rows(rows(count), rendering, processes=1) if isinstance(row, Measured)]
    assert tokens_digest(*split(numbers, held_out=0.1, seed=3)) == tokens_digest(*split(kept, held_out=0.1, seed=3))


def test_a_small_file_is_not_worth_a_second_process() -> None:
    assert processes_for(ALONE_BYTES - 1) == 1
    assert 1 <= processes_for(10 * ALONE_BYTES) <= 8


@pytest.mark.slow
def test_the_answer_accounts_for_every_row_and_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, rendering: Rendering
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y"}]}
    with path.open("w") as file:
        for n in range(ALONE_BYTES // 2000 + 10):
            row["messages"][0]["content"] = "q" * (n % 50 + 1) + ("x" * 2000 if n % 3 else "")
            row["messages"][1]["content"] = "a" if n % 3 else "y" * 4000
            file.write(json.dumps(row) + ("\n\n" if n % 5 else "\nbad\n"))
    assert processes_for(path.stat().st_size) == min(len(os.sched_getaffinity(0)), 8)
    said: list[int] = []
    ask = Ask(
        tokenizer=str(rendering.folder),
        train=str(path),
        train_name="rows",
        share=0.25,
        seed=1,
        max_length=2000,
        shown=3,
    )
    told = answer(ask, said.append).supervised
    assert isinstance(told, Supervised)
    good = sum(length > 0 for length in told.lengths)
    assert len(told.lengths) == ALONE_BYTES // 2000 + 10
    assert len(told.lengths) - good == told.counts.get("nothing-trained", 0)
    assert told.rows + told.held_out_rows == good
    assert len([p for p in told.problems if p.code == "nothing-trained"]) == min(3, len(told.lengths) - good)
    assert sum(said) == path.stat().st_size
    assert len(said) > 5


def test_examples_are_the_first_the_longest_the_shortest_and_others_the_same_every_time() -> None:
    measured = [Measured(n + 10, 50 + (n * 37 + 500) % 1000, 50, 1, b"", ()) for n in range(1000)]
    lines = examples(measured)
    by_length = sorted(measured, key=lambda row: row.whole)
    assert lines[:3] == (10, by_length[-1].line, by_length[0].line)
    assert len(lines) == len(set(lines)) == 100
    assert lines == examples(measured)
    assert examples(measured[:2]) == (10, 11)
    assert examples([]) == ()


ASK = Ask(tokenizer="builtin:tiny", train="", train_name="rows", seed=1, max_length=200, shown=3)
WITHOUT_TORCH = """
import sys
from job.supervise import main
code = main()
loaded = [name for name in ("torch", "peft", "datasets") if sys.modules.get(name)]
sys.exit(f"loaded {loaded}" if loaded else code)
"""


def supervise(ask: Ask, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], input=ask.model_dump_json(), cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_process_renders_without_loading_torch(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    done = supervise(ASK.model_copy(update={"train": str(path)}), "-c", WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    lines = [Said.model_validate_json(line) for line in done.stdout.splitlines()]
    assert sum(line.bytes_done for line in lines) == path.stat().st_size
    assert lines[-1].answer is not None
    assert lines[-1].answer.supervised is not None
    assert lines[-1].answer.supervised.rows == 3


@pytest.mark.slow
def test_a_file_that_is_gone_is_told_in_a_line(tmp_path: Path) -> None:
    done = supervise(ASK.model_copy(update={"train": str(tmp_path / "gone")}), "-m", "job.supervise")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "gone" in done.stderr


@pytest.mark.slow
def test_no_worker_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "a" * 500, "completion": "b" * 500}) + "\n") * 20_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "job.supervise"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(ASK.model_copy(update={"train": str(path), "max_length": 4000}).model_dump_json())
    process.stdin.close()
    assert process.stdout.readline()  # it is at work
    group = process.pid
    wait_for(lambda: len(members(group)) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_for(lambda: not members(group))


def members(group: int) -> list[int]:
    """Processes of a group that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found
