"""Logs: JSON lines, without secrets, that never kill a job nor change how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.logs import MASK, bind, configure, get_logger, mask

ROOT = Path(__file__).parents[2]
KEY_ID = "AKIA" + "IOSFODNN7EXAMPLE"
TOKEN = "hf_" + "abcdefghijABCDEFGHIJ0123"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    text = io.StringIO()
    configure(text)
    yield text
    configure(io.StringIO())


def told(stream: io.StringIO) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]


# JSON lines


def test_an_event_is_one_line_of_json_with_its_time_in_utc(stream: io.StringIO) -> None:
    get_logger().info("checkpoint.committed", step=400, size=10, seconds=1.5, why="first\nsecond")
    (event,) = told(stream)
    at = datetime.fromisoformat(event.pop("at"))
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
    assert event == {
        "event": "checkpoint.committed",
        "level": "info",
        "step": 400,
        "size": 10,
        "seconds": 1.5,
        "why": "first\nsecond",
    }


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_every_level_is_told(stream: io.StringIO, level: str) -> None:
    getattr(get_logger(), level)("thing.happened")
    assert [event["level"] for event in told(stream)] == [level]


def test_an_exception_is_told_with_its_trace(stream: io.StringIO) -> None:
    try:
        raise OSError("no space")
    except OSError:
        get_logger().exception("upload.failed")
    (event,) = told(stream)
    assert "OSError: no space" in event["exception"]
    assert "test_logs.py" in event["exception"]


def test_what_is_bound_is_on_every_later_event_in_every_thread(stream: io.StringIO) -> None:
    get_logger().info("early")
    bind(run_id="my-run", attempt=2)
    get_logger().info("later")
    thread = threading.Thread(target=lambda: get_logger().info("upload.finished", attempt=3))
    thread.start()
    thread.join()
    early, later, upload = told(stream)
    assert "run_id" not in early
    assert (later["run_id"], later["attempt"]) == ("my-run", 2)
    assert (upload["run_id"], upload["attempt"]) == ("my-run", 3)


def test_configuring_begins_afresh(stream: io.StringIO) -> None:
    bind(run_id="my-run")
    again = io.StringIO()
    configure(again)
    get_logger().info("thing.happened")
    assert "run_id" not in told(again)[0]
    assert stream.getvalue() == ""


def test_lines_of_many_threads_are_not_mixed(stream: io.StringIO) -> None:
    def work(number: int) -> None:
        for _ in range(50):
            get_logger().info("thing.happened", text=str(number) * 500)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told(stream)) == 400


class Strange:
    def __repr__(self) -> str:
        return f"Strange(token={TOKEN})"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value",
    [
        *[float("nan"), float("inf"), "\ud800", b"bytes", {1: 2, (3, 4): 5, None: 6}, {1, 2}, Path("a"), OSError("x")],
        *[
            Strange(),
            Hostile(),
            ENDLESS,
            object(),
            datetime.now(UTC),
            [Hostile()],
            {"deep": {"deeper": ENDLESS}},
            2**80,
        ],
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_value_stops_an_event(stream: io.StringIO, value: Any) -> None:
    get_logger().info("thing.happened", value=value)
    assert [event["event"] for event in told(stream)] == ["thing.happened"]


# Secrets


@pytest.mark.parametrize(
    "name",
    [
        *[
            "secret",
            "token",
            "hf_token",
            "HF_TOKEN",
            "password",
            "PASSWD",
            "aws_secret_access_key",
            "api_key",
            "apikey",
        ],
        *["AWS_ACCESS_KEY_ID", "credentials", "Authorization", "private_key", "access-key", "aws_session_token"],
    ],
)
def test_a_value_under_a_secrets_name_is_masked(stream: io.StringIO, name: str) -> None:
    get_logger().info("thing.happened", **{name: "s3cr3t"}, deep=[{"er": {name: ["s3cr3t"]}}])
    assert "s3cr3t" not in stream.getvalue()
    assert told(stream)[0][name] == MASK
    assert told(stream)[0]["deep"] == [{"er": {name: MASK}}]


@pytest.mark.parametrize(
    "name", ["tokens", "trained_tokens", "tokens_per_second", "tokenizer", "key", "keys", "step", "max_length", "seed"]
)
def test_a_value_under_another_name_is_told(stream: io.StringIO, name: str) -> None:
    get_logger().info("thing.happened", **{name: 1234})
    assert told(stream)[0][name] == 1234


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"key {KEY_ID}.", f"key {MASK}."),
        (f"with {TOKEN}", f"with {MASK}"),
        ("https://user:pass@host/x", f"https://{MASK}@host/x"),
        ("https://:pass@host/x", f"https://{MASK}@host/x"),
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {MASK}"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Credential=A%2F1&X-Amz-Signature=0a1b&x=1",
            f"https://b.s3.amazonaws.com/k?X-Amz-Credential={MASK}&X-Amz-Signature={MASK}&x=1",
        ),
        ("env HF_TOKEN=abc AWS_SECRET_ACCESS_KEY=x/y+z run", f"env HF_TOKEN={MASK} AWS_SECRET_ACCESS_KEY={MASK} run"),
    ],
)
def test_a_secret_within_a_text_is_masked_wherever_the_text_is(stream: io.StringIO, text: str, masked: str) -> None:
    assert mask(text) == masked
    bind(where=text)
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        get_logger().exception(text, error=error, deep=[{"a": (text,)}])
    (event,) = told(stream)
    assert event["event"] == event["where"] == event["error"] == masked
    assert event["deep"] == [{"a": [masked]}]
    assert f"RuntimeError: {masked}" in event["exception"]
    assert text not in event["exception"]


@pytest.mark.parametrize("text", ["s3://bucket/a@b:c", "12:30:45", "a:b@c", "step=400 key=runs/x", "https://host:443/"])
def test_a_text_without_a_secret_is_told_as_it_is(text: str) -> None:
    assert mask(text) == text


def test_a_secret_in_what_an_object_says_of_itself_is_masked(stream: io.StringIO) -> None:
    get_logger().info("thing.happened", value=Strange(), values=[Strange()])
    assert TOKEN not in stream.getvalue()
    assert told(stream)[0]["value"].startswith("Strange(")


@given(st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_masking_twice_is_masking_once(value: Any) -> None:
    assert mask(mask(value)) == mask(value)


# Dead streams


def test_a_stream_that_is_closed_or_full_is_no_error() -> None:
    closed = io.StringIO()
    closed.close()
    configure(closed)
    get_logger().info("thing.happened")
    with Path("/dev/full").open("w") as full:  # a real full disk
        configure(full)
        get_logger().info("thing.happened")
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), full.fileno())  # what is buffered would fail once more when it is closed
    configure(io.StringIO())


DEAD_PIPE = """
import sys
from job.logs import configure, get_logger
configure()
sys.stdin.readline()  # until nobody reads stderr any more
for number in range(int(sys.argv[1])):
    get_logger().info("thing.happened", number=number, text="x" * 1000)
