"""Promise: a job that is given a notice commits what it did, and says so afterwards; whoever reads, or does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from job.checkpoints import committed
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import CheckpointManifest
from job.storage import open_store
from tests.job.running import Run, start
from tests.metadataserver import VM, MetadataServer
from tests.s3server import S3Server
from tests.watching import events_in, wait_for

pytestmark = pytest.mark.slow

AGAIN: Final = EXIT_CODES[Outcome.PREEMPTED]
PATIENCE: Final = 120.0
GRACE: Final = 25.0
LONG: Final[dict[str, Any]] = {
    "training": {"epochs": 200, "gradient_accumulation": 4, "max_length": 64},
    "checkpoints": {"minutes": 60.0},
}
SHORT: Final[dict[str, Any]] = {"training": {"epochs": 1, "max_length": 64}}


@contextlib.contextmanager
def job(
    run: Run, *, variables: dict[str, str] | None = None, stdout: int | None = None, stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m job`, its output to the run's log unless told; killed at the end."""
    with run.log.open("ab") as log:
        environ = os.environ | run.environ().variables() | (variables or {})
        process = subprocess.Popen(
            [sys.executable, "-m", "job"],
            env=environ,
            stdout=log if stdout is None else stdout,
            stderr=log if stderr is None else stderr,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def on(cloud: str, server: MetadataServer) -> dict[str, str]:
    """What a job on this cloud finds in its environment."""
    return {
        "FTJOB_INFRA": json.dumps({"cloud": cloud}),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.address,
        "GCE_METADATA_HOST": server.host,
    }


def events(run: Run, name: str) -> list[dict[str, Any]]:
    found = events_in(run.log.read_bytes()) if run.log.exists() else []
    return [event for event in found if event["event"] == name]


def steps_on_record(run: Run) -> int:
    """Seen in the bucket: the log may be nobody's."""
    return sum(line.event == "step" for lines in run.story().lines.values() for line in lines)


def assert_committed(run: Run, *, after: int) -> None:
    """What was done is in the bucket, because of the notice."""
    store = open_store(run.bucket)
    key = run.layout.checkpoint_manifest(committed(store, run.layout)[0])
    newest = CheckpointManifest.from_bytes(store.get(key), name=key)
    assert newest.reason == "notice"
    assert newest.step >= after
    assert steps_on_record(run) == newest.step  # not one step was done and not saved


def test_a_notice_of_the_metadata_service_is_answered_without_any_signal(tmp_path: Path) -> None:
    run = start(tmp_path, rows=100, recipe=LONG)
    with MetadataServer() as server, job(run, variables=on("AWS", server)) as process:
        wait_for(lambda: len(events(run, "step")) >= 3, seconds=PATIENCE)
        server.instance_action = {"action": "terminate", "time": "2017-09-18T08:22:00Z"}
        assert process.wait(timeout=PATIENCE) == AGAIN
    assert_committed(run, after=3)
    (answered,) = events(run, "notice.answered")
    assert answered["reason"] == "AWS spot interruption (terminate at 2017-09-18T08:22:00+00:00)"
    assert answered["committed"] is True
    assert 0 < answered["notice_to_commit_seconds"] < GRACE
    assert "stopped by AWS spot interruption" in run.story().ends[1].message


def test_a_notice_before_the_training_ends_the_attempt_and_nothing_is_saved(tmp_path: Path) -> None:
    run = start(tmp_path, rows=100, recipe=LONG)
    with MetadataServer() as server, job(run, variables=on("GCP", server)) as process:
        server.preempt()
        assert process.wait(timeout=PATIENCE) == AGAIN
    assert events(run, "step") == []
    assert "stopped by GCP preemption (stops within 30 s)" in events(run, "job.ended")[0]["message"]
    assert committed(open_store(run.bucket), run.layout) == []


@pytest.mark.parametrize("cloud", ["AWS", "GCP", "Nebius"])
def test_a_metadata_service_that_never_answers_disturbs_nothing(tmp_path: Path, cloud: str) -> None:
    run = start(tmp_path, recipe=SHORT)
    with MetadataServer() as server, job(run, variables=on(cloud, server)) as process:
        server.frozen = True
        assert process.wait(timeout=PATIENCE) == 0
        assert bool(server.asked) == (cloud != "Nebius")
    assert run.adapter()


def test_others_events_do_not_stop_this_job(tmp_path: Path) -> None:
    run = start(tmp_path, recipe=SHORT)
    with MetadataServer() as server:
        server.schedule("Preempt", VM)
        server.rebalance = {"noticeTime": "2020-10-27T08:22:00Z"}
        server.maintenance_event = "TERMINATE_ON_HOST_MAINTENANCE"
        with job(run, variables=on("AWS", server)) as process:
            assert process.wait(timeout=PATIENCE) == 0
    assert len(events(run, "notice.ahead")) == 1


@pytest.mark.parametrize("how", ["SIGTERM", "metadata"])
def test_with_dead_pipes_for_all_its_output_a_job_commits_and_ends_as_it_should(tmp_path: Path, how: str) -> None:
    """After a preemption the readers die first."""
    run = start(tmp_path, rows=100, recipe=LONG)
    with (
        MetadataServer() as server,
        job(run, variables=on("GCP", server), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            if b'"event": "step"' in line:
                break
        process.stdout.close()
        process.stderr.close()
        server.preempt() if how == "metadata" else process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == AGAIN
    assert_committed(run, after=1)


def test_with_a_full_pipe_that_nobody_empties_a_job_commits_and_ends_as_it_should(tmp_path: Path) -> None:
    run = start(tmp_path, rows=100, recipe=LONG)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with job(run, stdout=writer, stderr=writer) as process:
        wait_for(lambda: steps_on_record(run) >= 3, seconds=PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == AGAIN
    os.close(reader)
    os.close(writer)
    assert_committed(run, after=3)


def test_from_the_notice_to_its_answer_nothing_is_printed(tmp_path: Path, s3_server: S3Server) -> None:
    """The store is away, which is told again and again, but not in these seconds; afterwards all of it is."""
    run = start(tmp_path, rows=100, bucket=s3_server.uri(uuid.uuid4().hex), recipe=LONG)
    with job(run, variables={"FTJOB_GRACE_SECONDS": "8"}) as process:
        wait_for(lambda: len(events(run, "step")) >= 3, seconds=PATIENCE)
        s3_server.cut()
        wait_for(lambda: events(run, "journal.unreachable"), seconds=PATIENCE)
        process.send_signal(signal.SIGTERM)
        given = time.time()
        time.sleep(2.0)  # a step that was under way is over, and what it said is said
        size = run.log.stat().st_size
        until = given + 6.0  # of the 6.4 that are for saving
        while time.time() < until:
            assert run.log.stat().st_size == size
            time.sleep(0.02)
        assert process.wait(timeout=PATIENCE) == AGAIN
    told = [json.loads(line) for line in run.log.read_bytes()[size:].splitlines()]
    names = [event["event"] for event in told]
    assert names.count("journal.unreachable") + names.count("checkpoint.upload_failed") >= 1
    assert names.index("notice.answered") > 0
    assert names[-1] == "job.ended"


def test_the_two_minutes_that_aws_gives_are_used_while_the_store_is_away(tmp_path: Path, s3_server: S3Server) -> None:
    run = start(tmp_path, rows=100, bucket=s3_server.uri(uuid.uuid4().hex), recipe=LONG)
    grace = 2.0
    with (
        MetadataServer() as server,
        job(run, variables=on("AWS", server) | {"FTJOB_GRACE_SECONDS": str(grace)}) as process,
    ):
        wait_for(lambda: len(events(run, "step")) >= 3, seconds=PATIENCE)
        s3_server.cut()
        server.instance_action = {"action": "terminate", "time": "2017-09-18T08:22:00Z"}
        asked = len(server.asked)
        wait_for(lambda: len(server.asked) > asked)
        time.sleep(2 * grace)  # after a signal it would have given up by now
        s3_server.mend()
        assert process.wait(timeout=PATIENCE) == AGAIN
    (answered,) = events(run, "notice.answered")
    assert answered["committed"] is True
    assert answered["notice_to_commit_seconds"] > 2 * grace
    assert_committed(run, after=3)
