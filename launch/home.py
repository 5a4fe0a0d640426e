"""The folder of a run on this machine, $FTJOB_HOME/runs/<run_id>/. Nothing else builds paths in it.

run.json     the launcher's memory: which bucket the run lands in, which backend runs it
state.json   the local backend's: which processes work on the run, and how the last one ended
log.jsonl    what the job and its supervisor said, all attempts in order
lock         locked while a supervisor or a job of the run lives
work/        the job's own folder (FTJOB_WORKDIR)
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from job.contract.errors import Damaged, Unreachable
from job.contract.layout import Uri, check_run_id


class Remembered(BaseModel):
    """Where a run that this machine launched lives."""

    model_config = ConfigDict(frozen=True)  # open: a newer ftjob may remember more

    run_id: str
    bucket: Uri
    backend: str
    submitted_at: AwareDatetime | None = None
    """Of the last submission; None before the first."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @classmethod
    def of(cls, home: Path, run_id: str) -> Self:
        """Raises BadInput when `run_id` is none: an id from a person becomes a path only after this check."""
        return cls(home / "runs" / check_run_id(run_id))

    @property
    def memory(self) -> Path:
        return self.path / "run.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def work(self) -> Path:
        return self.path / "work"


def remember(home: Path, remembered: Remembered) -> bool:
    """Write a run's memory before the run is created. False when the run is known here already.

    A launcher that dies between this and the submission leaves a run that can be explained.

    Raises:
        Unreachable: the folder cannot be written.
    """
    folder = RunFolder.of(home, remembered.run_id)
    if folder.memory.exists():
        return False
    write_model(folder.memory, remembered)
    return True


def note_submission(home: Path, remembered: Remembered) -> None:
    """Write who runs the run from now on. Raises Unreachable."""
    write_model(RunFolder.of(home, remembered.run_id).memory, remembered)


def forget(home: Path, run_id: str) -> None:
    """Undo `remember`, for a run that was not created after all."""
    folder = RunFolder.of(home, run_id)
    folder.memory.unlink(missing_ok=True)
    for path in (folder.path, folder.path.parent, home):
        try:
            path.rmdir()
        except OSError:  # not empty, or gone: either is fine
            return


def recall(home: Path, run_id: str) -> Remembered | None:
    """What this machine remembers of a run. Raises Damaged when run.json is unreadable."""
    return read_model(RunFolder.of(home, run_id).memory, Remembered)


def remembered_runs(home: Path) -> Iterator[Remembered]:
    """Every run launched from this machine, by id."""
    for path in sorted((home / "runs").glob("*/run.json")):
        remembered = read_model(path, Remembered)
        if remembered is not None:
            yield remembered


def from_home(text: str) -> Path:
    """A path as people write it. `~nobody` stays as it is, and is not there: pathlib would raise RuntimeError."""
    return Path(os.path.expanduser(text))  # noqa: PTH111


M = TypeVar("M", bound=BaseModel)


def read_model(path: Path, kind: type[M]) -> M | None:
    """The value in a file; None when there is no such file. Raises Damaged when it is not one."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise Damaged(
            f"{path} cannot be read: {error}", hint="move it away; the run itself is in its bucket"
        ) from error


def write_model(path: Path, value: BaseModel) -> None:
    """Replace a file whole: a reader sees the old or the new value. Raises Unreachable when it cannot be written."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(value.model_dump_json(indent=2) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        raise Unreachable(f"cannot write {path}: {error.strerror or error}", hint="check FTJOB_HOME") from error
    finally:
        with suppress(OSError):  # the folder may be none; that was told
            staged.unlink()
