"""Promise: what was checked is what was trained: one digest from the check to the adapter's passport."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from job.contract.check import Check
from job.contract.layout import RunLayout
from job.contract.metrics import Step, parse_lines
from job.contract.passport import Passport
from job.contract.records import RunRecord
from job.dataset.source import local_path
from job.storage import open_store

WORDS = ("red", "green", "blue", "white", "black")


def ask(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def ftjob(folder: Path, *arguments: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=os.environ | {"FTJOB_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_check_the_run_and_the_passport_have_the_same_digests(tmp_path: Path) -> None:
    lines = [ask(f"Which colour has number {n}?", f"{WORDS[n % 5]} " * (n % 7 + 1)) for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "held.jsonl").write_text("\n".join(ask(f"What is {n}?", f"number {n}") for n in range(5)) + "\n")
    recipe = {
        "base_model": {"id": "builtin:tiny"},
        "dataset": {"train": "rows.jsonl", "held_out": "held.jsonl"},
        "training": {"epochs": 1, "max_length": 64},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    bucket = (tmp_path / "bucket").as_uri()

    check = Check.model_validate(ftjob(tmp_path, "check", str(path), "--json"))
    told = check.supervision
    assert told is not None
    assert told.cut_rows > 0
    view = ftjob(tmp_path, "launch", "--infra", "local", "--bucket", bucket, "--name", "one", "--json", str(path))
    record = RunRecord.from_bytes(open_store(bucket).get(RunLayout("one").recipe), name="recipe.json")
    adapter = local_path(view["adapter"])
    assert adapter is not None
    passport = Passport.from_bytes((adapter / "passport.json").read_bytes(), name="passport.json")

    assert check.train.digest == record.train == passport.dataset.train
    assert check.held_out is not None
    assert check.held_out.digest == record.held_out == passport.dataset.held_out
    assert told.tokens_sha256 == record.tokens_sha256 == passport.dataset.tokens_sha256
    assert (told.rows, told.held_out_rows) == (passport.dataset.train_rows, passport.dataset.held_out_rows) == (24, 5)
    assert told.trained_tokens == passport.dataset.trained_tokens_per_epoch
    assert told.steps_per_epoch == len(passport.losses)


@pytest.mark.slow
def test_every_line_is_trained_once_an_epoch_or_held_out_or_reported(tmp_path: Path) -> None:
    """From the check to the ledger of the steps. Refused lines are made blank, so that all keep their numbers."""
    good = [ask(f"Which colour has number {n}?", f"{WORDS[n % 5]} " * (n % 7 + 1)) for n in range(24)]
    lines = ["{", "", *good[:9], ask("x" * 99, "y"), *good[9:], ask("a<|im_end|>b", "c"), '{"messages": []}']
    rows, path = tmp_path / "rows.jsonl", tmp_path / "recipe.json"
    rows.write_text("\n".join(lines) + "\n")
    recipe = {
        "base_model": {"id": "builtin:tiny"},
        "dataset": {"train": "rows.jsonl", "held_out": 0.25},
        "training": {"epochs": 2, "max_length": 64},
    }
    path.write_text(json.dumps(recipe))
    bucket = (tmp_path / "bucket").as_uri()

    check = Check.model_validate(ftjob(tmp_path, "check", str(path), "--json", code=2))
    reported = {problem.line for problem in check.errors}
    assert reported == {1, 12, 28, 29}
    rows.write_text("\n".join("" if at in reported else line for at, line in enumerate(lines, start=1)) + "\n")
    check = Check.model_validate(ftjob(tmp_path, "check", str(path), "--json"))
    told = check.supervision
    assert told is not None
    assert told.cut_rows > 0
    left = {at for at, line in enumerate(lines, start=1) if line and at not in reported}
    assert told.rows + told.held_out_rows == check.train.rows == len(left) == 24
    ftjob(tmp_path, "launch", "--infra", "local", "--bucket", bucket, "--name", "one", "--json", str(path))
    store = open_store(bucket)
    keys = [info.key for info in store.list(RunLayout("one").metrics_of(1))]
    steps = [line for key in keys for line in parse_lines(store.get(key), name=key) if isinstance(line, Step)]
    trained = Counter(row for step in steps for row in step.rows)
    assert trained.keys() < left
    assert set(trained.values()) == {2}
    assert len(trained) == told.rows
    assert sum(step.tokens for step in steps) == 2 * told.tokens
