"""The local backend with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from job.contract.errors import BadInput, RunUnknown
from job.contract.status import BackendState, Status
from launch.home import RunFolder
from launch.local import LocalBackend
from launch.process import ProcessId, _started_ps, identify, is_alive, is_locked, send, take_lock
from launch.runs import RunReader
from launch.view import RunView
from tests.launch.kit import Desk
from tests.watching import wait_for


def view(desk: Desk, run_id: str, backend: LocalBackend) -> RunView:
    return RunReader(desk.store, run_id, backend).poll(datetime.now(UTC)).view


def over(desk: Desk, run_id: str, backend: LocalBackend) -> RunView:
    """The run once all of it is gone."""
    lock = RunFolder.of(desk.home, run_id).lock
    wait_for(lambda: not is_locked(lock))
    return view(desk, run_id, backend)


def test_a_killed_and_a_preempted_attempt_are_followed_by_another_until_it_is_done(desk: Desk) -> None:
    backend = desk.submit("again", steps=6, ends={"1": [3, "kill"], "2": [5, 75]})
    seen = over(desk, "again", backend)
    assert seen.status is Status.SUCCEEDED
    assert [(a.ended, a.restored_step, a.last_step, a.steps_repeated) for a in seen.attempts] == [
        ("killed", 0, 3, 0),
        ("preempted", 2, 5, 1),
        ("done", 4, 6, 1),
    ]
    assert (seen.step, seen.total_steps, seen.held_out_loss) == (6, 6, 1.5)
    assert backend.processes("again").job is None


@pytest.mark.parametrize(("how", "code", "status"), [("crash", 1, "failed"), (2, 2, "failed"), (75, 75, "interrupted")])
def test_what_is_restarted_and_how_often(desk: Desk, how: object, code: int, status: str) -> None:
    ends = {str(attempt): [0, how] for attempt in range(1, 9)}
    backend = desk.submit("bounded", max_restarts=2, ends=ends)
    seen = over(desk, "bounded", backend)
    assert seen.status == status
    assert len(seen.attempts) == (3 if code == 75 else 1)
    assert backend.describe("bounded").exit_code == code
    if code == 75:
        assert "gave up after 2 restarts" in seen.message
    if how == "crash":
        assert "exit code 1" in seen.message
        assert "ftjob logs bounded" in seen.hint
        assert any("the fake job crashed" in line for line in backend.logs("bounded", follow=False))


def test_cancel_lets_the_job_save_and_does_not_restart_it(desk: Desk) -> None:
    backend = desk.submit("stop", steps=10_000)
    wait_for(lambda: (view(desk, "stop", backend).step or 0) >= 3)
    assert backend.cancel("stop")
    seen = over(desk, "stop", backend)
    assert seen.status is Status.CANCELLED
    assert [a.ended for a in seen.attempts] == ["preempted"]
    assert seen.last_commit is not None
    assert seen.last_commit.step == seen.step
    assert not backend.cancel("stop")


def test_a_job_that_is_deaf_to_a_cancel_is_killed_after_its_grace(desk: Desk) -> None:
    backend = desk.submit("deaf", steps=100_000, deaf=True)
    wait_for(lambda: view(desk, "deaf", backend).step)
    backend.cancel("deaf")
    seen = over(desk, "deaf", backend)
    assert seen.status is Status.CANCELLED
    assert backend.describe("deaf").exit_code == -signal.SIGKILL


def test_a_cancel_between_two_attempts_ends_the_run(desk: Desk) -> None:
    backend = desk.submit("pause", ends={str(n): [0, 75] for n in range(1, 200)}, max_restarts=1000)
    wait_for(lambda: len(view(desk, "pause", backend).attempts) >= 2)
    backend.cancel("pause")
    assert over(desk, "pause", backend).status is Status.CANCELLED


def test_the_job_of_a_killed_supervisor_is_seen_kept_single_and_can_be_cancelled(desk: Desk) -> None:
    backend = desk.submit("orphan", steps=100_000)
    wait_for(lambda: view(desk, "orphan", backend).step)
    processes = backend.processes("orphan")
    assert processes.job is not None
    assert send(processes.supervisor, signal.SIGKILL)
    wait_for(lambda: not is_alive(processes.supervisor))

    described = backend.describe("orphan")
    assert described.state is BackendState.ALIVE
    assert str(processes.job.pid) in described.detail
    record = RunReader(desk.store, "orphan", backend)
    assert record.poll(datetime.now(UTC)).view.status is Status.RUNNING
    refused = desk.ftjob("launch", "--run", "orphan")
    assert refused.exit_code == 2
    assert "still running" in refused.stderr
    assert str(processes.job.pid) in refused.stderr

    assert backend.cancel("orphan")
    assert over(desk, "orphan", backend).status is Status.CANCELLED


def test_when_all_processes_are_killed_the_run_is_interrupted_and_can_be_taken_up(desk: Desk) -> None:
    backend = desk.submit("killed", steps=100_000)
    wait_for(lambda: view(desk, "killed", backend).step)
    processes = backend.processes("killed")
    send(processes.supervisor, signal.SIGKILL)
    send(processes.job, signal.SIGKILL)
    assert over(desk, "killed", backend).status is Status.INTERRUPTED

    desk.plan = {"steps": 4}
    again = desk.ftjob("launch", "--json", "--run", "killed")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "succeeded"


def test_a_second_supervisor_for_a_live_run_is_refused(desk: Desk) -> None:
    backend = desk.submit("twice", steps=100_000)
    record = RunReader(desk.store, "twice", backend)
    assert record is not None
    from launch.runs import read_run

    run = read_run(desk.store, "twice")
    with pytest.raises(BadInput, match=r"still running, pid \d+"):
        backend.submit(desk.order(run), backend.environ(run, bucket=desk.store.uri, git_commit=None), {})
    # And when the look before the start saw nothing, the lock decides.
    answer = backend._start_supervisor(
        RunFolder.of(desk.home, "twice"), "twice", backend.environ(run, bucket=desk.store.uri, git_commit=None), 0
    )
    assert answer == b"locked"


def test_a_job_that_cannot_be_started_ends_the_run(desk: Desk) -> None:
    backend = LocalBackend(desk.home, job_command=("/nonexistent/program",))
    run = desk.create("no-program")
    backend.submit(desk.order(run), backend.environ(run, bucket=desk.store.uri, git_commit=None), {})
    seen = over(desk, "no-program", backend)
    assert seen.status is Status.INTERRUPTED
    assert "could not be started" in seen.message


def test_what_a_dead_job_left_behind_is_killed(desk: Desk) -> None:
    leave = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.exit(2)"
    backend = LocalBackend(desk.home, job_command=(sys.executable, "-c", leave))
    run = desk.create("leftover")
    backend.submit(desk.order(run), backend.environ(run, bucket=desk.store.uri, git_commit=None), {})
    assert over(desk, "leftover", backend).status is Status.FAILED
    left = next(int(line) for line in backend.logs("leftover", follow=False) if line.isdecimal())
    wait_for(lambda: identify(left) is None)


def test_what_was_never_submitted_and_what_is_elsewhere_are_told_apart(desk: Desk) -> None:
    desk.create("lonely")
    assert desk.backend().describe("lonely").state is BackendState.GONE
    assert view(desk, "lonely", desk.backend()).status is Status.INTERRUPTED
    assert desk.backend().describe("elsewhere").state is BackendState.UNREACHABLE
    with pytest.raises(RunUnknown, match="no log"):
        desk.backend().logs("lonely", follow=False)


def test_following_a_log_ends_with_the_run(desk: Desk) -> None:
    backend = desk.submit("talk", steps=3)
    lines = list(backend.logs("talk", follow=True))
    events = [json.loads(line)["event"] for line in lines]
    assert events[0] == "supervisor.attempt_started"
    assert events[-1] == "supervisor.ended"
    assert {"job.started", "job.ended"} <= set(events)


def test_the_job_gets_its_own_variables_and_no_leftovers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTJOB_IMAGE_DIGEST", "left over")
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    show = "import json, os, sys; print(json.dumps([dict(os.environ), os.getcwd()]))"
    backend = LocalBackend(desk.home, job_command=(sys.executable, "-c", show))
    run = desk.create("variables")
    backend.submit(desk.order(run), backend.environ(run, bucket=desk.store.uri, git_commit="abc"), {})
    over(desk, "variables", backend)
    found = [json.loads(line) for line in backend.logs("variables", follow=False)]
    variables, folder = next(line for line in found if isinstance(line, list))
    assert variables["FTJOB_RUN_ID"] == "variables"
    assert variables["FTJOB_HEARTBEAT_SECONDS"] == "2.0"
    assert variables["FTJOB_WORKDIR"] == folder == str(desk.home / "runs/variables/work")
    assert variables["FTJOB_GIT_COMMIT"] == "abc"
    assert variables["SOMETHING_ELSE"] == "kept"
    assert "FTJOB_IMAGE_DIGEST" not in variables


# ---------------------------------------------------------------------------------------------------- processes


def test_a_recycled_pid_is_not_ours() -> None:
    own = identify(os.getpid())
    assert own is not None
    assert is_alive(own)
    other = ProcessId(pid=own.pid, started="long ago")
    assert not is_alive(other)
    assert not send(other, signal.SIGKILL)


def test_a_process_that_nobody_reaped_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        wait_for(lambda: identify(child.pid) is None)
        assert child.returncode is None


def test_ps_tells_the_same_where_there_is_no_proc() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = _started_ps(child.pid)
        assert started
        assert started == _started_ps(child.pid)
        child.kill()
        wait_for(lambda: _started_ps(child.pid) is None)
    assert _started_ps(child.pid) is None


def test_a_lock_lives_on_in_a_child(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    lock = take_lock(path)
    assert lock is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)) as child:
        os.close(lock)
        assert is_locked(path)
        assert take_lock(path, patience_seconds=0.05) is None
        child.kill()
    assert not is_locked(path)
