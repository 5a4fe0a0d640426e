"""Promise: the passport tells the story that the records tell, and claims nothing it does not know."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from job.contract.errors import Damaged, Unreachable
from job.contract.layout import Key
from job.contract.metrics import MetricLine, Restored, dump_lines
from job.contract.outcome import Outcome
from job.contract.records import Hardware, Versions
from job.passport import Story, ftjob_commit, read_story, versions
from job.storage import FileStore
from tests.contract.examples import GPU, at, claim, end, heartbeat, restored, step
from tests.doubles import FlakyStore
from tests.job.kit import RUN, hardware

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "bucket")


def metrics(store: FileStore, attempt: int, sequence: int, *lines: MetricLine) -> None:
    store.put_new(RUN.metrics_object(attempt, sequence), dump_lines(list(lines)))


def test_versions_are_those_that_compute_here() -> None:
    found = versions()
    assert found.python == platform.python_version()
    others = set(Versions.model_fields) - {"python"}
    assert {name: getattr(found, name) for name in others} == {name: version(name) for name in others}


# The story.


def test_a_run_that_never_began_has_no_story(store: FileStore) -> None:
    story = read_story(store, RUN)
    assert (story.claims, story.ends, story.lines) == ({}, {}, {})
    assert story.attempts(running=None) == ()


def test_the_story_holds_every_record_of_every_attempt_and_its_lines_in_order(store: FileStore) -> None:
    store.put_new(RUN.claim(1), claim(1).to_bytes())
    store.put_new(RUN.claim(2), claim(2, seconds=50).to_bytes())
    store.put_new(RUN.end(2), end(Outcome.DONE, 2, step=4, seconds=99).to_bytes())
    metrics(store, 2, 0, restored(2, 51))
    metrics(store, 2, 1, step(3, 52))
    metrics(store, 2, 10, step(4, 53))  # sorts behind 2 as a number and as a key
    metrics(store, 1, 0, restored(0, 1), step(1, 2), step(2, 3))
    metrics(store, 1, 1, step(3, 4))
    for foreign in ("notes.txt", "attempts/x.json", "metrics/other.jsonl", "checkpoints/step.bin"):
        store.put_new(Key(f"{RUN.root}{foreign}"), b"not ours")
    story = read_story(store, RUN)
    assert story.claims == {1: claim(1), 2: claim(2, seconds=50)}
    assert story.ends == {2: end(Outcome.DONE, 2, step=4, seconds=99)}
    assert story.lines == {
        1: [restored(0, 1), step(1, 2), step(2, 3), step(3, 4)],
        2: [restored(2, 51), step(3, 52), step(4, 53)],
    }
    first, second = story.attempts(running=None)
    assert (first.ended, first.ended_at, first.steps_done, first.steps_repeated) == ("killed", at(4), 3, 0)
    assert (second.ended, second.restored_step, second.steps_done, second.steps_repeated) == ("done", 2, 2, 1)


def test_the_attempt_that_writes_the_passport_is_still_running(store: FileStore) -> None:
    store.put_new(RUN.claim(1), claim(1).to_bytes())
    metrics(store, 1, 0, heartbeat("publishing", 5))
    story = read_story(store, RUN)
    assert [attempt.ended for attempt in story.attempts(running=1)] == ["running"]
    assert [attempt.ended for attempt in story.attempts(running=None)] == ["killed"]


@pytest.mark.parametrize("key", [RUN.claim(1), RUN.end(1)])
def test_a_record_that_cannot_be_read_is_damage_by_its_name(store: FileStore, key: Key) -> None:
    store.put_new(key, b"{}\n")
    with pytest.raises(Damaged, match=key):
        read_story(store, RUN)


def test_a_damaged_metrics_object_takes_no_run_along(store: FileStore) -> None:
    """Nothing that is restored depends on it, and the lines behind it say for how long the attempt has lived."""
    store.put_new(RUN.claim(1), claim(1).to_bytes())
    metrics(store, 1, 0, restored(0), step(1))
    store.put_new(RUN.metrics_object(1, 1), b'{"event"X "step"}\n')
    metrics(store, 1, 2, step(3).model_copy(update={"elapsed": 60.0}))
    story = read_story(store, RUN)
    assert [line.event for line in story.lines[1]] == ["restored", "step", "step"]
    assert story.receipt(running=None).seconds == 60.0 + claim(1).heartbeat_seconds


def test_a_store_out_of_reach_is_no_empty_story(store: FileStore) -> None:
    flaky = FlakyStore(store)
    flaky.cut()
    with pytest.raises(Unreachable):
        read_story(flaky, RUN)


def story_on(*machines: tuple[Hardware, int]) -> Story:
    """An attempt on each of these, with so many steps."""
    lines: dict[int, list[MetricLine]] = {}
    for number, (machine, steps) in enumerate(machines, start=1):
        begun: Restored = restored(0).model_copy(update={"hardware": machine})
        lines[number] = [begun, *(step(n) for n in range(1, steps + 1))]
    return Story({number: claim(number) for number in lines}, {}, lines, {})


CPU = hardware()
OTHER = GPU.model_copy(update={"name": "NVIDIA A100"})
MORE_MEMORY = GPU.model_copy(update={"memory_bytes": 2 * GPU.memory_bytes})


@pytest.mark.parametrize(
    ("machines", "one_kind"),
    [
        ([(GPU, 3)], True),
        ([(GPU, 3), (GPU, 1)], True),
        ([(GPU, 3), (OTHER, 1)], False),
        ([(OTHER, 1), (GPU, 3), (GPU, 3)], False),
        ([(GPU, 3), (OTHER, 0), (GPU, 1)], True),  # it computed nothing
        ([(GPU, 3), (MORE_MEMORY, 1)], True),
        ([], True),
    ],
)
def test_a_run_that_is_reproducible_is_exact_when_all_that_trained_was_of_one_kind(
    machines: list[tuple[Hardware, int]], one_kind: bool
) -> None:
    assert story_on(*machines).is_exact(reproducible=True) == one_kind


@pytest.mark.parametrize(
    ("machines", "exact"),
    [
        ([(GPU, 3)], True),  # it was not interrupted
        ([(GPU, 3), (GPU, 0)], True),
        ([(GPU, 3), (GPU, 1)], False),
        ([(CPU, 3), (CPU, 1)], True),
    ],
)
def test_a_gpu_that_may_sum_in_any_order_is_exact_uninterrupted_alone(
    machines: list[tuple[Hardware, int]], exact: bool
) -> None:
    assert story_on(*machines).is_exact(reproducible=False) == exact


# The commit.


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_seen_from(folder: Path) -> str:
    """What the package in a folder says of itself, in a process that runs it from there."""
    script = "from job.passport import ftjob_commit; print(ftjob_commit())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    return done.stdout.strip()


def test_a_checkout_says_its_commit_and_a_package_in_somebodys_checkout_does_not_say_theirs(tmp_path: Path) -> None:
    site = tmp_path / "project" / "env" / "site-packages"
    shutil.copytree(ROOT / "job", site / "job", ignore=shutil.ignore_patterns("__pycache__"))
    assert commit_seen_from(site) == "None"
    project = tmp_path / "project"
    git(project, "init", "--quiet")
    (project / "theirs.txt").write_text("theirs")
    git(project, "add", "theirs.txt")
    git(project, "commit", "--quiet", "-m", "theirs")
    assert commit_seen_from(site) == "None"
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "-m", "with the package")
    assert commit_seen_from(site) == git(project, "rev-parse", "HEAD")


def test_the_commit_is_a_commit_or_nothing() -> None:
    found = ftjob_commit()
    assert found is None or len(found) == 40
