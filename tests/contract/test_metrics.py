"""Metric lines: what was written comes back; anything else is Damaged."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.errors import Damaged
from job.contract.metrics import MetricLine, Step, dump_lines, parse_lines
from tests.contract.examples import heartbeat, lines, step


def test_every_kind_of_line_comes_back_in_order() -> None:
    kinds = get_args(get_args(MetricLine)[0])
    assert {type(line) for line in lines()} == set(kinds)
    assert parse_lines(dump_lines(lines()), name="x") == lines()


def test_a_line_is_one_line() -> None:
    data = dump_lines(lines())
    assert data.count(b"\n") == len(lines())
    assert [json.loads(line)["event"] for line in data.splitlines()] == [line.event for line in lines()]


def test_no_lines_are_no_bytes_and_blank_lines_are_none() -> None:
    assert dump_lines([]) == b""
    assert parse_lines(b"", name="x") == parse_lines(b"\n\n", name="x") == []


@given(st.floats(allow_nan=False))
def test_every_loss_comes_back_bit_for_bit(loss: float) -> None:
    (again,) = parse_lines(dump_lines([step(1, loss=loss)]), name="x")
    assert isinstance(again, Step)
    assert again.loss.hex() == loss.hex()


def test_the_loss_that_broke_a_run_can_be_read_again() -> None:
    (again,) = parse_lines(dump_lines([step(1, loss=math.nan)]), name="x")
    assert isinstance(again, Step)
    assert math.isnan(again.loss)


@given(st.text())
def test_any_phase_comes_back(phase: str) -> None:
    assert parse_lines(dump_lines([heartbeat(phase)]), name="x") == [heartbeat(phase)]


def test_a_last_line_cut_short_is_damaged_and_numbered() -> None:
    data = dump_lines(lines())
    with pytest.raises(Damaged, match=f"metrics/x line {len(lines())} is not a metric"):
        parse_lines(data[:-5], name="metrics/x")


@pytest.mark.parametrize("line", [b"{}", b"null", b"[]", b"x", b'{"event": "step"}', b'{"event": "new kind"}', b"\xff"])
def test_a_line_that_is_not_ours_is_damaged(line: bytes) -> None:
    with pytest.raises(Damaged, match="x line 2 is not a metric"):
        parse_lines(dump_lines(lines()[:1]) + line + b"\n", name="x")


@given(st.binary())
def test_any_bytes_are_lines_or_damaged(data: bytes) -> None:
    try:
        parsed = parse_lines(data, name="x")
    except Damaged:
        return
    assert parsed == []


def test_a_step_of_before_speed_was_told_is_still_a_step() -> None:
    old = step(3).model_dump(mode="json", exclude={"mfu", "memory_bytes"})
    [found] = parse_lines(json.dumps(old).encode() + b"\n", name="x")
    assert found == step(3)
    assert isinstance(found, Step)
    assert (found.mfu, found.memory_bytes) == (None, None)
