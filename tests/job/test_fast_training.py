"""Promise: the fast path trains what the modules train, and what is killed and resumed on it is byte for byte the rest.

On the CPU: the kernels are torch's, and the trainer around them is the one that a GPU has.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from job.callbacks import Reason, Steering
from job.contract.errors import ModelInvalid
from job.contract.metrics import Evaluated, MetricLine, Step
from job.fast.attention import Documents
from job.fast.kernels import in_torch, in_triton
from job.fast.model import FastModel
from job.model import adapter_state
from job.notice import Notice
from job.randomness import random_state
from job.rehearsal import costliest_drawn, costliest_in_order
from job.tensors import freeze
from job.train import Accelerate, Rows, Training
from job.weights import Base
from tests.job.stack import adapted, row, same_tensors, tiny_recipe

LENGTHS = [4, 30, 7, 25, 12, 3, 18, 9, 22, 6, 15, 11, 28, 5, 10, 8, 27, 13, 29, 31]
ROWS = [row(number, length) for number, length in enumerate(LENGTHS, start=1)]
"""Of many lengths, so that a mean of means is not the mean."""
HELD_OUT = [*ROWS[16:], row(21, 9, trained=[0])]
"""Of the last, alone in its batch where nothing is packed, nothing is trained: its first token has none before it."""


class Counted(FastModel):
    """Counts what goes through it."""

    batches = 0

    def loss(self, *arguments: Any) -> Tensor:
        self.batches += 1
        return super().loss(*arguments)


class Killed(Exception):
    """Nothing is told to anyone."""


def fast(_: Any, model: Any, **__: Any) -> FastModel:
    return Counted(model)


def plain(*_: Any, **__: Any) -> None:
    return None


@dataclass
class Trained:
    """A training, and what it said. The last checkpoint is in `folder`."""

    training: Training
    folder: Path
    lines: list[MetricLine] = field(default_factory=list)
    saved: list[Reason] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        return [line for line in self.lines if isinstance(line, Step)]

    @property
    def held_out(self) -> list[float]:
        return [line.held_out_loss for line in self.lines if isinstance(line, Evaluated)]


def train(
    base: Base,
    tokenizer: Any,
    folder: Path,
    accelerate: Accelerate,
    *,
    kill_after: int | None = None,
    resumed: Path | None = None,
    workers: int = 0,
    dropout: float = 0.0,
    **how: Any,
) -> Trained:
    """Two epochs in steps of three micro-batches; or until the checkpoint after a step, and no word more."""
    training = {"batch_size": 2, "gradient_accumulation": 3, "epochs": 2, "max_length": 32, "learning_rate": 0.01} | how
    recipe = tiny_recipe(lora={"rank": 4, "alpha": 8, "dropout": dropout}, training=training)
    notice = Notice()
    folder.mkdir()
    rows = Rows(ROWS[:15], HELD_OUT)
    model = adapted(recipe, base)
    made = Training(recipe, model, tokenizer, rows, workdir=folder, notice=notice, accelerate=accelerate)
    made._trainer.args.dataloader_num_workers = workers
    found = Trained(made, folder / "checkpoint")
    if resumed is not None:
        made.restore(resumed)

    def save(reason: Reason) -> float:
        found.saved.append(reason)
        if made.progress.step == kill_after:
            found.folder.mkdir()
            made.snapshot()(found.folder)
            raise Killed
        return 0.0

    torch.manual_seed(5)  # all trainings of this process begin alike
    every = 3600.0 if kill_after is None else 0.0
    steering = Steering(made, notice, save=save, write=found.lines.append, interval=every, upload_seconds=lambda: 0.0)
    with contextlib.suppress(Killed):
        made.run(steering)
    return found


def losses(found: Trained) -> list[tuple[Any, ...]]:
    return [(x.step, x.loss, x.grad_norm, x.learning_rate, x.tokens, x.rows) for x in found.steps]


@pytest.mark.parametrize("packing", [True, False])
def test_the_fast_path_trains_what_the_modules_train(base: Base, tokenizer: Any, tmp_path: Path, packing: bool) -> None:
    ours, theirs = (
        train(base, tokenizer, tmp_path / name, path, packing=packing)
        for name, path in (("fast", fast), ("plain", plain))
    )
    trainer = ours.training._trainer
    assert isinstance(trainer.fast, Counted)
    assert theirs.training._trainer.fast is None
    assert ours.training._held_out is not None
    held_out = -(-len(ours.training._held_out) // 2)
    micro = -(-len(trainer.train_dataset) // 2)
    assert micro % 3, "the last step of an epoch is to be a smaller one"
    rehearsed = _rehearsed(ours.training)
    assert trainer.fast.batches == 2 * micro + 2 * held_out + rehearsed
    assert len(ours.steps) == len(theirs.steps) == 2 * -(-micro // 3)
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        assert (one.rows, one.tokens, one.learning_rate) == (other.rows, other.tokens, other.learning_rate)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)  # before it is clipped: Adam hides scales
    assert ours.held_out == pytest.approx(theirs.held_out, rel=1e-4)
    assert len(ours.held_out) == 2
    assert ours.training.progress.trained_tokens == theirs.training.progress.trained_tokens
    assert ours.steps[-1].loss < ours.steps[0].loss


def _rehearsed(training: Training) -> int:
    """Batches of the rehearsal: a step's, and an evaluation's where that is larger."""
    assert training._held_out is not None
    packed, size = training.recipe.training.packing, training.recipe.training.batch_size
    held_out = [len(each) for each in training._held_out["input_ids"]]
    drawn = costliest_drawn([len(each) for each in training._trainer.train_dataset["input_ids"]], size, packed=packed)
    return 1 + (costliest_in_order(held_out, size, packed=packed).tokens > drawn.tokens)


CASES: dict[str, tuple[Accelerate, dict[str, Any]]] = {
    "fast, packed": (fast, {"packing": True}),
    "fast, unpacked": (fast, {"packing": False}),
    "fast, 8-bit optimizer": (fast, {"packing": True, "optimizer": "adamw_8bit"}),
    "modules and dropout, unpacked": (plain, {"packing": False, "dropout": 0.3}),
}


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("fast, packed", 0),
        ("fast, unpacked", 1),
        ("modules and dropout, unpacked", 1),
        pytest.param("fast, packed", 1, marks=pytest.mark.slow),
        pytest.param("fast, unpacked", 0, marks=pytest.mark.slow),
        pytest.param("fast, 8-bit optimizer", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_it_is_the_same_bytes_whoever_collates(
    base: Base, tokenizer: Any, tmp_path: Path, name: str, workers: int
) -> None:
    """The untouched run collates by itself: with a process that does it, nothing is another either."""
    accelerate, how = CASES[name]
    whole = train(base, tokenizer, tmp_path / "whole", accelerate, **how)
    after = freeze(random_state())
    assert whole.training.steps_per_epoch >= 2
    middle = whole.training.steps_per_epoch + 1  # of the second epoch
    killed = train(base, tokenizer, tmp_path / "killed", accelerate, workers=workers, kill_after=middle, **how)
    assert killed.saved[-2:] == ["epoch", "interval"]
    assert killed.training.progress.finished is None
    resumed = train(base, tokenizer, tmp_path / "on", accelerate, workers=workers, resumed=killed.folder, **how)
    assert resumed.training.progress.finished == "all epochs"
    assert losses(killed) + losses(resumed) == losses(whole)
    assert killed.held_out + resumed.held_out == whole.held_out
    assert same_tensors(adapter_state(resumed.training.model), adapter_state(whole.training.model))
    ours, theirs = (freeze(each.training._state()) for each in (resumed, whole))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[key], tensor) for key, tensor in theirs.tensors.items() if "random" not in key)
    assert same_tensors(after.tensors, freeze(random_state()).tensors)


def test_a_signal_to_the_group_does_not_end_the_process_that_collates(
    base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    """It is for the training, which saves; with the other one gone there would be nothing to save any more."""
    hit: list[int] = []

    class Signalled(Counted):
        def loss(self, *arguments: Any) -> Tensor:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                hit.append(child.pid)
                os.kill(child.pid, signal.SIGTERM)
                os.kill(child.pid, signal.SIGINT)
            return super().loss(*arguments)

    found = train(base, tokenizer, tmp_path / "run", lambda _, model, **__: Signalled(model), workers=1, packing=False)
    assert len(set(hit)) == 2, "one an epoch"
    assert found.training.progress.finished == "all epochs"
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Leaky(FastModel):
    """Takes all documents for one."""

    def states(self, tokens: Tensor, documents: Documents) -> Tensor:
        return super().states(tokens, Documents.of([documents.tokens], tokens.device))


class Broken(FastModel):
    """What a GPU without the attention's kernel does."""

    def states(self, tokens: Tensor, documents: Documents) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("kind", [FastModel, Leaky, Broken])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_fast_path_on_which_packed_rows_see_each_other_is_left(
    base: Base, tokenizer: Any, tmp_path: Path, kind: type[FastModel], precision: str
) -> None:
    recipe = tiny_recipe(training={"packing": True, "max_length": 32, "precision": precision})
    rows = Rows(ROWS[:3], [])
    made = Training(
        recipe,
        adapted(recipe, base),
        tokenizer,
        rows,
        workdir=tmp_path,
        notice=Notice(),
        accelerate=lambda _, model, **__: kind(model),
    )
    if kind is not FastModel and precision == "fp8":
        with pytest.raises(ModelInvalid, match="packed rows"):
            made.prove_isolation()
    else:
        made.prove_isolation()
        assert (made._trainer.fast is None) == (kind is not FastModel)


def test_where_triton_cannot_compile_torch_computes() -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    found = in_triton()
    assert found == in_torch()
    assert not found.compiled, "nor is anything dequantised by it"
