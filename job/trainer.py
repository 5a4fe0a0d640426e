"""TRL's SFTTrainer with our order, our checkpoints, and a meter of what each step trained."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from trl import SFTConfig, SFTTrainer

from job.batches import EpochOrder, Ledger, Route, StepMeter
from job.contract.errors import TrainingFailed
from job.contract.recipe import Recipe
from job.fast.attention import Documents
from job.fast.model import FastModel
from job.model import hardware
from job.randomness import set_random_state
from job.shortage import Batch
from job.snapshot import read_state
from job.utilisation import utilisation

_OPTIMIZERS: Final = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_FUSED: Final = "adamw_torch_fused"
"""One kernel for all of an adapter's tensors, on a GPU."""


class Restorer(Protocol):
    """Puts the optimizer and the schedule back."""

    def load_optimizer_and_scheduler(self, folder: Path) -> None: ...


class ExactTrainer(SFTTrainer):  # type: ignore[misc]
    """What of the trainer would differ between a run that was interrupted and one that was not is ours."""

    training: Restorer
    _metrics: dict[str, Any]
    _total_train_tokens: int

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Of a model that takes no count of a step's tokens itself: the loss is TRL's, which divides by it.
        self.model_accepts_loss_kwargs = True
        self.meter = StepMeter(utilisation(self.model, hardware().name))
        self.fast: FastModel | None = None
        """Computes the loss in place of the modules, where it can."""
        self.under_way: Batch | None = None
        """The batch that goes through the model, or went last."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(len(rows), self.args.seed)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of a step. At an epoch's first the process that collates begins, where there is one.

        A signal to the group is for this process alone to answer: the other would die of it, and take the run along
        before it is saved. A process begins with the signals blocked that are blocked where it was started.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward.

        Raises:
            TrainingFailed: no token of the batch is trained.
        """
        self.note(inputs)
        ledger: Ledger = inputs.pop("ledger")
        if ledger.trained == 0:
            raise TrainingFailed(
                f"step {self.state.global_step + 1}: no token of the batch of lines {_listed(ledger.rows)} is trained",
                hint="`ftjob check` shows what of each row is trained",
            )
        self.meter.add(ledger)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch in nats: its sum over `num_items_in_batch`, where that is given."""
        route: Route = inputs.pop("route")
        if self.fast is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        device = inputs["input_ids"].device
        positions, targets = (part.to(device, non_blocking=True) for part in (route.positions, route.targets))
        # Where nothing is trained the loss is 0, as by the modules, and not 0 / 0.
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        documents = Documents.of(route.documents, device)
        return self.fast.loss(inputs["input_ids"].flatten(), documents, positions, targets, count)

    def rehearse(self, batch: dict[str, Any]) -> int:
        """A step's forward and backward, of which nothing is counted; tokens of the batch, padding included."""
        self.note(batch)
        inputs = {name: value for name, value in batch.items() if name != "ledger"}
        # Where SFTTrainer keeps what it says of itself in its log.
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        try:
            count = self._get_num_items_in_batch([inputs], self.args.device)
            super().training_step(self.model_wrapped, inputs, count)
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens
        return int(batch["input_ids"].numel())

    def note(self, batch: dict[str, Any]) -> None:
        """A collated batch is about to go through the model: should memory be short, it is named."""
        self.under_way = Batch(
            rows=len(batch["ledger"].rows), tokens=batch["input_ids"].numel(), packed="position_ids" in batch
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The adapter is in memory already: `Training.restore` put it there."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.training.load_optimizer_and_scheduler(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(read_state(Path(checkpoint))["random"])


def _listed(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")


def arguments(recipe: Recipe, learning_rate: float, folder: Path) -> SFTConfig:
    """The recipe in the trainer's words. `folder` is where it may write, and does not."""
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
        optim=_FUSED if cuda and how.optimizer == "adamw" else _OPTIMIZERS[how.optimizer],
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
        # The loss on record is that of the tokens alone: of experts, TRL would add how evenly the routers, which are
        # frozen, share them out.
        router_aux_loss_coef=0.0,
        # On a GPU a process of its own collates: 15 ms of a step of 16 384 tokens, for which the GPU would wait.
        dataloader_num_workers=1 if cuda else 0,
        dataloader_pin_memory=cuda,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show an average in place of a loss that is not a number
        save_strategy="no",  # Steering saves
        eval_strategy="no",  # and evaluates
        report_to="none",
        disable_tqdm=True,
    )
