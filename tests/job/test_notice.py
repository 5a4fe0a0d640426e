"""Promise: a notice is heard from the first moment on, at any moment, once, and kills nothing by itself."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from job.notice import Notice

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def child(script: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs this with a Notice at hand, and has said that it is ready."""
    before = "import os, signal, sys, time\nfrom job.notice import Notice\nnotice = Notice()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", before + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def last_words(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr. Not communicate: it would miss what was read ahead with the first line."""
    code = process.wait(timeout=30)
    assert process.stdout is not None
    assert process.stderr is not None
    return code, process.stdout.read(), process.stderr.read()


LISTEN = "notice.listen()\nprint('ready', flush=True)\n"
TELL = "print(given, notice.reason, notice.given, 0 < notice.at <= time.monotonic())\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_waiting_and_not_the_process(number: signal.Signals) -> None:
    with child(LISTEN + "given = notice.wait(60)\n" + TELL) as process:
        began = time.monotonic()
        process.send_signal(number)
        words = last_words(process)
        assert time.monotonic() - began < 20
        assert words == (0, f"True {number.name} True True\n", "")


def test_without_listening_a_signal_is_death() -> None:
    """Keeps the test above honest."""
    with child("print('ready', flush=True)\ngiven = notice.wait(60)\n" + TELL) as process:
        process.send_signal(signal.SIGTERM)
        assert last_words(process) == (-signal.SIGTERM, "", "")


def test_a_computation_is_not_interrupted_and_sees_the_flag_when_it_looks() -> None:
    with child(LISTEN + "while not notice.given: sum(range(1000))\ngiven = notice.wait(0)\n" + TELL) as process:
        process.send_signal(signal.SIGTERM)
        assert last_words(process) == (0, "True SIGTERM True True\n", "")


def test_of_several_signals_the_first_is_the_reason() -> None:
    script = (
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "    first = notice.at if number == signal.SIGINT else first\n"
        "given = notice.at == first\n"
    )
    with child(LISTEN + script + TELL) as process:
        assert last_words(process) == (0, "True SIGINT True True\n", "")


def test_the_first_reason_and_its_time_stay() -> None:
    notice = Notice()
    assert (notice.given, notice.reason, notice.at) == (False, "", 0.0)
    notice.give("SIGTERM")
    at = notice.at
    notice.give("the metadata server", grace_seconds=110.0)
    assert (notice.given, notice.reason, notice.at, notice.grace_seconds) == (True, "SIGTERM", at, 0.0)


def test_it_is_unanswered_from_its_giving_to_its_answer() -> None:
    notice = Notice()
    assert not notice.unanswered
    notice.give("SIGTERM")
    assert notice.unanswered
    notice.answer()
    assert not notice.unanswered
    notice.give("SIGTERM")
    assert (notice.given, notice.unanswered) == (True, False)


def test_an_answer_before_the_question_keeps_nobody_silent() -> None:
    notice = Notice()
    notice.answer()  # the attempt is over
    notice.give("SIGTERM")
    assert not notice.unanswered


def test_waiting_without_a_notice_takes_its_time_and_says_no() -> None:
    notice = Notice()
    began = time.monotonic()
    assert not notice.wait(0.12)
    assert time.monotonic() - began >= 0.12
    assert not notice.wait(0)
    assert not notice.wait(-1)


def test_waiting_after_a_notice_takes_no_time() -> None:
    notice = Notice()
    notice.give("SIGTERM")
    began = time.monotonic()
    assert notice.wait(3600)
    assert time.monotonic() - began < 5


def test_a_notice_from_another_thread_ends_the_waiting() -> None:
    notice = Notice()
    threading.Thread(target=notice.give, args=("the metadata server",)).start()
    assert notice.wait(30)
    assert notice.reason == "the metadata server"


def interrupted_at(number: int) -> tuple[bool, bool]:
    """Wait, with a handler between two instructions of it: (whether it came to that many, what the waiting said)."""
    notice, seen = Notice(), 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == number:
                notice.give("SIGTERM")
        return trace

    sys.settrace(trace)
    try:
        said = notice.wait(0.001)
    finally:
        sys.settrace(None)
    return seen >= number, said


def test_a_handler_that_interrupts_the_waiting_at_any_instruction_neither_hangs_nor_is_missed() -> None:
    """Python runs a handler between two instructions of whatever it interrupted, in the same thread."""
    answers: list[bool] = []

    def everywhere() -> None:
        for number in range(1, 10_000):
            came, said = interrupted_at(number)
            if not came:
                return
            answers.append(said)

    thread = threading.Thread(target=everywhere, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), f"it hangs when interrupted at instruction {len(answers) + 1}"
    assert len(answers) > 20
    assert answers.count(False) <= 3  # once it has made up its mind, the notice comes after it
