"""The training: TRL's SFTTrainer, steered so that a run that is killed and resumed is the run that was not.

What stock TRL does not do, and this does (each found by comparing adapters byte for byte):
  - adapter masters in fp32 (TRL casts them to bf16, PEFT reads them back as fp32);
  - an evaluation moves no random state;
  - the order of the rows is a function of (seed, epoch);
  - a checkpoint is taken after the step is logged and, at an epoch's end, after the evaluation; an epoch that was
    trained but not evaluated says so, and is evaluated first thing after the resume.

Before the first step of an attempt the costliest batch is rehearsed (job/rehearsal.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState

from job.batches import Collator, Metered, example_lengths, to_dataset
from job.callbacks import Steering
from job.contract.errors import ModelInvalid, TrainingFailed
from job.contract.recipe import Recipe, resolve_learning_rate
from job.evaluate import held_out_loss
from job.fast.model import FastModel
from job.isolation import prove_isolation
from job.logs import get_logger
from job.memory import footprint, out_of_memory_is, taken
from job.model import (
    AdapterState,
    adapter_config,
    adapter_state,
    check_tokens,
    padding_token,
    parameters,
    raise_adapter_to_fp32,
    set_adapter,
    write_adapter,
)
from job.notice import Notice
from job.progress import Progress
from job.randomness import random_state
from job.rehearsal import costliest_drawn, costliest_in_order, rehearse
from job.rows import Rows as Rows
from job.shortage import STATE_BYTES, out_of_memory
from job.snapshot import Snapshot, read_best, read_progress, read_state, read_weights
from job.speed import set_reproducible, speed_up
from job.tensors import freeze
from job.trainer import ExactTrainer, arguments

Accelerate = Callable[..., FastModel | None]
"""As job.speed.speed_up."""


class Training:
    """One attempt's training: build it, restore into it, run it, save from it.

    `progress` always says how far the weights in memory have come.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        tokenizer: Any,
        rows: Rows,
        *,
        workdir: Path,
        notice: Notice,
        accelerate: Accelerate = speed_up,
    ) -> None:
        """
        Args:
            accelerate: chooses how the loss is computed.
        """
        self.recipe = recipe
        self.progress = Progress()
        self.model = model
        self._notice = notice
        self._best: AdapterState | None = None
        self._restored: Path | None = None
        self._evaluate_seconds: float | None = None
        self._row_lengths = [len(row.ids) for row in rows.train]
        self.learning_rate = resolve_learning_rate(recipe, parameters(model))
        how = recipe.training
        set_reproducible(recipe)
        check_tokens((*rows.train, *rows.held_out), model)
        self._trainer = ExactTrainer(
            model=model,
            args=arguments(recipe, self.learning_rate, workdir / "trainer"),
            train_dataset=to_dataset(rows.train, packing=how.packing, max_length=how.max_length),
            processing_class=tokenizer,
            data_collator=Collator(pad_token_id=padding_token(tokenizer, model), padding_free=how.packing),
        )
        self._trainer.training = self
        self._trainer.remove_callback(PrinterCallback)  # stdout is for answers
        raise_adapter_to_fp32(self._trainer.model)
        self._drawn = costliest_drawn(example_lengths(self._trainer.train_dataset), how.batch_size, packed=how.packing)
        self._trainer.fast = accelerate(
            recipe,
            self._trainer.model,
            tokens=self._drawn.tokens,
            longest=max(len(row.ids) for row in (*rows.train, *rows.held_out)),
        )
        self._model_bytes = taken(model)
        self._held_out = (
            to_dataset(rows.held_out, packing=how.packing, max_length=how.max_length) if rows.held_out else None
        )
        batches = -(-len(self._trainer.train_dataset) // how.batch_size)
        self.steps_per_epoch = -(-batches // how.gradient_accumulation)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.training.epochs

    def restore(self, folder: Path) -> None:
        """Take up a verified checkpoint's files. Optimizer, schedule and random state follow when `run` starts."""
        self.progress = read_progress(folder)
        set_adapter(self.model, read_weights(folder))
        self._restored = folder
        self._best = read_best(folder, self.progress)

    def run(self, steering: Steering) -> None:
        """Train until the run is finished or a notice stops it; `progress.finished` tells which.

        Raises:
            TrainingFailed: the loss is not a number any more, or explodes, or memory is short.
        """
        at_boundary = self.progress.step > 0 and self.progress.step % self.steps_per_epoch == 0
        if at_boundary and self.progress.closed_epochs * self.steps_per_epoch < self.progress.step:
            steering.close_epoch()
        if self.progress.finished or steering.stopping:
            return
        if self._restored is not None:
            self._write_trainer_state(self._restored)
        self._trainer.add_callback(_BeforeTheFirstStep(self._rehearse))
        self._trainer.add_callback(steering)
        # A notice while it was rehearsed: nothing is done yet, and a step may take longer than the machine has.
        with contextlib.suppress(_NoticeGiven), self._memory_for(lambda: f"in step {self.progress.step + 1}"):
            self._trainer.train(resume_from_checkpoint=str(self._restored) if self._restored else None)

    def evaluate(self) -> float | None:
        """The held-out loss now; None without held-out rows, or when a notice came in between."""
        if self._held_out is None:
            return None
        began = time.monotonic()
        loader = DataLoader(
            self._held_out,
            batch_size=self.recipe.training.batch_size,
            collate_fn=self._trainer.data_collator,
        )
        with self._memory_for(lambda: f"in the evaluation after step {self.progress.step}"):
            loss = held_out_loss(self._trainer, self._noted(loader), self._notice)
        self._evaluate_seconds = time.monotonic() - began
        return loss

    def prove_isolation(self) -> None:
        """With packing: that packed rows do not see each other in this model, nor on the fast path; if they do there
        alone, the modules train instead.

        Raises:
            ModelInvalid: they do, or do where fp8 is asked for.
        """
        if not self.recipe.training.packing:
            return
        autocast = self._trainer.compute_loss_context_manager
        prove_isolation(self.model, autocast=autocast)
        if self._trainer.fast is None:
            return
        try:
            prove_isolation(self.model, autocast=autocast, fast=self._trainer.fast)
        except ModelInvalid as error:
            if self.recipe.training.precision == "fp8":
                raise
            get_logger().warning("speed.plain", why=error.message)
            self._trainer.fast = None

    @property
    def step_seconds(self) -> float:
        """How long a step takes; 0 before the second."""
        return self._trainer.meter.usual_seconds

    def evaluate_seconds(self) -> float:
        """How long an evaluation takes: as it was measured, else as long as training on as many batches would."""
        if self._held_out is None or self._evaluate_seconds is not None:
            return self._evaluate_seconds or 0.0
        how = self.recipe.training
        batches = -(-len(self._held_out) // how.batch_size)
        return batches * self.step_seconds / how.gradient_accumulation

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out."""
        return self._held_out is not None

    def note_best(self) -> None:
        """The weights in memory are the best so far: keep a copy of them."""
        self._best = adapter_state(self.model)

    def snapshot(self) -> Callable[[Path], None]:
        """Copy the training's state aside, now; the function returned writes it to a folder, later and elsewhere."""
        return Snapshot(
            adapter=adapter_state(self.model),
            config=adapter_config(self.model, self.recipe),
            state=freeze(self._state()),
            progress=self.progress,
            best=self._best if self.progress.best_is_earlier else None,
        ).write

    def write_chosen(self, folder: Path, *, as_it_is: bool = False) -> None:
        """Write the adapter that is delivered: the best epoch's, or the last step's.

        Args:
            as_it_is: the weights in memory, whatever was best.

        Raises:
            OSError
        """
        state = self._best if self._best is not None and not as_it_is else adapter_state(self.model)
        write_adapter(state, adapter_config(self.model, self.recipe), folder)

    def _state(self) -> dict[str, Any]:
        optimizer, scheduler = self._trainer.optimizer, self._trainer.lr_scheduler
        if optimizer is None or scheduler is None:
            # An epoch is closed before the trainer started: they are still as the checkpoint has them.
            if self._restored is None:
                raise AssertionError("a training that never started has nothing to save")
            return read_state(self._restored)
        return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state()}

    def take_meter(self) -> Metered:
        """What was trained since the last look."""
        return self._trainer.meter.take()

    # The rehearsal.

    def play(self, examples: Sequence[int]) -> int:
        """Forward and backward as in a step, with these examples of the train set; its tokens, padding included."""
        return self._trainer.rehearse(self._batch(self._trainer.train_dataset, examples))

    def judge(self, examples: Sequence[int]) -> None:
        """Forward as in an evaluation, with these examples of the held-out set."""
        held_out_loss(self._trainer, self._noted([self._batch(self._held_out, examples)]), self._notice)

    def _rehearse(self) -> None:
        how = self.recipe.training
        judged = None
        if self._held_out is not None:
            judged = costliest_in_order(example_lengths(self._held_out), how.batch_size, packed=how.packing)
        with self._memory_for(lambda: "in the rehearsal of the costliest batch"):
            rehearse(
                self, self._drawn, judged, optimizer=self._trainer.optimizer, state_bytes=STATE_BYTES[how.optimizer]
            )
        self._trainer.meter.take()  # the first step's seconds are its own
        if self._notice.given:
            raise _NoticeGiven

    def _batch(self, dataset: Any, examples: Sequence[int]) -> dict[str, Any]:
        batch: dict[str, Any] = self._trainer.data_collator([dataset[index] for index in examples])
        return batch

    def _noted(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            self._trainer.note(batch)
            yield batch

    def _memory_for(self, doing: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        def describe(request: str) -> TrainingFailed:
            batch = self._trainer.under_way
            what = doing() + (f", {batch.text}" if batch else "")
            now = footprint(self.model, model_bytes=self._model_bytes)
            return out_of_memory(what, request, self.recipe, now, self._row_lengths)

        return out_of_memory_is(describe)

    # What the trainer asks for.

    def _write_trainer_state(self, folder: Path) -> None:
        """The one file of the trainer's own checkpoints that it insists on: how far it was."""
        args = self._trainer.args
        state = TrainerState(
            global_step=self.progress.step,
            epoch=self.progress.epoch,
            train_batch_size=args.per_device_train_batch_size,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
        )
        state.save_to_json(str(folder / "trainer_state.json"))

    def load_optimizer_and_scheduler(self, folder: Path) -> None:
        state = read_state(folder)
        self._trainer.optimizer.load_state_dict(state["optimizer"])
        self._trainer.lr_scheduler.load_state_dict(state["scheduler"])


class _NoticeGiven(Exception):
    """The notice came before the first step."""


class _BeforeTheFirstStep(TrainerCallback):  # type: ignore[misc]
    """Calls a function once everything is as the first step will find it."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._act()
