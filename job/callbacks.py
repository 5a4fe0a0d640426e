"""Steering: looks at the clock and the notice after each step, and decides what happens next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol

from transformers import TrainerCallback

from job.batches import Metered
from job.contract.errors import TrainingFailed
from job.contract.metrics import Evaluated, MetricLine, Step
from job.contract.recipe import Recipe
from job.health import LossWatch
from job.journal import now
from job.logs import get_logger
from job.notice import Notice
from job.progress import Progress

Reason = Literal["epoch", "interval", "notice", "budget"]

MEAN_SECONDS_BETWEEN_INTERRUPTIONS: Final = 6 * 3600.0
"""M of Young/Daly where nothing better is known. AWS's 15-20 % a month band is milder, a busy region much worse."""

SHORTEST_INTERVAL: Final = 15.0
"""Seconds. Below it the bucket fills with checkpoints that save seconds."""


def best_interval(blocking_seconds: float, upload_seconds: float) -> float:
    """Seconds between saves that waste least: sqrt(2 C M) (Young 1974; Daly 2006, first order).

    Args:
        blocking_seconds: C, for how long a save holds the training up.
        upload_seconds: from the decision to the commit; saving faster than that only queues.
    """
    ideal = math.sqrt(2 * blocking_seconds * MEAN_SECONDS_BETWEEN_INTERRUPTIONS)
    return max(ideal, 1.5 * upload_seconds, SHORTEST_INTERVAL)


class Steered(Protocol):
    """The training, as far as it is steered."""

    recipe: Recipe
    progress: Progress
    learning_rate: float

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def evaluates(self) -> bool:
        """Whether rows are held out."""
        ...

    def evaluate(self) -> float | None:
        """The held-out loss now; None when a notice came in between."""
        ...

    def note_best(self) -> None:
        """The weights in memory are the best so far."""
        ...

    def take_meter(self) -> Metered:
        """What was trained since the last look."""
        ...


