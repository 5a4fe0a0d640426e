"""The training: TRL's SFTTrainer, steered so that a run that is killed and resumed is the run that was not.

What stock TRL does not do, and this does (each found by comparing adapters byte for byte):
  - adapter masters in fp32 (TRL casts them to bf16, PEFT reads them back as fp32);
  - an evaluation moves no random state;
  - the order of the rows is a function of (seed, epoch);
  - a checkpoint is taken after the step is logged and, at an epoch's end, after the evaluation; an epoch that was
    trained but not evaluated says so, and is evaluated first thing after the resume;
  - nothing in a checkpoint is a path, or a pickle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from job.batches import Collator, EpochOrder, Metered, StepMeter, to_dataset
from job.callbacks import Steering
from job.contract.errors import TrainingFailed
from job.contract.recipe import Recipe, resolve_learning_rate
from job.dataset.render import RenderedRow
from job.evaluate import held_out_loss
from job.model import (
    ADAPTER_WEIGHTS,
    AdapterState,
    adapter_config,
    adapter_state,
    parameters,
    raise_adapter_to_fp32,
    read_adapter,
    set_adapter,
    write_adapter,
)
from job.notice import Notice
from job.progress import Progress
from job.randomness import random_state, set_random_state
from job.tensors import freeze, load_tree, write_tensors

PROGRESS: Final = "progress.json"
STATE: Final = "training_state"
BEST: Final = Path("best") / ADAPTER_WEIGHTS

_OPTIMIZERS: Final = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class Rows:
    """Rendered rows: what is trained, and what it is judged by."""

    train: list[RenderedRow]
    held_out: list[RenderedRow]


class Training:
    """One attempt's training: build it, restore into it, run it, save from it.

    `progress` always says how far the weights in memory have come.
    """

    def __init__(
        self, recipe: Recipe, model: Any, tokenizer: Any, rows: Rows, *, workdir: Path, notice: Notice
    ) -> None:
        self.recipe = recipe
        self.progress = Progress()
        self.model = model
        self._notice = notice
        self._best: AdapterState | None = None
        self._restored: Path | None = None
        self._evaluate_seconds: float | None = None
        self.learning_rate = resolve_learning_rate(recipe, parameters(model))
        how = recipe.training
        self._trainer = _ExactTrainer(
            model=model,
            args=_arguments(recipe, self.learning_rate, workdir / "trainer"),
            train_dataset=to_dataset(rows.train, packing=how.packing, max_length=how.max_length),
            processing_class=tokenizer,
            data_collator=Collator(pad_token_id=tokenizer.pad_token_id, padding_free=how.packing),
        )
        self._trainer.training = self
        self._trainer.remove_callback(PrinterCallback)  # stdout is for answers
        raise_adapter_to_fp32(self._trainer.model)
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
        self.progress = Progress.from_bytes((folder / PROGRESS).read_bytes(), name=str(folder / PROGRESS))
        set_adapter(self.model, read_adapter(folder / ADAPTER_WEIGHTS))
        self._restored = folder
        if self.progress.best is not None:
            own = self.progress.best.step == self.progress.step
            self._best = read_adapter(folder / (ADAPTER_WEIGHTS if own else BEST))

    def run(self, steering: Steering) -> None:
        """Train until the run is finished or a notice stops it; `progress.finished` tells which.

        Raises:
            TrainingFailed: the loss is not a number any more, or memory is short.
        """
        at_boundary = self.progress.step > 0 and self.progress.step % self.steps_per_epoch == 0
        if at_boundary and self.progress.closed_epochs * self.steps_per_epoch < self.progress.step:
            steering.close_epoch()
        if self.progress.finished or steering.stopping:
            return
        if self._restored is not None:
            self._write_trainer_state(self._restored)
        self._trainer.add_callback(steering)
        try:
            self._trainer.train(resume_from_checkpoint=str(self._restored) if self._restored else None)
        except torch.OutOfMemoryError as error:
            raise TrainingFailed(
                f"out of GPU memory at step {self.progress.step + 1}: {error}",
                hint="lower training.batch_size (and raise gradient_accumulation), max_length, or lora.rank",
            ) from error

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
        loss = held_out_loss(self._trainer, loader, self._notice)
        self._evaluate_seconds = time.monotonic() - began
        return loss

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
        """Copy the training's state aside, now; the function returned writes it to a folder, later and elsewhere.

        Files: the adapter (PEFT's own two), training_state.{safetensors,json} (optimizer, schedule, random state),
        progress.json, and best/ when the best epoch is an earlier one. All that `restore` and `run` need, and nothing
        of another checkpoint.
        """
        adapter, config = adapter_state(self.model), adapter_config(self.model, self.recipe)
        state = freeze(self._state())
        progress = self.progress
        best = self._best if progress.best is not None and progress.best.step != progress.step else None

        def write(folder: Path) -> None:
            write_adapter(adapter, config, folder)
            state.save(folder / STATE)
            if best is not None:
                (folder / BEST).parent.mkdir()
                write_tensors(best, folder / BEST)
            (folder / PROGRESS).write_bytes(progress.to_bytes())

        return write

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
            state: dict[str, Any] = load_tree(self._restored / STATE)
            return state
        return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state()}

    def take_meter(self) -> Metered:
        """What was trained since the last look."""
        return self._trainer.meter.take()

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
        state = load_tree(folder / STATE)
        self._trainer.optimizer.load_state_dict(state["optimizer"])
        self._trainer.lr_scheduler.load_state_dict(state["scheduler"])


class _ExactTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with our order, our checkpoints, and a meter of what each step trained."""

    training: Training

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.meter = StepMeter()

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(rows), self.args.seed)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.meter.add(inputs.pop("ledger"))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter is in memory already: `Training.restore` put it there."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.training.load_optimizer_and_scheduler(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_tree(Path(checkpoint) / STATE)["random"])


def _arguments(recipe: Recipe, learning_rate: float, folder: Path) -> SFTConfig:
    how = recipe.training
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(folder),
        seed=how.seed,
        num_train_epochs=how.epochs,
        learning_rate=learning_rate,
        lr_scheduler_type=how.scheduler,
        warmup_steps=how.warmup_ratio,  # below 1 it is a fraction of all steps
        per_device_train_batch_size=how.batch_size,
        gradient_accumulation_steps=how.gradient_accumulation,
        optim=_OPTIMIZERS[how.optimizer],
        weight_decay=how.weight_decay,
        max_grad_norm=how.max_grad_norm,
        max_length=None,  # the rows are cut already
        packing=False,  # and packed
        bf16=cuda,
        tf32=False if cuda else None,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show an average in place of a loss that is not a number
        save_strategy="no",  # Steering saves
        eval_strategy="no",  # and evaluates
        report_to="none",
        disable_tqdm=True,
    )
