"""Promise: a store or a disk that fails for a while costs time and nothing else, whenever it fails.

The job is the real one, the store a real S3 server behind a proxy that can be cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import pytest

from job.checkpoints import committed, fetch
from job.contract.layout import Key
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import CheckpointManifest, RunRecord
from job.storage import open_store
from tests.job.running import PATIENCE, Run, Zygote, start
from tests.s3server import S3Server
from tests.watching import events_in

pytestmark = pytest.mark.slow

AGAIN: Final = EXIT_CODES[Outcome.PREEMPTED]
PER_EPOCH: Final = 10
EPOCHS: Final = 4
LAST: Final = PER_EPOCH * EPOCHS
ROWS: Final = 100  # 80 are trained, 2 a batch, 4 batches a step: 0.1 s and more
RECIPE: Final[dict[str, Any]] = {
    "lora": {"dropout": 0.05},
    "training": {"epochs": EPOCHS, "gradient_accumulation": 4, "max_length": 64},
}
LONG_EPOCHS: Final = 20
LONG: Final = RECIPE | {"training": RECIPE["training"] | {"epochs": LONG_EPOCHS}}


class FreezingServer(S3Server):
    """Can also fall silent: connections are taken, and nothing is answered."""

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def one_server(_nobodys_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreezingServer]:
    made = FreezingServer(tmp_path_factory.mktemp("moto") / "log.txt")
    made.start()
    yield made
    made.close()


@pytest.fixture
def server(one_server: FreezingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FreezingServer]:
    for name, value in one_server.environment.items():
        monkeypatch.setenv(name, value)
    yield one_server
    one_server.thaw()
    one_server.mend()


def untouched(zygote: Zygote, folder: Path, recipe: dict[str, Any]) -> Run:
    """The same run on file://, where nothing happened to it."""
    run = start(folder, rows=ROWS, recipe=recipe)
    assert zygote.attempt(run.environ(), run.log) == 0, run.log.read_text()[-3000:]
    return run


@pytest.fixture(scope="module")
def calm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return untouched(zygote, tmp_path_factory.mktemp("calm"), RECIPE)


def in_s3(server: S3Server, folder: Path, recipe: dict[str, Any] = RECIPE) -> Run:
    return start(folder, rows=ROWS, bucket=server.uri(uuid.uuid4().hex), recipe=recipe)