class Steering(TrainerCallback):  # type: ignore[misc]
    """Saves at every epoch, on the interval, on a notice and at the budget's end; closes epochs; stops.

    Args:
        save: takes a checkpoint of the training for a reason; returns the seconds it blocked.
        write: adds a line to the journal.
        interval: seconds between saves, or None for the best interval by Young/Daly.
        upload_seconds: how long the last commit took, from its decision on.
        has_to_land: whether the budget is at its end.
    """

    def __init__(
        self,
        training: Steered,
        notice: Notice,
        *,
        save: Callable[[Reason], float],
        write: Callable[[MetricLine], None],
        interval: float | None,
        upload_seconds: Callable[[], float],
        has_to_land: Callable[[], bool] = lambda: False,
    ) -> None:
        self.training = training
        self.stopping = False
        self._notice = notice
        self._save = save
        self._write = write
        self._fixed = interval
        self._upload_seconds = upload_seconds
        self._has_to_land = has_to_land
        self._due = time.monotonic() + (SHORTEST_INTERVAL if interval is None else interval)
        self._pending: Reason | None = None
        self._watch: LossWatch | None = None
        self._saved_step: int | None = None
        """Of the newest checkpoint that was taken while the loss was not in doubt."""

    # The trainer's events, in the order in which they come.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        get_logger().info("training.started", step=state.global_step, total_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide; the save itself waits until the step is logged."""
        if self._notice.given or self._has_to_land():
            self._pending = "notice" if self._notice.given else "budget"
            self.stopping = True
            control.should_training_stop = True
        elif time.monotonic() >= self._due and state.global_step % self.training.steps_per_epoch != 0:
            # At an epoch's last step nothing is saved yet: the epoch's own checkpoint follows its evaluation.
            self._pending = "interval"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the trainer's summary at the end
        metered = self.training.take_meter()
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        self._check(state.global_step, loss, norm)
        line = Step(
            at=now(),
            step=state.global_step,
            epoch=state.epoch,
            loss=loss,
            grad_norm=norm,
            learning_rate=float(logs["learning_rate"]),
            tokens=metered.tokens,
            seconds=metered.seconds,
            rows=metered.rows,
            mfu=metered.mfu,
            memory_bytes=metered.memory_bytes,
        )
        self.training.progress = self.training.progress.stepped(
            step=line.step, epoch=line.epoch, loss=loss, trained_tokens=metered.trained
        )
        self._write(line)
        get_logger().info(
            "step",
            step=line.step,
            epoch=round(line.epoch, 3),
            loss=loss,
            tokens=metered.tokens,
            tokens_per_second=round(metered.tokens_per_second, 1),
            mfu=None if metered.mfu is None else round(metered.mfu, 4),
            memory_bytes=metered.memory_bytes,
        )
        if self._pending is not None:
            reason, self._pending = self._pending, None
            self._take(reason)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.stopping:
            self.close_epoch()
        if self.stopping or self.training.progress.finished:
            control.should_training_stop = True

    # What they lead to.

    def close_epoch(self) -> None:
        """Evaluate, remember the best, save. A notice in between leaves the epoch open, and saved as such."""
        training = self.training
        loss = None
        if training.evaluates:
            get_logger().info("evaluation.started", step=training.progress.step)
            loss = training.evaluate()
            if loss is None:
                self.stopping = True
                self._take("notice")
                return
            if not math.isfinite(loss):
                raise self._failed(f"step {training.progress.step}: the held-out loss is {loss}")
        before = training.progress
        training.progress = before.closed(
            held_out_loss=loss,
            epochs=training.recipe.training.epochs,
            stopping=training.recipe.training.early_stopping,
        )
        if loss is not None:
            self._write(
                Evaluated(at=now(), step=before.step, epoch=training.progress.closed_epochs, held_out_loss=loss)
            )
            get_logger().info("evaluated", step=before.step, held_out_loss=loss)
        if training.progress.best != before.best:
            training.note_best()
        self._take("epoch")

    def _check(self, step: int, loss: float, norm: float) -> None:
        """That the step has left a model worth going on with. What is raised here is never saved.

        A single micro-batch's NaN is seen too, without asking the GPU after each: it makes the step's mean one.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._failed(f"step {step}: the loss is {loss} and the gradient norm {norm}")
        watch = self._losses()
        explosion = watch.note(loss)
        if explosion is not None:
            raise self._failed(f"step {step}: the loss explodes: {explosion.text}")
        if watch.is_in_doubt:
            get_logger().warning("loss.high", step=step, loss=loss, limit=round(watch.limit, 3))

    def _losses(self) -> LossWatch:
        """Made when it is first asked: what was restored is on record by then."""
        if self._watch is None:
            self._watch = LossWatch(line.loss for line in self.training.progress.losses)
            self._saved_step = None if self._watch.is_in_doubt else self.training.progress.step or None
        return self._watch

    def _failed(self, why: str) -> TrainingFailed:
        rate = self.training.learning_rate
        kept = "" if self._saved_step is None else f"; the last good checkpoint is that of step {self._saved_step}"
        return TrainingFailed(
            why,
            hint=f"`ftjob launch` a new run with training.learning_rate {rate / 2:g} instead of {rate:g}. This run "
            f"keeps its checkpoints{kept}",
        )

    def _take(self, reason: Reason) -> None:
        in_doubt = self._losses().is_in_doubt
        if in_doubt and reason in ("interval", "epoch") and not self.training.progress.finished:
            # A few of a broken model would push the good ones out of the bucket. It is made up for at the first step
            # that is as good as this run was before.
            self._due = time.monotonic()
        else:
            blocking = self._save(reason)
            interval = best_interval(blocking, self._upload_seconds()) if self._fixed is None else self._fixed
            self._due = time.monotonic() + interval
            if not in_doubt:
                self._saved_step = self.training.progress.step
        self.training.take_meter()  # the next step's seconds are its own, not the save's
