"""Promise: what the README says a newcomer does works, within the time and the memory that it says.

The commands are typed as people type them. The job is killed once, in the middle: nobody has to care.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from job.contract.passport import Passport
from job.contract.records import Versions
from launch.home import RunFolder
from tests.watching import events_in

pytestmark = pytest.mark.slow

ROOT: Final = Path(__file__).parents[2]
FTJOB: Final = Path(sys.executable).with_name("ftjob")
MINUTES: Final = 3
MEMORY: Final = 3 * 2**30


@dataclass
class Memory:
    """The largest resident size that each process of a person's runs ever had, by the kernel's own account.

    Everything that a launch starts inherits FTJOB_HOME, the supervisor and its jobs too, which are nobody's children.
    VmHWM never falls, so a look now and then misses only what a process added in its last moments.
    """

    home: Path
    peaks: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        mark = f"FTJOB_HOME={self.home}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    status = (process / "status").read_text()
                    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
                    self.peaks[int(process.name)] = max(
                        int(kilobytes[0]) * 1024 if kilobytes else 0, self.peak(process)
                    )

    def peak(self, process: Path) -> int:
        return self.peaks.get(int(process.name), 0)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@dataclass
class Session:
    """What the newcomer typed first, and what came of it."""

    home: Path
    folder: Path
    answer: dict[str, Any]
    stdout: str
    said: str
    seconds: float
    memory: Memory
    jobs: list[int]

    @property
    def run_id(self) -> str:
        return str(self.answer["run_id"])

    def ask(self, *arguments: str) -> Any:
        """What a command answers, by its only line on stdout."""
        done = subprocess.run(
            [FTJOB, *arguments],
            env=os.environ | {"FTJOB_HOME": str(self.home)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        return json.loads(done.stdout)


def events(home: Path) -> list[dict[str, Any]]:
    """The events of the only run."""
    found = list((home / "runs").glob("*/log.jsonl"))
    return events_in(found[0].read_bytes()) if found else []


def wait_for_commit(home: Path, launch: subprocess.Popen[str]) -> int:
    """The pid of the job once its first checkpoint is committed."""
    while launch.poll() is None:
        seen = events(home)
        if any(event["event"] == "checkpoint.committed" for event in seen):
            return int(next(event["pid"] for event in seen if event["event"] == "job.started"))
        time.sleep(0.02)
    raise AssertionError("the launch ended before anything was committed")


@pytest.fixture(scope="module")
def session(_nobodys_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("newcomer")
    home = folder / "home"
    memory = Memory(home)
    began = time.monotonic()
    with memory.watched():
        launch = subprocess.Popen(
            [FTJOB, "launch", "--json", "examples/quickstart.json"],
            env=os.environ | {"FTJOB_HOME": str(home)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            os.kill(wait_for_commit(home, launch), signal.SIGKILL)
            stdout, said = launch.communicate(timeout=MINUTES * 60)
        finally:
            launch.kill()
            launch.wait()
    seconds = time.monotonic() - began
    assert launch.returncode == 0, said
    jobs = [event["pid"] for event in events(home) if event["event"] == "job.started"]
    return Session(home, folder, json.loads(stdout), stdout, said, seconds, memory, jobs)


@pytest.fixture(scope="module")
def fetched(session: Session) -> Path:
    answer = session.ask("fetch", session.run_id, "mine", "--json")
    folder = Path(answer["folder"])
    assert folder == session.folder / "mine"
    assert {path.name for path in folder.iterdir()} == set(answer["files"])
    return folder


def test_the_launch_ends_with_one_object_that_says_where_the_adapter_is(session: Session) -> None:
    assert len(session.stdout.splitlines()) == 1
    assert session.answer["status"] == "succeeded"
    assert session.run_id.startswith("quickstart-")
    assert session.answer["bucket"] == (session.home / "bucket").as_uri()
    assert session.answer["adapter"] == f"{session.answer['bucket']}/runs/{session.run_id}/adapter/a0002"
    assert "Traceback" not in session.said


def test_it_takes_less_than_three_minutes_and_three_gigabytes(session: Session) -> None:
    """The sum of all processes' peaks, which is more than the peak of their sum."""
    assert session.seconds < MINUTES * 60
    peaks = session.memory.peaks
    assert set(session.jobs) <= set(peaks)
    assert max(peaks[pid] for pid in session.jobs) > 300 * 2**20  # torch alone: the jobs were seen when they were large
    launcher_and_supervisor = sum(peak for pid, peak in peaks.items() if pid not in session.jobs)
    assert launcher_and_supervisor + max(peaks[pid] for pid in session.jobs) < MEMORY


