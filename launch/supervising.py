"""Asks for a dataset to be rendered: in a process of its own, and never twice for the same bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from job import contract
from job.contract.base_model import TOKENIZER_FILES
from job.contract.errors import FtjobError
from job.contract.records import DatasetDigest
from job.contract.supervision import Answer, Ask, Said
from job.storage import Progress
from launch.cache import keep_newest, use
from launch.home import write_model

INSTALL: Final = "pip install 'ftjob[launch]'"
_MODEL_FILES: Final = (*TOKENIZER_FILES, "config.json", "generation_config.json")
_CODE: Final = ("dataset/*.py", "contract/supervision.py", "supervise.py", "tokenising.py", "tiny.py")
"""Of job: what an answer depends on besides its versions."""
_LIBRARIES: Final = ("ftjob", "transformers", "tokenizers", "jinja2")


def why_not() -> str:
    """Why nothing can be rendered on this machine; empty where it can."""
    missing = [name for name in ("transformers", "tokenizers", "jinja2") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed beside ftjob ({INSTALL} brings it)" if missing else ""


def supervise(
    ask: Ask, train: DatasetDigest, held_out: DatasetDigest | None, *, cache: Path | None, progress: Progress
) -> Answer | str:
    """What becomes of the rows, from the cache where it is known; or why it cannot be told.

    Args:
        train, held_out: of the files to be rendered, as they were examined.
        cache: folder, made when it is needed; None to keep nothing.
        progress: told of bytes that were rendered.
    """
    path = cache / "check" / f"{_key(ask, train, held_out)}.json" if cache is not None else None
    if path is not None and (known := _read(path)) is not None:
        use(path)
        return known
    found = ask_once(ask, progress)
    if path is not None and isinstance(found, Answer) and found.supervised is not None:
        told = found.supervised
        # An answer about other bytes than those of the key would be found again under the wrong name.
        same = told.train_sha256 == train.sha256 and told.held_out_sha256 == (held_out.sha256 if held_out else None)
        if same:
            with suppress(FtjobError):  # a full disk, or one that is read-only: the answer is there
                write_model(path, found)
                keep_newest(path.parent)
    return found


def _read(path: Path) -> Answer | None:
    """An entry of the cache; one that is absent, cut short or of another shape is none."""
    try:
        return Answer.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _key(ask: Ask, train: DatasetDigest, held_out: DatasetDigest | None) -> str:
    """Everything that an answer depends on, digested. Where the files lie does not matter."""
    folder = Path(ask.tokenizer)
    code = Path(contract.__file__).parents[1]
    parts = {
        "ask": ask.model_dump(exclude={"tokenizer", "train", "held_out"}),
        "train": train.sha256,
        "held_out": held_out.sha256 if held_out is not None else None,
        "model": {name: _sha256(folder / name) for name in _MODEL_FILES if (folder / name).is_file()} or ask.tokenizer,
        "versions": {name: _version(name) for name in _LIBRARIES},
        "code": {str(path.relative_to(code)): _sha256(path) for each in _CODE for path in sorted(code.glob(each))},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def ask_once(ask: Ask, progress: Progress = lambda _: None) -> Answer | str:
    """The answer, or why there is none: whatever the other process does is told, not raised."""
    with tempfile.TemporaryFile() as complaints:
        # A group of its own: it has workers, and all of them end with this call.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "job.supervise"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,  # not a pipe, which would have to be emptied
            text=True,
            encoding="utf-8",
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            found = _listen(process, ask, progress)
            killed = found is None and _was_killed(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if found is not None:
            return found
        if killed:
            return "the process that renders was killed: the machine may be short of memory"
        complaints.seek(0)
        last = (complaints.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return f"the process that renders ended without an answer: {last[:200]}"


def _was_killed(process: subprocess.Popen[str]) -> bool:
    """Whether a signal ended it, as the kernel does that runs out of memory. It has closed its stdout."""
    try:
        return process.wait(timeout=5) < 0
    except subprocess.TimeoutExpired:
        return False


def _listen(process: subprocess.Popen[str], ask: Ask, progress: Progress) -> Answer | str | None:
    """Its answer, or what was wrong with it; None where there was none."""
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    with suppress(BrokenPipeError):  # it died at once
        process.stdin.write(ask.model_dump_json())
        process.stdin.close()
    process.stdin = None  # communicate() would flush it
    try:
        for line in process.stdout:
            said = Said.model_validate_json(line)
            if said.answer is not None:
                return said.answer
            progress(said.bytes_done)
    except ValidationError as error:
        return f"the process that renders said something else than an answer: {error.errors()[0]['msg']}"
    return None
