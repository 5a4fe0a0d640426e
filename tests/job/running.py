"""Runs of the real job in tests: started, killed at an event of their log, and read afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from job.contract.budget import Budget
from job.contract.environ import JobEnviron
from job.contract.layout import RunLayout, Uri
from job.contract.ledger import Ledger, ledger_of
from job.contract.metrics import Evaluated
from job.contract.passport import Passport
from job.contract.recipe import Recipe
from job.contract.records import AdapterManifest, RunRecord
from job.contract.submission import Offer, Submission
from job.dataset.reader import fingerprint
from job.passport import Story, read_story
from job.storage import open_store

PATIENCE: Final = 120.0
WORDS: Final = ("river", "stone", "cloud", "lamp", "forest", "window", "paper", "garden", "copper", "silver")


class Zygote:
    """A process that forks attempts. Close it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.job.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._read("ready")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def attempt(
        self,
        environ: JobEnviron,
        log: Path,
        *,
        kill_at: str | None = None,
        with_signal: signal.Signals = signal.SIGKILL,
        die_at: int | None = None,
        when: Literal["before", "after"] = "before",
    ) -> int:
        """One attempt; its exit code, or minus the signal that killed it.

        Args:
            kill_at: a text; when a line of the log holds it, the signal is sent.
            die_at: kill itself at its n-th write to the store.
        """
        variables = environ.variables() | {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        order = {"environ": variables, "log": str(log), "die_at": die_at, "when": when}
        start = log.stat().st_size if log.exists() else 0
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._read("pid"))
        came = kill_at is None or _wait_for(kill_at, log, start, pid)
        if kill_at is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, with_signal if came else signal.SIGKILL)
        code = int(self._read("exit"))
        assert came, f"{kill_at!r} never came; the attempt ended with {code}: {log.read_text()[-3000:]}"
        return code

    def _read(self, word: str) -> str:
        assert self._process.stdout is not None
        first, _, rest = self._process.stdout.readline().partition(" ")
        assert first.strip() == word, f"the zygote said {first!r}"
        return rest


def _wait_for(text: str, log: Path, start: int, pid: int) -> bool:
    """Whether the text came into the log before the process ended, or the patience did."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        alive = Path(f"/proc/{pid}").exists()
        if log.exists() and text.encode() in log.read_bytes()[start:]:
            return True
        if not alive:
            return False
        time.sleep(0.002)
    return False


@dataclass
class Run:
    """A run in a folder of its own, or in a store elsewhere."""

    folder: Path
    bucket: str
    run_id: str = "run"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.run_id)

    def environ(self, **changed: Any) -> JobEnviron:
        values: dict[str, Any] = {
            "run_id": self.run_id,
            "bucket": Uri(self.bucket),
            "workdir": str(self.folder / "work"),
            "heartbeat_seconds": 0.2,
            "final_retry_seconds": 30.0,
        }
        return JobEnviron(**(values | changed))

    def submit(self, *, number: int = 1, usd_per_hour: float = 3600.0, **budget: Any) -> None:
        """As a launcher writes it before it starts anything. At $3600 an hour a dollar is a second."""
        offer = Offer(cloud="local", gpu="this machine", gpus=1, spot=False, usd_per_hour=usd_per_hour)
        submission = Submission(
            submission=number,
            nonce="n",
            submitted_at=datetime.now(UTC),
            backend="local",
            offers=(offer,),
            image=None,
            last_attempt=None,
            budget=Budget(**budget),
        )
        open_store(self.bucket).put_new(self.layout.submission(number), submission.to_bytes())

    def ledger(self) -> Ledger:
        story = self.story()
        return ledger_of(story.claims, story.ends, story.lines, story.submissions.values())

    def landed(self, attempt: int) -> AdapterManifest:
        key = self.layout.landed_manifest(attempt)
        return AdapterManifest.from_bytes(open_store(self.bucket).get(key), name=key)

    def story(self) -> Story:
        return read_story(open_store(self.bucket), self.layout)

    def adapter(self) -> AdapterManifest:
        key = self.layout.adapter_manifest
        return AdapterManifest.from_bytes(open_store(self.bucket).get(key), name=key)

    def passport(self) -> Passport:
        key = self.layout.adapter_file(self.adapter().attempt, "passport.json")
        return Passport.from_bytes(open_store(self.bucket).get(key), name=key)

    def weights(self) -> tuple[str, str]:
        """Digests of the adapter's weights and configuration."""
        files = self.adapter().files
        return files["adapter_model.safetensors"].sha256, files["adapter_config.json"].sha256

    def trained(self) -> dict[int, tuple[object, ...]]:
        """Every step by number; AssertionError where two attempts disagree about one."""
        steps: dict[int, tuple[object, ...]] = {}
        for lines in self.story().lines.values():
            for line in lines:
                if line.event == "step":
                    what = (line.epoch, line.loss, line.grad_norm, line.learning_rate, line.rows)
                    assert steps.setdefault(line.step, what) == what, f"step {line.step} was not repeated exactly"
        return steps

    def held_out(self) -> dict[int, float]:
        found = [line for lines in self.story().lines.values() for line in lines if isinstance(line, Evaluated)]
        return {line.step: line.held_out_loss for line in found}


def write_rows(path: Path, count: int) -> Path:
    """A dataset of short conversations."""
    turns = ((f"Say {w}{i} backwards.", f"{w}{i}"[::-1]) for i in range(count) for w in [WORDS[i % len(WORDS)]])
    rows = ({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def start(folder: Path, *, rows: int = 24, bucket: str | None = None, recipe: dict[str, Any] | None = None) -> Run:
    """A new run of the built-in model, as a launcher writes it; nothing is started."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_rows(folder / "rows.jsonl", rows)
    digest = fingerprint(data, name=data.as_uri())
    parts: dict[str, Any] = {
        "base_model": {"id": "builtin:tiny"},
        "dataset": {"train": data.as_uri(), "held_out": 0.2},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"epochs": 2, "learning_rate": 0.003, "batch_size": 2, "gradient_accumulation": 1},
    }
    for section, values in (recipe or {}).items():
        parts[section] = parts.get(section, {}) | values if isinstance(values, dict) else values
    parsed = Recipe.model_validate(parts)
    run = Run(folder, bucket or (folder / "bucket").as_uri())
    record = RunRecord(
        run_id=run.run_id,
        created_at=datetime.now(UTC),
        recipe=parsed,
        recipe_digest=parsed.digest(),
        train=digest,
        held_out=None,
        ftjob="test",
    )
    open_store(run.bucket).put_new(run.layout.recipe, record.to_bytes())
    return run