def test_the_run_is_seen_afterwards(session: Session) -> None:
    status = session.ask("status", session.run_id, "--json")
    assert status["left"] == {"names": [], "asked": ["local"], "not_asked": []}
    # Its age has changed, and what is left is asked only now.
    assert status == session.answer | {"last_commit": status["last_commit"], "left": status["left"]}
    assert [attempt["ended"] for attempt in status["attempts"]] == ["killed", "done"]
    (listed,) = session.ask("list", "--json")
    assert (listed["run_id"], listed["status"]) == (session.run_id, "succeeded")


def test_the_logs_are_there(session: Session) -> None:
    done = subprocess.run(
        [FTJOB, "logs", session.run_id, "--json"],
        env=os.environ | {"FTJOB_HOME": str(session.home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == RunFolder.of(session.home, session.run_id).log.read_text()
    names = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    for name, times in {"job.started": 2, "supervisor.restarting": 1, "adapter.published": 1, "job.ended": 1}.items():
        assert names.count(name) == times


# ------------------------------------------------------------------------------------------------------ the passport

MAY_BE_EMPTY: Final = {
    "base_model.revision",  # the built-in model has none
    "dataset.held_out",  # a fraction of the same file
    "image_digest",  # no image
    "attempts.1.ended_at",  # the attempt that wrote it
    # what the recipe leaves out
    "recipe.base_model.revision",
    "recipe.training.early_stopping",
}


def empties(value: Any, at: str = "") -> Iterator[str]:
    """The paths of everything that says nothing."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if value is None or value in ("", [], {}):
        yield at
    for key, inner in items:
        yield from empties(inner, f"{at}.{key}" if at else str(key))


def test_the_passport_says_everything_that_made_the_adapter(session: Session, fetched: Path) -> None:
    data = json.loads((fetched / "passport.json").read_bytes())
    passport = Passport.from_bytes((fetched / "passport.json").read_bytes(), name="passport.json")
    without = set() if (ROOT / ".git").exists() else {"git_commit", "ftjob_commit"}
    # Without a price there are no dollars; the seconds are there.
    unpriced = {name for name in empties(data) if name.startswith(("receipt.", "recipe.budget."))}
    assert set(empties(data)) <= MAY_BE_EMPTY | without | unpriced
    assert passport.receipt.seconds == pytest.approx(sum(row.seconds for row in passport.receipt.rows))
    assert passport.receipt.seconds_by.useful > 0

    assert passport.run_id == session.run_id
    assert passport.recipe.digest() == passport.recipe_sha256
    assert passport.dataset.train.uri == (ROOT / "examples" / "quickstart.jsonl").as_uri()
    lines = len((ROOT / "examples" / "quickstart.jsonl").read_text().splitlines())
    assert passport.dataset.train.rows == lines
    assert passport.dataset.train_rows + passport.dataset.held_out_rows == lines
    assert passport.dataset.trained_tokens == passport.dataset.trained_tokens_per_epoch * len(passport.epochs)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(passport.base_model.files)
    assert set(data["versions"]) == set(Versions.model_fields)
    assert passport.seed == passport.recipe.training.seed
    assert passport.hardware.device == "cpu"

    killed, done = passport.attempts
    assert (killed.attempt, done.attempt) == (1, 2)
    assert (killed.ended, done.ended) == ("killed", "running")
    assert 1 <= done.restored_step <= killed.steps_done  # a commit is never ahead of the record of its steps
    assert done.restored_step + done.steps_done == done.last_step == len(passport.losses)
    assert done.steps_repeated == max(killed.last_step - done.restored_step, 0)
    assert killed.started_at < done.started_at
    assert killed.ended_at is not None

    assert [loss.step for loss in passport.losses] == list(range(1, done.last_step + 1))
    assert passport.losses[-1].loss < passport.losses[0].loss
    assert len(passport.epochs) == passport.recipe.training.epochs
    best = min(passport.epochs, key=lambda epoch: epoch.held_out_loss or 0.0)
    assert (passport.chosen.step, passport.chosen.held_out_loss) == (best.step, best.held_out_loss)
    assert "lowest held-out loss" in passport.chosen.why
    assert passport.exact


CHECK: Final = """
import torch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
asked = [{"role": "user", "content": "Spell mirror backwards."}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    adapted = model(**ids).logits
    with model.disable_adapter():
        assert (model(**ids).logits - adapted).abs().max() > 1e-3
missing = [name for name, value in model.named_parameters() if "lora_B" in name and not value.any()]
assert not missing, missing
"""


def test_the_adapter_loads_as_its_card_says(session: Session, fetched: Path) -> None:
    """The card's own code is run; in a process of its own, as people would."""
    card = (fetched / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "PeftModel.from_pretrained" in code
    assert "python -m job.tiny tiny" in card
    subprocess.run([sys.executable, "-m", "job.tiny", "tiny"], cwd=session.folder, check=True)
    done = subprocess.run(
        [sys.executable, "-c", (code + CHECK).replace("THIS_FOLDER", str(fetched))],
        cwd=session.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
