"""How far a run has come: everything of the training's state that is not a tensor. progress.json in a checkpoint."""

from __future__ import annotations

from typing import Literal

from job.contract.passport import Chosen
from job.contract.recipe import EarlyStopping
from job.contract.records import EpochResult, Part, Record, StepLoss


class Best(Part):
    """The best epoch so far, by held-out loss; the earlier one of equals."""

    step: int
    epoch: int
    held_out_loss: float


class Progress(Record):
    """A value: each event makes a new one."""

    step: int = 0
    epoch: float = 0.0
    closed_epochs: int = 0
    """Epochs trained to their end AND evaluated. A boundary reached but not evaluated is not closed."""
    trained_tokens: int = 0
    best: Best | None = None
    without_improvement: int = 0
    finished: Literal["all epochs", "early stopping"] | None = None
    losses: tuple[StepLoss, ...] = ()
    epochs: tuple[EpochResult, ...] = ()

    @property
    def best_is_earlier(self) -> bool:
        """Whether the best epoch's weights are others than this step's."""
        return self.best is not None and self.best.step != self.step

    def stepped(self, *, step: int, epoch: float, loss: float, trained_tokens: int) -> Progress:
        """After one more optimizer step."""
        return self.model_copy(
            update={
                "step": step,
                "epoch": epoch,
                "trained_tokens": self.trained_tokens + trained_tokens,
                "losses": (*self.losses, StepLoss(step=step, epoch=epoch, loss=loss)),
            }
        )

    def closed(self, *, held_out_loss: float | None, epochs: int, stopping: EarlyStopping | None) -> Progress:
        """After the evaluation at the end of an epoch.

        Args:
            held_out_loss: mean nats per held-out token; None when no rows are held out.
            epochs: how many the recipe asks for.
            stopping: when to stop early, if ever.

        An epoch is the best when it beats the best so far at all, and resets the patience when it beats it by
        more than min_delta.
        """
        number = self.closed_epochs + 1
        best, waited = self.best, 0
        if held_out_loss is not None:
            if best is None or held_out_loss < best.held_out_loss:
                best = Best(step=self.step, epoch=number, held_out_loss=held_out_loss)
            enough = stopping.min_delta if stopping else 0.0
            if self.best is not None and not held_out_loss < self.best.held_out_loss - enough:
                waited = self.without_improvement + 1
        finished: Literal["all epochs", "early stopping"] | None = None
        if stopping is not None and waited >= stopping.patience:
            finished = "early stopping"
        if number >= epochs:
            finished = "all epochs"
        return self.model_copy(
            update={
                "closed_epochs": number,
                "best": best,
                "without_improvement": waited,
                "finished": finished,
                "epochs": (*self.epochs, EpochResult(epoch=number, step=self.step, held_out_loss=held_out_loss)),
            }
        )

    def chosen(self) -> Chosen:
        """Which state is delivered, and why."""
        if self.best is None:
            return Chosen(
                step=self.step, epoch=self.epoch, held_out_loss=None, why="the last step: no rows are held out"
            )
        return Chosen(
            step=self.best.step,
            epoch=self.best.epoch,
            held_out_loss=self.best.held_out_loss,
            why=f"lowest held-out loss of {len(self.epochs)} epochs",
        )
