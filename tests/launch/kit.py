"""What the tests of the person's side share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from click.testing import CliRunner, Result

from job.contract.errors import FtjobError
from job.contract.records import RunRecord
from job.storage import open_store
from job.tiny import write_tiny_model
from launch.begin import create_run, new_record
from launch.cli import cli
from launch.local import LocalBackend
from launch.plan import Plan
from launch.resolve import resolve
from launch.restart import RestartPolicy
from launch.settings import Settings

HERE = Path(__file__).parent
FAKE_JOB = HERE / "fake_job.py"
QUICK = RestartPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.05)

T = TypeVar("T")


def backend_maker(plan: str) -> Callable[[Settings, str], LocalBackend]:
    """A backend whose job is fake_job.py with this plan (JSON)."""
    command = (sys.executable, str(FAKE_JOB), plan)
    return lambda settings, _name: LocalBackend(
        settings.home, job_command=command, policy=QUICK, kill_margin_seconds=0.5
    )


def make_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe and its dataset in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    (folder / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    recipe = {"base_model": {"id": "builtin:tiny"}, "dataset": {"train": "rows.jsonl"}} | changes
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def shared_cache() -> Path:
    """Of all tests."""
    return Path(os.environ["FTJOB_CACHE"])


@cache
def small_model() -> dict[str, bytes]:
    """The files of a base model: the tokenizer is real, the weights are four bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files | {"model.safetensors": b"1234"}


def write_small_model(folder: Path, **files: bytes) -> Path:
    """A folder with it, and with other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (small_model() | files).items():
        (folder / name).write_bytes(data)
    return folder


class Desk:
    """A person's home, a recipe, and a job that stands in for the real one."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.settings = Settings(home=self.home, bucket=(root / "bucket").as_uri())
        self.store = open_store(self.settings.bucket)
        self.recipe = make_recipe(root / "recipes")
        self.variables = os.environ | {"FTJOB_HOME": str(self.home), "PYTHONPATH": str(HERE.parent.parent)}
        self.plan: dict[str, Any] = {}
        self.submitted: list[str] = []

    def backend(self) -> LocalBackend:
        return backend_maker(json.dumps(self.plan))(self.settings, "local")

    def create(self, run_id: str) -> RunRecord:
        """A run that exists and was not submitted."""
        from launch.recipe_file import read_recipe

        resolved = resolve(
            read_recipe(self.recipe), folder=self.recipe.parent, bucket=self.settings.bucket, cache=shared_cache()
        )
        record = new_record(resolved, run_id=run_id, now=datetime.now(UTC))
        create_run(self.home, self.store, record, backend="local")
        self.submitted.append(run_id)
        return record

    def order(self, record: RunRecord) -> Plan:
        """What starts a run here."""
        return Plan.of(record, bucket=self.store.uri, backend="local", max_restarts=20)

    def submit(self, run_id: str, *, max_restarts: int = 20, **plan: Any) -> LocalBackend:
        """A new run, started."""
        self.plan = plan
        record, backend = self.create(run_id), self.backend()
        environ = backend.environ(record, bucket=self.store.uri, git_commit=None)
        # The shortest grace that a loaded machine keeps.
        order = self.order(record).model_copy(update={"max_restarts": max_restarts})
        backend.submit(order, environ.model_copy(update={"grace_seconds": 0.5}), {})
        return backend

    def ftjob(self, *arguments: str | Path) -> Result:
        """Run a command in this process."""
        return CliRunner(mix_stderr=False).invoke(
            cli,
            [str(a) for a in (*arguments,)],
            obj=backend_maker(json.dumps(self.plan)),
            env={"FTJOB_HOME": str(self.home)},
        )

    def command(self, *arguments: str | Path) -> list[str]:
        """A command line of `ftjob`."""
        return [sys.executable, str(HERE / "fake_ftjob.py"), json.dumps(self.plan), *map(str, arguments)]

    def start_ftjob(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Run a command as a process of its own."""
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.variables,
            # Whoever runs the tests may ignore it (nohup does), and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def close(self) -> None:
        """Leave no process behind, whatever a test did."""
        from signal import SIGKILL

        from launch.process import send

        backend = self.backend()
        for path in (self.home / "runs").glob("*"):
            try:
                processes = backend.processes(path.name)
            except FtjobError:
                continue
            send(processes.supervisor, SIGKILL)
            send(processes.job, SIGKILL)