class Live:
    """An attempt that goes on while a test watches its log, and acts."""

    def __init__(self, log: Path, attempt: Callable[[], int]) -> None:
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0
        self._pool = ThreadPoolExecutor(1)
        self._code: Future[int] = self._pool.submit(attempt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            if not self._code.done():
                self.send(signal.SIGKILL)
        self._pool.shutdown()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those of this attempt so far."""
        found = events_in(self._log.read_bytes()[self._start :]) if self._log.exists() else []
        return [event for event in found if event["event"] == name]

    def until(self, name: str, *, after: int = 0, **values: Any) -> dict[str, Any]:
        """The first event of that name with these values, once it is there; the first `after` of them are skipped."""
        deadline = time.monotonic() + PATIENCE
        while True:
            over = self._code.done()
            for event in self.events(name)[after:]:
                if values.items() <= event.items():
                    return event
            told = self._log.read_text()[-3000:] if self._log.exists() else ""
            assert not over, f"{name} {values} never came: {told}"
            assert time.monotonic() < deadline, f"no {name} {values}: {told}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.events("job.started")[0]["pid"], number)

    def exit(self) -> int:
        return self._code.result(timeout=PATIENCE)

    @property
    def said(self) -> str:
        """What the attempt said of its end."""
        return str(self.until("job.ended")["message"])


def forked(zygote: Zygote, run: Run, **environ: Any) -> Live:
    return Live(run.log, lambda: zygote.attempt(run.environ(**environ), run.log))


def of_its_own(run: Run, **environ: Any) -> Live:
    """`python -m job`, imports, exit and all."""

    def attempt() -> int:
        variables = os.environ | run.environ(**environ).variables()
        with run.log.open("ab") as log:
            return subprocess.run(
                [sys.executable, "-m", "job"], env=variables, stdout=log, stderr=log, check=False
            ).returncode

    return Live(run.log, attempt)


def assert_nothing_is_torn(run: Run, folder: Path) -> None:
    """Every checkpoint that exists restores."""
    store = open_store(run.bucket)
    names = committed(store, run.layout)
    assert names
    for name in names:
        fetch(store, run.layout, name, folder)


def assert_same(run: Run, calm: Run) -> None:
    """The run is the one that nothing happened to, byte for byte, and its story is whole."""
    assert run.weights() == calm.weights()
    assert run.trained() == calm.trained()
    assert run.held_out() == calm.held_out()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_published_without_repeating(zygote: Zygote, run: Run, calm: Run, *, restored: int) -> None:
    """The next attempt on the same disk begins where the last one ended."""
    with forked(zygote, run) as live:
        assert live.exit() == 0, live.said
        assert live.events("attempt.restored")[0]["step"] == restored
        assert [event["step"] for event in live.events("step")] == list(range(restored + 1, LAST + 1))
    attempts = run.passport().attempts
    assert [attempt.steps_repeated for attempt in attempts] == [0, 0]
    assert [attempt.steps_done for attempt in attempts] == [restored, LAST - restored]
    assert_same(run, calm)


# ------------------------------------------------------------------------------------------------- the store is away


def test_twenty_seconds_without_the_server_cost_nothing_but_time(
    zygote: Zygote, server: FreezingServer, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path / "run", LONG)
    with forked(zygote, run, final_retry_seconds=60.0) as live:
        live.until("step", step=2 * PER_EPOCH + 3)
        server.cut()
        before = len(live.events("step"))
        time.sleep(20)  # how long it is away is what is promised; nothing is waited for
        during = len(live.events("step")) - before
        commits = live.events("checkpoint.committed")
        server.mend()
        assert live.exit() == 0, live.said
        assert during >= 5 * PER_EPOCH
        assert commits[-1]["step"] <= 2 * PER_EPOCH
        assert live.events("journal.unreachable")
        failures = live.events("checkpoint.upload_failed")
        assert failures
        assert [event["next_try_seconds"] for event in failures][:4] == [1, 2, 4, 8]
        # Every epoch's checkpoint was committed in the end, in its turn.
        assert [event["step"] for event in live.events("checkpoint.committed")] == [
            PER_EPOCH * epoch for epoch in range(1, LONG_EPOCHS + 1)
        ]
    assert [a.steps_done for a in run.passport().attempts] == [PER_EPOCH * LONG_EPOCHS]
    assert_nothing_is_torn(run, tmp_path / "read")
    assert_same(run, untouched(zygote, tmp_path / "untouched", LONG))


def test_a_store_that_is_away_at_the_end_leaves_the_adapter_on_the_disk_and_the_next_attempt_publishes_it(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path)
    with forked(zygote, run, final_retry_seconds=2.0) as live:
        live.until("step", step=LAST - PER_EPOCH + 1)
        server.cut()
        assert live.exit() == AGAIN
        folder = tmp_path / "work" / "adapter"
        assert f"the adapter is on this disk: {folder}" in live.said
        assert "could not be written to s3://" in live.said
        assert "ftjob launch --run run" in live.until("job.ended")["hint"]
    assert (sha256(folder / "adapter_model.safetensors"), sha256(folder / "adapter_config.json")) == calm.weights()
    server.mend()
    assert_published_without_repeating(zygote, run, calm, restored=LAST)


def test_a_store_that_is_away_at_the_start_is_waited_for_and_nothing_is_created(
    zygote: Zygote, server: FreezingServer, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path)
    before = [info.key for info in open_store(run.bucket).list("")]
    server.cut()
    with forked(zygote, run, final_retry_seconds=3.0) as live:
        assert live.exit() == AGAIN
        # A try takes up to some seconds itself.
        tries = live.events("store.unreachable")
        assert [event["next_try_seconds"] for event in tries] in ([1], [1, 2])
        assert tries[0]["what"] == "recipe"
        assert "out of reach" in live.said
    server.mend()
    assert before == [run.layout.recipe]
    assert [info.key for info in open_store(run.bucket).list("")] == before


def test_a_server_that_dies_with_half_an_upload_leaves_nothing_torn(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path)
    breaks = server.proxy.breaks
    with forked(zygote, run) as live:
        live.until("checkpoint.uploading")
        server.proxy.cut_after(60_000)  # of the 140 kB of a checkpoint
        failed = live.until("checkpoint.upload_failed")
        server.mend()
        assert live.exit() == 0, live.said
        assert server.proxy.breaks == breaks + 1
        assert failed["checkpoint"] in {event["checkpoint"] for event in live.events("checkpoint.committed")}
    assert_nothing_is_torn(run, tmp_path / "read")
    assert_same(run, calm)


def test_a_dataset_in_the_bucket_is_fetched_once_it_is_in_reach_and_makes_the_same_adapter(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path, server.uri(uuid.uuid4().hex))
    store, uri = open_store(run.bucket), f"{run.bucket}/data/rows.jsonl"
    store.put_file(Key("data/rows.jsonl"), calm.folder / "rows.jsonl")
    then = RunRecord.from_bytes(open_store(calm.bucket).get(calm.layout.recipe), name="recipe.json")
    recipe = then.recipe.model_copy(update={"dataset": then.recipe.dataset.model_copy(update={"train": uri})})
    moved = {"recipe": recipe, "recipe_digest": recipe.digest(), "train": then.train.model_copy(update={"uri": uri})}
    store.put_new(run.layout.recipe, then.model_copy(update=moved).to_bytes())
    server.cut()
    with forked(zygote, run) as live:
        live.until("store.unreachable")
        server.mend()
        assert live.exit() == 0, live.said
    assert_same(run, calm)


# --------------------------------------------------------------------------------------------------- the disk is full


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where that is forbidden."""
    folder.mkdir()
    mount = shutil.which("mount")
    made = (
        mount is not None
        and os.geteuid() == 0
        and subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode == 0
    )
    if not made:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607


@contextlib.contextmanager
def a_full_disk(live: Live, folder: Path) -> Iterator[None]:
    """Not a byte is free."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    (folder / "filler").unlink()


@contextlib.contextmanager
def a_full_disk_by_decree(live: Live, folder: Path) -> Iterator[None]:
    """The kernel lets no file of the job grow beyond 64 kB; needs no rights. A checkpoint's largest has 83 kB."""
    pid = live.events("job.started")[0]["pid"]
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", [a_full_disk, a_full_disk_by_decree])
def test_a_full_disk_refuses_checkpoints_and_they_are_written_once_there_is_space(
    zygote: Zygote, calm: Run, tmp_path: Path, full: Callable[[Live, Path], contextlib.AbstractContextManager[None]]
) -> None:
    run = start(tmp_path / "run", rows=ROWS, recipe=RECIPE)
    work = run.folder / "work"
    with small_disk(work, "4m") if full is a_full_disk else contextlib.nullcontext():
        with forked(zygote, run) as live:
            live.until("step", step=3)
            with full(live, work):
                failed = live.until("checkpoint.write_failed")
                assert failed["checkpoint"] == f"step-{PER_EPOCH:08}-a0001"
                live.until("step", step=2 * PER_EPOCH + 3)  # the training does not care
                assert not live.events("checkpoint.committed")
            assert live.exit() == 0, live.said
            assert [event["step"] for event in live.events("checkpoint.committed")] == list(
                range(PER_EPOCH, LAST + 1, PER_EPOCH)
            )
        assert_same(run, calm)


# ------------------------------------------------------------------------------------------------------- the notice


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_a_notice_while_the_store_is_away_is_answered_within_the_grace_and_nothing_is_lost(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path, how: str
) -> None:
    """Epochs of checkpoints wait for the store; each of them, and the notice's own, is safe on the disk."""
    run = in_s3(server, tmp_path)
    with of_its_own(run, grace_seconds=5.0) as live:
        live.until("step", step=2)
        server.cut() if how == "cut" else server.freeze()
        live.until("step", step=2 * PER_EPOCH + 3)
        live.send(signal.SIGTERM)
        began = time.monotonic()
        assert live.exit() == AGAIN
        assert time.monotonic() - began < 5.5
        answered = live.until("notice.answered")
        assert not answered["committed"]
        assert "the last checkpoint is on the local disk only" in live.said
    server.thaw()
    server.mend()
    assert_published_without_repeating(zygote, run, calm, restored=answered["step"])


def test_a_notice_while_the_end_waits_for_the_store_is_answered_within_the_grace(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path)
    with forked(zygote, run, grace_seconds=4.0, final_retry_seconds=300.0) as live:
        live.until("step", step=LAST - PER_EPOCH + 1)
        server.cut()
        live.until("phase", phase="publishing")
        live.until("checkpoint.upload_failed")
        live.send(signal.SIGTERM)
        began = time.monotonic()
        assert live.exit() == AGAIN
        assert time.monotonic() - began < 4.5
        assert "the adapter is on this disk" in live.said
    server.mend()
    assert_published_without_repeating(zygote, run, calm, restored=LAST)


def test_a_notice_is_answered_by_a_committed_checkpoint_and_says_how_fast(
    zygote: Zygote, server: FreezingServer, calm: Run, tmp_path: Path
) -> None:
    run = in_s3(server, tmp_path)
    with forked(zygote, run) as live:
        live.until("step", step=PER_EPOCH + 3)
        live.send(signal.SIGTERM)
        assert live.exit() == AGAIN
        answered = live.until("notice.answered")
        assert answered["committed"] is True
        assert answered["notice_to_commit_seconds"] < 25
        assert "everything is committed" in live.said
    newest = newest_manifest(run)
    assert (newest.step, newest.reason) == (answered["step"], "notice")
    shutil.rmtree(tmp_path / "work")  # another machine: what counts is what is in the bucket
    assert_published_without_repeating(zygote, run, calm, restored=answered["step"])


def newest_manifest(run: Run) -> CheckpointManifest:
    store = open_store(run.bucket)
    key = run.layout.checkpoint_manifest(committed(store, run.layout)[0])
    return CheckpointManifest.from_bytes(store.get(key), name=key)


def test_a_job_whose_log_nobody_reads_any_more_answers_its_notice_too(
    zygote: Zygote, calm: Run, tmp_path: Path
) -> None:
    """After a preemption has begun, the reader of stderr is often the first to die."""
    run = start(tmp_path, rows=ROWS, recipe=RECIPE)
    job = subprocess.Popen(
        [sys.executable, "-m", "job"], env=os.environ | run.environ().variables(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert job.stderr is not None
        for line in job.stderr:
            if '"event": "step"' in line and json.loads(line)["step"] == 3:
                break
        job.stderr.close()
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=PATIENCE) == AGAIN
    finally:
        job.kill()
        job.wait()
    newest = newest_manifest(run)
    assert newest.reason == "notice"
    assert newest.step >= 3
    assert_published_without_repeating(zygote, run, calm, restored=newest.step)


# ------------------------------------------------------------------------------------------- the bucket is read-only


@contextlib.contextmanager
def read_only(bucket: Path) -> Iterator[None]:
    """For root, whom no mode stops, by the file system; for others by the modes of the folders."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", bucket], check=True)  # noqa: S607
        yield
        subprocess.run(["mount", "-o", "remount,rw", bucket], check=True)  # noqa: S607
        return
    folders = [bucket, *(path for path in bucket.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield
    for folder in folders:
        folder.chmod(0o755)


def test_a_bucket_that_turns_read_only_is_named_and_nothing_is_lost(zygote: Zygote, calm: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with small_disk(folder / "bucket", "20m") if os.geteuid() == 0 else contextlib.nullcontext():
        run = start(folder, rows=ROWS, recipe=RECIPE)
        with forked(zygote, run, final_retry_seconds=2.0) as live:
            live.until("step", step=3)
            with read_only(folder / "bucket"):
                code = live.exit()
            # Trying again by itself would meet the same refusal.
            assert code == EXIT_CODES[Outcome.FAILED]
            assert live.events("checkpoint.upload_failed")
            assert "not allowed to use" in live.said
            assert f"the adapter is on this disk: {folder / 'work' / 'adapter'}" in live.said
        assert_published_without_repeating(zygote, run, calm, restored=LAST)
