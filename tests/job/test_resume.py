"""Promise: the run that is killed and resumed is the run that was not, byte for byte."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from job.checkpoints import committed, fetch
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import AdapterManifest
from job.storage import open_store
from tests.harm import flip
from tests.job.running import Run, Zygote, start

pytestmark = pytest.mark.slow

TERM, KILL = signal.SIGTERM, signal.SIGKILL
PREEMPTED = EXIT_CODES[Outcome.PREEMPTED]


def finish(zygote: Zygote, run: Run, *, most: int = 3) -> None:
    """Attempts until one is done."""
    for _ in range(most):
        if zygote.attempt(run.environ(), run.log) == 0:
            return
    raise AssertionError(f"not done after {most} attempts: {run.log.read_text()[-3000:]}")


RECIPES: dict[str, dict[str, Any]] = {
    "packed, dropout, DoRA, accumulation 3": {
        "lora": {"dropout": 0.05, "dora": True},
        "training": {"packing": True, "gradient_accumulation": 3, "max_length": 96, "epochs": 3},
    },
    "unpacked, dropout, accumulation 3": {
        "lora": {"dropout": 0.05},
        "training": {"packing": False, "gradient_accumulation": 3, "epochs": 3},
    },
    "early stopping": {
        "lora": {"dropout": 0.1},
        "training": {
            "packing": False,
            "epochs": 6,
            "learning_rate": 0.5,
            "scheduler": "constant",
            "early_stopping": {"patience": 2},
        },
    },
    "8-bit optimizer, no held-out rows": {
        "dataset": {"held_out": None},
        "training": {"optimizer": "adamw_8bit", "packing": False},
    },
    "16-bit base": {
        "method": "lora",
        "lora": {"dropout": 0.05},
        "training": {"packing": True, "max_length": 96, "epochs": 3},
    },
}

KILLS: list[tuple[str, signal.Signals]] = [
    ("loading the model", KILL),
    ('"event": "step"', TERM),
    ("rehearsal.finished", TERM),
    ("evaluation.started", TERM),
    ('"event": "step"', KILL),
    ("checkpoint.uploading", KILL),
    ("evaluated", KILL),
    ('"event": "step"', TERM),
    ("publishing", KILL),
]


@pytest.mark.parametrize("name", RECIPES)
def test_killed_runs_deliver_what_the_untouched_run_delivers(tmp_path: Path, zygote: Zygote, name: str) -> None:
    untouched, killed = (start(tmp_path / part, recipe=RECIPES[name]) for part in ("untouched", "killed"))
    finish(zygote, untouched, most=1)
    exits = []
    kills = [(text, how) for text, how in KILLS if not text.startswith("eval") or untouched.held_out()]
    for text, how in kills:
        exits.append(zygote.attempt(killed.environ(), killed.log, kill_at=text, with_signal=how))
    finish(zygote, killed)
    assert Counter(exits)[-KILL] >= 3
    assert PREEMPTED in exits
    assert killed.trained() == untouched.trained()
    assert killed.held_out() == untouched.held_out()
    assert killed.weights() == untouched.weights()
    ours, theirs = killed.passport(), untouched.passport()
    assert ours.losses == theirs.losses
    assert ours.epochs == theirs.epochs
    assert ours.chosen == theirs.chosen
    assert ours.dataset.trained_tokens == theirs.dataset.trained_tokens
    assert len(ours.attempts) == len(kills) + 1
    assert ours.exact


def test_early_stopping_stops_early_and_delivers_an_earlier_epoch(tmp_path: Path, zygote: Zygote) -> None:
    """Keeps the test above honest: with these settings the best epoch is not the last one trained."""
    run = start(tmp_path, recipe=RECIPES["early stopping"])
    finish(zygote, run, most=1)
    passport = run.passport()
    assert len(passport.epochs) < 6
    assert passport.chosen.epoch < len(passport.epochs)


def test_each_row_is_trained_exactly_once_an_epoch(tmp_path: Path, zygote: Zygote) -> None:
    run = start(tmp_path, recipe={"dataset": {"held_out": None}, "training": {"max_length": 96}})
    zygote.attempt(run.environ(), run.log, kill_at='"step": 2', with_signal=KILL)
    finish(zygote, run)
    per_epoch = len(run.trained()) // 2
    for epoch in (0, 1):
        seen = [row for step in range(1, per_epoch + 1) for row in _rows(run, epoch * per_epoch + step)]
        assert sorted(seen) == list(range(1, 25))


def _rows(run: Run, step: int) -> tuple[int, ...]:
    rows = run.trained()[step][-1]
    assert isinstance(rows, tuple)
    return rows


SMALL: dict[str, Any] = {
    "dataset": {"held_out": 0.25},
    "training": {"max_length": 64, "epochs": 3, "gradient_accumulation": 2},
    "checkpoints": {"keep": 2},
}


def test_dying_at_every_single_write_of_a_run(tmp_path: Path, zygote: Zygote) -> None:
    """SIGKILL before and after each write to the store; every checkpoint restores, the next attempt delivers the same.

    Heartbeats make the number of writes depend on the clock, so the sweep ends when an attempt outlives its number.
    """
    untouched = start(tmp_path / "untouched", rows=8, recipe=SMALL)
    finish(zygote, untouched, most=1)
    expected = untouched.weights()
    deaths = 0
    whens: tuple[Literal["before", "after"], ...] = ("before", "after")
    for die_at, when in ((n, when) for n in itertools.count(1) for when in whens):
        run = start(tmp_path / f"{when}-{die_at}", rows=8, recipe=SMALL)
        quiet = run.environ(heartbeat_seconds=60)  # phases still write
        code = zygote.attempt(quiet, run.log, die_at=die_at, when=when)
        if code == 0:
            break
        assert code == -KILL, run.log.read_text()[-3000:]
        deaths += 1
        store = open_store(run.bucket)
        for name in committed(store, run.layout):
            fetch(store, run.layout, name, tmp_path / "read")
        assert zygote.attempt(quiet, run.log) == 0, run.log.read_text()[-3000:]
        assert run.weights() == expected
        _assert_adapter_whole(run, tmp_path / "adapter")
    assert deaths >= 60  # three checkpoints of 6-7 objects, one of them pruned, an adapter of 6, the records


def _assert_adapter_whole(run: Run, folder: Path) -> AdapterManifest:
    from job.checkpoints import fetch_verified

    manifest = run.adapter()
    store = open_store(run.bucket)
    for file, digest in manifest.files.items():
        fetch_verified(store, run.layout.adapter_file(manifest.attempt, file), folder / file, digest)
    return manifest


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "training_state.safetensors", "progress.json"])
def test_a_flipped_byte_in_the_newest_checkpoint_is_named_and_costs_only_its_steps(
    tmp_path: Path, zygote: Zygote, file: str
) -> None:
    untouched, run = (start(tmp_path / part, recipe=SMALL) for part in ("untouched", "run"))
    finish(zygote, untouched, most=1)
    zygote.attempt(run.environ(), run.log, kill_at='"checkpoint.committed"', with_signal=KILL)
    zygote.attempt(run.environ(), run.log, kill_at='"event": "step"', with_signal=TERM)
    names = committed(open_store(run.bucket), run.layout)
    assert len(names) >= 2
    key = run.layout.checkpoint_file(names[0], file)
    flip(run.folder / "bucket" / key)
    finish(zygote, run, most=1)
    assert f"{key} has changed" in run.log.read_text()
    assert run.passport().attempts[-1].restored_step == names[1].step
    assert run.weights() == untouched.weights()


def test_two_attempts_at_once_publish_one_untorn_adapter(tmp_path: Path, zygote: Zygote) -> None:
    """An old attempt still writes while the new one runs."""
    other = Zygote()
    try:
        untouched, run = (start(tmp_path / part, recipe=SMALL) for part in ("untouched", "run"))
        finish(zygote, untouched, most=1)
        import threading

        codes: list[int] = []
        elsewhere = run.environ(workdir=str(run.folder / "elsewhere"))
        thread = threading.Thread(target=lambda: codes.append(other.attempt(elsewhere, run.folder / "elsewhere.jsonl")))
        thread.start()
        codes.append(zygote.attempt(run.environ(), run.log))
        thread.join()
        assert codes == [0, 0]
        assert len(run.story().claims) == 2
        assert run.weights() == untouched.weights()
        _assert_adapter_whole(run, tmp_path / "adapter")
        store = open_store(run.bucket)
        for name in committed(store, run.layout):
            fetch(store, run.layout, name, tmp_path / "read")
    finally:
        other.close()


def test_a_changed_dataset_is_refused_by_name_and_nothing_is_lost(tmp_path: Path, zygote: Zygote) -> None:
    run = start(tmp_path, recipe=SMALL)
    zygote.attempt(run.environ(), run.log, kill_at='"event": "step"', with_signal=TERM)
    before = committed(open_store(run.bucket), run.layout)
    rows = run.folder / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("river0", "ocean0"))
    assert zygote.attempt(run.environ(), run.log) == EXIT_CODES[Outcome.BAD_INPUT]
    assert "rows.jsonl changed after the launch" in run.story().ends[2].message
    assert committed(open_store(run.bucket), run.layout) == before
    rows.write_text(text)
    finish(zygote, run, most=1)


def test_another_number_of_threads_is_refused_by_name(tmp_path: Path, zygote: Zygote) -> None:
    run = start(tmp_path, recipe=SMALL)
    zygote.attempt(run.environ(), run.log, kill_at='"event": "step"', with_signal=TERM)
    assert zygote.attempt(run.environ(threads=2), run.log) == EXIT_CODES[Outcome.BAD_INPUT]
    assert "the number of CPU threads was 1 and is 2" in run.story().ends[2].message


def test_the_adapter_loads_with_peft_and_says_what_was_trained(tmp_path: Path, zygote: Zygote) -> None:
    """In a process of its own: torch and fork do not mix in this one."""
    import subprocess
    import sys

    run = start(tmp_path, recipe={"lora": {"dora": True}})
    finish(zygote, run, most=1)
    folder = run.folder / "bucket" / run.layout.adapter_files(1)
    script = (
        "import sys, warnings; from pathlib import Path\n"
        "from job.tiny import write_tiny_model\n"
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "base = Path(sys.argv[2]); write_tiny_model(base)\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sys.argv[1])\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokens.apply_chat_template([{'role': 'user', 'content': 'hi'}], return_tensors='pt', return_dict=True)\n"
        "with model.disable_adapter(): plain = model(**ids).logits\n"
        "assert (model(**ids).logits - plain).abs().max() > 1e-3\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "base")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
