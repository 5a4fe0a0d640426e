"""Launching and staying with a run: real launchers, real signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from job.contract.layout import RunLayout
from launch.cli import cli
from launch.home import RunFolder
from launch.process import is_locked
from tests.contract import examples
from tests.launch.kit import Desk, backend_maker
from tests.watching import wait_for


def status(desk: Desk, run_id: str) -> dict[str, Any]:
    result = desk.ftjob("status", run_id, "--json")
    return json.loads(result.stdout) if result.exit_code == 0 else {}


def wait_for_step(desk: Desk, run_id: str, step: int) -> None:
    wait_for(lambda: (status(desk, run_id).get("step") or 0) >= step)


def wait_until_gone(desk: Desk, run_id: str) -> None:
    wait_for(lambda: not is_locked(RunFolder.of(desk.home, run_id).lock))


def launch(desk: Desk, run_id: str, *options: str) -> subprocess.Popen[str]:
    return desk.start_ftjob("launch", "--name", run_id, "--bucket", desk.settings.bucket, *options, desk.recipe)


def test_a_launch_stays_to_the_end_and_answers_with_one_object(desk: Desk) -> None:
    desk.plan = {"steps": 4, "ends": {"1": [3, 75]}}
    with launch(desk, "whole", "--json") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert {k: answer[k] for k in ("run_id", "status", "bucket", "step", "held_out_loss", "message")} == {
        "run_id": "whole",
        "status": "succeeded",
        "bucket": desk.settings.bucket,
        "step": 4,
        "held_out_loss": 1.5,
        "message": "",
    }
    assert answer["adapter"].endswith("runs/whole/adapter/a0002")
    assert [a["ended"] for a in answer["attempts"]] == ["preempted", "done"]
    for said in (
        "trains   builtin:tiny",
        "lands in file://",
        "attempt 1: starts at step 0 of 4",
        "attempt 2: goes on from step-00000002-a0001",
        "committed step-00000004-a0002",
        "step 4/4",
        "held-out loss 1.5000",
        "published the adapter of step 4",
        "succeeded",
    ):
        assert said in err, said


def test_the_answer_for_people_says_how_to_load_the_adapter(desk: Desk) -> None:
    desk.plan = {"steps": 1}
    result = desk.ftjob("launch", "--name", "people", "--bucket", desk.settings.bucket, desk.recipe)
    assert result.exit_code == 0
    assert "succeeded" in result.stdout
    folder = desk.home.parent / "bucket/runs/people/adapter/a0001"
    assert f"PeftModel.from_pretrained(model, '{folder}')" in result.stdout


@pytest.mark.parametrize("how", [1, 2, 3])
def test_the_exit_code_is_the_runs(desk: Desk, how: int) -> None:
    desk.plan = {"ends": {"1": [1, how]}}
    result = desk.ftjob("launch", "--json", "--name", "ends", "--bucket", desk.settings.bucket, desk.recipe)
    assert result.exit_code == how
    answer = json.loads(result.stdout)
    assert answer["status"] == ("out_of_budget" if how == 3 else "failed")
    assert answer["message"] == f"told to end with {how}"
    assert answer["adapter"] is None


def test_restarts_are_bounded_by_the_option(desk: Desk) -> None:
    desk.plan = {"ends": {str(n): [0, "kill"] for n in range(1, 9)}}
    result = desk.ftjob(
        "launch", "--json", "--name", "few", "--max-restarts", "1", "--bucket", desk.settings.bucket, desk.recipe
    )
    assert result.exit_code == 75
    answer = json.loads(result.stdout)
    assert answer["status"] == "interrupted"
    assert len(answer["attempts"]) == 2
    assert "gave up after 1 restarts" in answer["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_saves_the_run_and_says_how_to_go_on(desk: Desk, number: signal.Signals) -> None:
    desk.plan = {"steps": 100_000}
    with launch(desk, "stop", "--json") as process:
        wait_for_step(desk, "stop", 2)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    answer = json.loads(out)
    assert answer["status"] == "cancelled"
    assert answer["last_commit"]["step"] == answer["step"]
    assert f"the run stands at step {answer['step']}; go on with: ftjob launch --run stop" in err
    assert not is_locked(RunFolder.of(desk.home, "stop").lock)

    desk.plan = {"steps": answer["step"] + 2}
    again = desk.ftjob("launch", "--json", "--run", "stop")
    assert again.exit_code == 0
    resumed = json.loads(again.stdout)
    assert resumed["attempts"][1]["restored_step"] == answer["step"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGHUP, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_launcher_that_dies_leaves_the_run_going(desk: Desk, number: signal.Signals) -> None:
    desk.plan = {"steps": 30, "step_seconds": 0.05}
    with launch(desk, "alone") as process:
        wait_for_step(desk, "alone", 1)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == -number
    assert status(desk, "alone")["status"] == "running"
    wait_until_gone(desk, "alone")
    assert status(desk, "alone")["status"] == "succeeded"


def test_a_second_interrupt_leaves_the_run_to_itself(desk: Desk) -> None:
    desk.plan = {"steps": 100_000, "deaf": True}
    with launch(desk, "left", "--json") as process:
        wait_for_step(desk, "left", 1)
        process.send_signal(signal.SIGINT)
        # One signal that arrives on top of another is one signal: the second is sent when the first was seen.
        assert process.stderr is not None
        for line in process.stderr:
            if "stopping" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["status"] == "running"
    assert "it was asked to stop, and is left to that; see it with: ftjob status left" in err
    assert is_locked(RunFolder.of(desk.home, "left").lock)


def test_a_detached_launch_returns_at_once_and_cancel_stops_it(desk: Desk) -> None:
    desk.plan = {"steps": 100_000}
    result = desk.ftjob(
        *(
            "launch",
            "--detach",
            "--json",
            "--by",
            "2099-01-01T00:00:00Z",
            "--name",
            "free",
            "--bucket",
            desk.settings.bucket,
        ),
        desk.recipe,
    )
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert (answer["run_id"], answer["status"], answer["adapter"]) == ("free", "pending", None)
    assert datetime.fromisoformat(answer["budget"]["deadline"]) == datetime(2099, 1, 1, tzinfo=UTC)
    wait_for_step(desk, "free", 2)
    refused = desk.ftjob("launch", "--run", "free")
    assert refused.exit_code == 2
    assert "still running" in refused.stderr
    cancelled = desk.ftjob("cancel", "free", "--json")
    assert cancelled.exit_code == 0, cancelled.stderr
    assert json.loads(cancelled.stdout)["status"] == "cancelled"
    assert not is_locked(RunFolder.of(desk.home, "free").lock)


def test_another_machine_stops_a_run_of_this_one_through_the_bucket(desk: Desk, tmp_path: Path) -> None:
    record = desk.create("far")
    submission = examples.submission().model_copy(update={"submission": 1, "backend": "local"})
    desk.store.put_new(RunLayout(record.run_id).submission(1), submission.to_bytes())
    elsewhere = CliRunner(mix_stderr=False).invoke(
        cli,
        ["cancel", "far", "--bucket", desk.settings.bucket],
        obj=backend_maker("{}"),
        env={"FTJOB_HOME": str(tmp_path / "other")},
    )
    assert elsewhere.exit_code == 0, elsewhere.stderr
    assert desk.store.get(RunLayout("far").stop(1))
    assert "`ftjob cancel far` there makes sure" in elsewhere.stderr


def test_a_detached_launch_for_people_prints_the_run_id_only(desk: Desk) -> None:
    desk.plan = {"steps": 1}
    result = desk.ftjob("launch", "--detach", "--bucket", desk.settings.bucket, desk.recipe)
    run_id = result.stdout.strip()
    assert run_id.startswith("recipe-")
    wait_until_gone(desk, run_id)


@pytest.mark.slow
def test_on_a_terminal_the_picture_is_live(desk: Desk) -> None:
    desk.plan = {"steps": 10, "step_seconds": 0.1}
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        desk.command("launch", "--name", "live", "--bucket", desk.settings.bucket, desk.recipe),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=side,
        env=desk.variables | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(side)
    seen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not data:
            break
        seen += data
    os.close(terminal)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"\x1b[" in seen
    for said in (b"running", b"step ", b"tokens/s", b"last commit: step", b"attempt 1: starts at step 0"):
        assert said in seen, said
    assert b"succeeded" in out
