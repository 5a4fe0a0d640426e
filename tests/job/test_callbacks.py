"""Promise: after each step the right thing happens next: go on, save, evaluate, stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from job.batches import Ledger, Metered, StepMeter
from job.callbacks import (
    MEAN_SECONDS_BETWEEN_INTERRUPTIONS,
    SHORTEST_INTERVAL,
    Reason,
    Steering,
    best_interval,
)
from job.contract.errors import TrainingFailed
from job.contract.metrics import Evaluated, MetricLine, Step
from job.contract.recipe import EarlyStopping, Recipe
from job.health import PATIENCE
from job.notice import Notice
from job.progress import Progress
from job.train import Training
from job.utilisation import Cost, Utilisation
from tests.job.stack import tiny_recipe

NEVER, ALWAYS = 3600.0, 0.0

# The interval.


def test_the_best_interval_is_youngs_and_dalys() -> None:
    """C = 1 s and M = 6 h: sqrt(2 C M) = 207.8 s, about three and a half minutes."""
    assert MEAN_SECONDS_BETWEEN_INTERRUPTIONS == 6 * 3600
    assert best_interval(1.0, 0.0) == pytest.approx(207.846, abs=1e-3)
    assert best_interval(4.0, 0.0) == pytest.approx(2 * 207.846, abs=1e-2)


@given(st.floats(0.01, 100))
def test_no_other_interval_wastes_less(cost: float) -> None:
    """Waste per second: a save each interval, and half an interval lost at each interruption."""

    def waste(interval: float) -> float:
        return cost / interval + interval / 2 / MEAN_SECONDS_BETWEEN_INTERRUPTIONS

    best = best_interval(cost, 0.0)
    if best > SHORTEST_INTERVAL:
        assert all(waste(best) <= waste(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_an_interval_is_neither_shorter_than_the_shortest_nor_than_an_upload() -> None:
    assert best_interval(0.0, 0.0) == best_interval(1e-6, 1.0) == SHORTEST_INTERVAL
    assert best_interval(1e-6, 600.0) == 900.0
    assert best_interval(100.0, 1.0) > 1.5


# The meter.


def test_the_meter_adds_up_batches_and_begins_anew_when_it_is_read() -> None:
    meter = StepMeter()
    meter.add(Ledger(rows=(3, 9), tokens=20, trained=7, pairs=110))
    meter.add(Ledger(rows=(1,), tokens=5, trained=2, pairs=15))
    taken = meter.take()
    rows, tokens, trained, seconds = taken.rows, taken.tokens, taken.trained, taken.seconds
    assert (rows, tokens, trained) == ((3, 9, 1), 25, 9)
    assert seconds >= 0
    again = meter.take()
    assert (again.rows, again.tokens, again.trained) == ((), 0, 0)


# Steering.


class Played:
    """A training without a model: two steps an epoch, its held-out losses given, everything that happens written down.

    It calls Steering as transformers' trainer does: step end, log, and at the last step of an epoch epoch end.
    """

    def __init__(
        self,
        held_out: list[float | None] | None = None,
        *,
        interval: float | None = NEVER,
        epochs: int = 3,
        stopping: EarlyStopping | None = None,
        at_evaluation: Callable[[Notice], None] = lambda _: None,
        utilisation: Utilisation | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        how = {"epochs": epochs, "early_stopping": stopping.model_dump() if stopping else None}
        self.recipe: Recipe = tiny_recipe(training=how)
        self.progress = Progress()
        self.steps_per_epoch = 2
        self.learning_rate = 0.002
        self.notice = Notice()
        self.happened: list[str] = []
        self.lines: list[MetricLine] = []
        self.saved: list[tuple[Reason, Progress]] = []
        self.control = SimpleNamespace(should_training_stop=False)
        self._held_out = iter(held_out or [])
        self.evaluates = held_out is not None
        self._at_evaluation = at_evaluation
        self._meter = StepMeter(utilisation)
        self.memory_bytes = memory_bytes
        self.steering = Steering(
            cast(Training, self),
            self.notice,
            save=self._save,
            write=self._write,
            interval=interval,
            upload_seconds=lambda: 0.0,
        )

    # What Steering asks of a training.

    def take_meter(self) -> Metered:
        return replace(self._meter.take(), memory_bytes=self.memory_bytes)

    def evaluate(self) -> float | None:
        self.happened.append("evaluate")
        self._at_evaluation(self.notice)
        return None if self.notice.given else next(self._held_out)

    def note_best(self) -> None:
        self.happened.append("best")

    def _save(self, reason: Reason) -> float:
        self.happened.append(f"save {reason}")
        self.saved.append((reason, self.progress))
        return 0.0

    def _write(self, line: MetricLine) -> None:
        self.happened.append(line.event)
        self.lines.append(line)

    # The trainer.

    def step(self, *, loss: float = 1.0, norm: float = 0.5) -> None:
        number = self.progress.step + 1
        self._meter.add(Ledger(rows=(number, number + 100), tokens=30, trained=10, pairs=465))
        state = SimpleNamespace(global_step=number, epoch=number / self.steps_per_epoch, max_steps=6)
        logs: dict[str, Any] = {"loss": loss, "grad_norm": norm, "learning_rate": 0.001}
        self.steering.on_step_end(None, state, self.control)
        self.steering.on_log(None, state, self.control, logs=logs)
        if number % self.steps_per_epoch == 0 or self.control.should_training_stop:
            self.steering.on_epoch_end(None, state, self.control)

    def run(self, most: int = 100) -> None:
        """Until it stops, at the latest after so many steps."""
        for _ in range(most):
            if self.control.should_training_stop:
                break
            self.step()


def test_a_step_is_written_down_with_what_it_trained() -> None:
    played = Played()
    played.step(loss=2.5, norm=0.25)
    [line] = played.lines
    assert isinstance(line, Step)
    assert (line.step, line.epoch, line.loss, line.grad_norm, line.learning_rate) == (1, 0.5, 2.5, 0.25, 0.001)
    assert (line.rows, line.tokens) == ((1, 101), 30)
    assert line.seconds >= 0
    assert (played.progress.step, played.progress.trained_tokens) == (1, 10)


def test_a_step_tells_speed_utilisation_and_memory_in_the_log_and_on_record() -> None:
    played = Played(utilisation=Utilisation(Cost(of_token=2, of_pair=0), peak=100.0), memory_bytes=2**30)
    played._meter._started -= 2.0  # so long ago
    with capture_logs() as logs:
        played.step()
    [line] = played.lines
    assert isinstance(line, Step)
    [said] = [event for event in logs if event["event"] == "step"]
    assert said["tokens_per_second"] == pytest.approx(15, rel=0.02)
    assert said["mfu"] == pytest.approx(0.3, rel=0.02)
    assert line.mfu == pytest.approx(0.3, rel=0.02)
    assert said["memory_bytes"] == line.memory_bytes == 2**30


def test_on_a_cpu_a_step_tells_no_utilisation_and_no_memory() -> None:
    played = Played()
    with capture_logs() as logs:
        played.step()
    [said] = [event for event in logs if event["event"] == "step"]
    assert said["tokens_per_second"] > 0
    assert (said["mfu"], said["memory_bytes"]) == (None, None)
    [line] = played.lines
    assert isinstance(line, Step)
    assert (line.mfu, line.memory_bytes) == (None, None)


def test_without_interval_and_notice_only_epochs_are_saved_after_they_are_evaluated() -> None:
    played = Played([3.0, 2.0, 1.0])
    played.run()
    epoch = ["step", "step", "evaluate", "evaluated", "best", "save epoch"]
    assert played.happened == 3 * epoch
    assert [progress.closed_epochs for _, progress in played.saved] == [1, 2, 3]
    assert played.progress.finished == "all epochs"
    evaluated = [(line.step, line.epoch, line.held_out_loss) for line in played.lines if isinstance(line, Evaluated)]
    assert evaluated == [(2, 1, 3.0), (4, 2, 2.0), (6, 3, 1.0)]


def test_without_held_out_rows_nothing_is_evaluated_and_every_epoch_is_saved() -> None:
    played = Played()
    played.run()
    assert played.happened == 3 * ["step", "step", "save epoch"]
    assert played.progress.finished == "all epochs"


def test_only_a_better_epoch_is_noted_as_the_best() -> None:
    played = Played([2.0, 3.0, 1.0])
    played.run()
    assert [what for what in played.happened if what in ("best", "save epoch")] == [
        *["best", "save epoch"],
        "save epoch",
        *["best", "save epoch"],
    ]


def test_the_best_is_noted_before_the_checkpoint_that_names_it() -> None:
    played = Played([1.0])
    played.step()
    played.step()
    assert played.happened[-2:] == ["best", "save epoch"]
    assert played.saved[-1][1].best is not None


def test_on_the_interval_it_saves_after_the_step_is_logged_and_not_at_an_epochs_last_step() -> None:
    played = Played([3.0, 2.0, 1.0], interval=ALWAYS)
    played.run()
    epoch = ["step", "save interval", "step", "evaluate", "evaluated", "best", "save epoch"]
    assert played.happened == 3 * epoch
    assert [progress.step for _, progress in played.saved] == [1, 2, 3, 4, 5, 6]  # each with its own step in it
    assert all(len(progress.losses) == progress.step for _, progress in played.saved)


def test_a_measured_interval_does_not_save_before_it_has_passed() -> None:
    played = Played(interval=None)  # it begins with the shortest: 15 s
    played.run()
    assert {reason for reason, _ in played.saved} == {"epoch"}


def test_a_notice_saves_after_the_step_is_logged_and_stops() -> None:
    played = Played([3.0, 2.0, 1.0])
    played.step()
    played.step()
    played.notice.give("SIGTERM")
    before = len(played.happened)
    assert not played.control.should_training_stop  # the loop acts, at the end of the step under way
    played.run()
    assert played.happened[before:] == ["step", "save notice"]
    assert played.control.should_training_stop
    assert played.steering.stopping
    reason, progress = played.saved[-1]
    assert (reason, progress.step, progress.closed_epochs, len(progress.losses)) == ("notice", 3, 1, 3)


def test_a_notice_at_an_epochs_last_step_leaves_the_epoch_open_and_stops() -> None:
    played = Played([3.0, 2.0, 1.0])
    played.step()
    played.notice.give("SIGTERM")
    played.step()
    assert played.happened == ["step", "step", "save notice"]
    assert played.control.should_training_stop
    [(reason, progress)] = played.saved
    assert (reason, progress.step, progress.closed_epochs, progress.finished) == ("notice", 2, 0, None)


def test_a_notice_comes_before_the_interval() -> None:
    played = Played(interval=ALWAYS)
    played.notice.give("SIGTERM")
    played.step()
    assert [reason for reason, _ in played.saved] == ["notice"]


def test_a_notice_in_the_evaluation_leaves_the_epoch_open_saved_as_such_and_stops() -> None:
    played = Played([3.0], at_evaluation=lambda notice: notice.give("SIGTERM"))
    played.step()
    played.step()
    assert played.happened == ["step", "step", "evaluate", "save notice"]
    assert played.control.should_training_stop
    assert played.steering.stopping
    [(_, progress)] = played.saved
    assert (progress.step, progress.closed_epochs, progress.best, progress.epochs) == (2, 0, None, ())


def test_an_open_epoch_is_closed_by_itself_after_a_resume() -> None:
    """As `Training.run` does before it starts the trainer."""
    left = Played([3.0], at_evaluation=lambda notice: notice.give("SIGTERM"))
    left.step()
    left.step()
    resumed = Played([3.0])
    resumed.progress = left.saved[-1][1]
    resumed.steering.close_epoch()
    assert resumed.happened == ["evaluate", "evaluated", "best", "save epoch"]
    untouched = Played([3.0])
    untouched.step()
    untouched.step()
    assert resumed.progress == untouched.progress


def test_early_stopping_stops_at_the_epoch_that_spends_the_patience() -> None:
    played = Played([1.0, 2.0, 3.0, 4.0], epochs=9, stopping=EarlyStopping(patience=2))
    played.run()
    assert played.progress.finished == "early stopping"
    assert played.progress.closed_epochs == 3
    assert played.saved[-1] == ("epoch", played.progress)
    assert not played.steering.stopping  # it is finished, and not interrupted


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_that_is_no_number_ends_the_training_by_its_step_and_is_not_saved(loss: float, norm: float) -> None:
    played = Played(interval=ALWAYS)
    played.step()
    before = list(played.saved)
    with pytest.raises(TrainingFailed, match=f"step 2: the loss is {loss} and the gradient norm {norm}") as raised:
        played.step(loss=loss, norm=norm)
    assert "learning_rate" in raised.value.hint
    assert played.saved == before
    assert played.progress.step == 1


def explode(played: Played, *, most: int = 100) -> int:
    """Steps of 9 nats until it stops; how many they were."""
    for number in range(1, most + 1):
        try:
            played.step(loss=9.0)
        except TrainingFailed:
            return number
    raise AssertionError(f"{most} steps of 9 nats, and it still trains")


def test_an_exploding_loss_ends_the_training_and_says_what_to_do() -> None:
    played = Played(interval=ALWAYS, epochs=1000)
    played.run(30)
    for _ in range(PATIENCE - 1):
        played.step(loss=9.0)
    with pytest.raises(TrainingFailed, match=r"step 50: the loss explodes: each .* 3.00 nats") as raised:
        played.step(loss=9.0)
    assert "learning_rate 0.001 instead of 0.002" in raised.value.hint
    assert "the last good checkpoint is that of step 30" in raised.value.hint
    assert played.progress.step == 49  # the step that raised is no part of the run


def test_while_the_loss_explodes_no_checkpoint_pushes_the_good_ones_out() -> None:
    played = Played(interval=ALWAYS, epochs=1000)
    played.run(30)
    before = list(played.saved)
    assert before[-1][1].step == 30
    assert explode(played) == PATIENCE
    assert played.saved == before


def test_a_spike_delays_a_checkpoint_until_the_loss_has_recovered() -> None:
    played = Played(epochs=1000)
    played.run(29)
    played.step(loss=9.0)  # the last of its epoch
    assert [progress.step for _, progress in played.saved][-1] == 28
    played.step(loss=9.0)
    assert [progress.step for _, progress in played.saved][-1] == 28
    played.step(loss=1.0)
    reason, progress = played.saved[-1]
    assert (reason, progress.step, progress.closed_epochs) == ("epoch", 32, 16)


def test_a_checkpoint_that_a_spike_delayed_does_not_wait_for_the_next_interval() -> None:
    played = Played(epochs=1000)
    played.steps_per_epoch = 30
    played.run(29)
    played.step(loss=9.0)
    assert played.saved == []
    played.step(loss=1.0)
    assert [(reason, progress.step) for reason, progress in played.saved] == [("interval", 31)]


def test_a_notice_and_the_runs_end_save_whatever_the_loss() -> None:
    played = Played(epochs=1000)
    played.run(30)
    played.notice.give("SIGTERM")
    played.step(loss=9.0)
    assert (played.saved[-1][0], played.saved[-1][1].step) == ("notice", 31)
    ended = Played(epochs=3)
    ended.run(5)
    ended.step(loss=9.0)
    assert ended.progress.finished
    assert ended.saved[-1] == ("epoch", ended.progress)


def test_a_resumed_run_explodes_at_the_step_of_the_one_that_was_not_interrupted() -> None:
    whole, resumed = Played(epochs=1000), Played(epochs=1000)
    whole.run(30)
    for _ in range(7):
        whole.step(loss=9.0)
    resumed.progress = whole.progress
    assert explode(whole) == explode(resumed) == PATIENCE - 7


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_training_and_is_never_the_best(loss: float) -> None:
    """Nothing is lower than NaN: it would stay the best, and garbage be delivered."""
    played = Played([loss, 1.0])
    played.step()
    with pytest.raises(TrainingFailed, match=f"step 2: the held-out loss is {loss}"):
        played.step()
    assert played.saved == []
    assert "best" not in played.happened
    assert played.progress.closed_epochs == 0


def test_the_trainers_summary_at_the_end_is_no_step() -> None:
    played = Played()
    played.step()
    state = SimpleNamespace(global_step=1, epoch=0.5, max_steps=6)
    for logs in (None, {}, {"train_runtime": 3.0, "train_loss": 1.0}):
        played.steering.on_log(None, state, played.control, logs=logs)
    assert played.happened == ["step"]


def test_what_a_save_takes_is_not_counted_into_the_next_step() -> None:
    played = Played(interval=ALWAYS)
    save = played.steering._save

    def slowly(reason: Reason) -> float:
        played._meter._started -= 1000.0  # as if it had taken so long
        return save(reason)

    played.steering._save = slowly
    played.step()
    played.step()
    seconds = [line.seconds for line in played.lines if isinstance(line, Step)]
    assert len(seconds) == 2
    assert all(0 <= found < 100 for found in seconds)