print("a library's words", file=sys.stderr)  # which would fail there, in the middle of a step
print("saved", flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize("lines", [1, 1000])  # one stays in Python's buffer until exit, a thousand overflow it
def test_a_dead_pipe_neither_stops_a_job_nor_changes_its_exit_code(lines: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAD_PIPE, str(lines), str(code)],
        cwd=ROOT,
        env={
            name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"
        },  # it would hide the fault
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    out, _ = process.communicate("go\n", timeout=60)
    assert (out, process.returncode) == ("saved\n", code)


READ_NO_MORE = """
import sys, time
from job.logs import configure, get_logger
configure()
began = time.monotonic()
for number in range(1000):
    get_logger().info("thing.happened", number=number, text="x" * 9000)
print(time.monotonic() - began, flush=True)
sys.stdin.readline()  # until stderr is read again
get_logger().info("thing.went_on")
"""


def test_a_pipe_that_nobody_empties_stops_no_job_and_what_was_dropped_is_told() -> None:
    """ssh that hangs, a terminal that is paused: the reader lives, and reads no more."""
    with subprocess.Popen(
        [sys.executable, "-c", READ_NO_MORE],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert float(process.stdout.readline()) < 20  # and would otherwise be for ever
        os.set_blocking(process.stderr.fileno(), False)
        read = process.stderr.read()
        os.set_blocking(process.stderr.fileno(), True)
        _, rest = process.communicate("go\n", timeout=60)
    *whole, torn = read.split("\n")
    numbers = [json.loads(line)["number"] for line in whole]
    assert numbers == list(range(len(numbers)))
    assert numbers
    # A line takes three pages of the pipe's sixteen: the last one that went into it is torn, and ended later.
    assert torn.startswith("{")
    end, *after = rest.splitlines()
    assert end == ""
    dropped, last = (json.loads(line) for line in after)
    assert (dropped["event"], dropped["lines"]) == ("log.lines_dropped", 1000 - len(numbers))
    assert last["event"] == "thing.went_on"


def test_while_it_is_quiet_lines_wait_and_come_in_their_order() -> None:
    text, quiet = io.StringIO(), False
    configure(text, quiet=lambda: quiet)
    get_logger().info("before")
    quiet = True
    get_logger().info("meanwhile", number=1)
    thread = threading.Thread(target=lambda: get_logger().info("meanwhile", number=2))
    thread.start()
    thread.join()
    assert [event["event"] for event in told(text)] == ["before"]
    quiet = False
    get_logger().info("after")
    assert [(event["event"], event.get("number")) for event in told(text)] == [
        ("before", None),
        ("meanwhile", 1),
        ("meanwhile", 2),
        ("after", None),
    ]
    configure(io.StringIO())


def test_logs_go_to_stderr_and_leave_stdout_to_the_answer() -> None:
    code = "from job.logs import *; configure(); get_logger().info('thing.happened'); print('answer')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "answer\n"
    assert json.loads(done.stderr)["event"] == "thing.happened"
