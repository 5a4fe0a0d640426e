"""Promise: how far a run has come is a function of its losses; the best epoch is delivered, the earlier of equals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from job.contract.recipe import EarlyStopping
from job.progress import Best, Progress

STEPS = 5
"""Of each epoch."""


def closing(
    losses: Sequence[float | None], *, epochs: int = 100, stopping: EarlyStopping | None = None
) -> list[Progress]:
    """A run's progress after each epoch, until it finishes."""
    progress, seen = Progress(), []
    for number, loss in enumerate(losses, start=1):
        progress = progress.stepped(step=STEPS * number, epoch=float(number), loss=1.0, trained_tokens=10)
        progress = progress.closed(held_out_loss=loss, epochs=epochs, stopping=stopping)
        seen.append(progress)
        if progress.finished:
            break
    return seen


@dataclass(frozen=True)
class Expected:
    """What the losses say, by definition rather than step by step."""

    trained: int
    best: int
    finished: str | None


def expected(losses: list[float], *, epochs: int, stopping: EarlyStopping | None) -> Expected:
    better = [
        i == 0 or losses[i] < min(losses[:i]) - (stopping.min_delta if stopping else 0.0) for i in range(len(losses))
    ]
    for i in range(len(losses)):
        if i + 1 == epochs:
            return Expected(i + 1, losses.index(min(losses[: i + 1])) + 1, "all epochs")
        if stopping is not None and i >= stopping.patience and not any(better[i - stopping.patience + 1 : i + 1]):
            return Expected(i + 1, losses.index(min(losses[: i + 1])) + 1, "early stopping")
    return Expected(len(losses), losses.index(min(losses)) + 1, None)


quarters = st.integers(0, 8).map(lambda n: n / 4)  # few values, so that there are ties
stoppings = st.none() | st.builds(EarlyStopping, patience=st.integers(1, 4), min_delta=st.just(0.0) | quarters)


@given(st.lists(quarters | st.floats(0, 20), min_size=1, max_size=12), st.integers(1, 14), stoppings)
def test_the_best_epoch_and_the_end_are_what_the_list_of_losses_says(
    losses: list[float], epochs: int, stopping: EarlyStopping | None
) -> None:
    seen = closing(losses, epochs=epochs, stopping=stopping)
    last, right = seen[-1], expected(losses, epochs=epochs, stopping=stopping)
    assert len(seen) == right.trained
    assert last.finished == right.finished
    assert last.best == Best(step=STEPS * right.best, epoch=right.best, held_out_loss=losses[right.best - 1])
    assert [e.held_out_loss for e in last.epochs] == losses[: right.trained]
    assert [e.epoch for e in last.epochs] == list(range(1, right.trained + 1))
    assert last.closed_epochs == right.trained
    chosen = last.chosen()
    assert (chosen.step, chosen.epoch) == (STEPS * right.best, right.best)
    assert chosen.held_out_loss == losses[right.best - 1]
    assert chosen.why == f"lowest held-out loss of {right.trained} epochs"


@given(st.lists(quarters, min_size=1, max_size=8), stoppings)
def test_progress_survives_its_file_and_goes_on_the_same(losses: list[float], stopping: EarlyStopping | None) -> None:
    progress = Progress()
    for loss, one in zip(losses, closing(losses, stopping=stopping), strict=False):
        progress = Progress.from_bytes(progress.to_bytes(), name="progress.json")
        progress = progress.stepped(step=one.step, epoch=one.epoch, loss=1.0, trained_tokens=10)
        progress = progress.closed(held_out_loss=loss, epochs=100, stopping=stopping)
        assert progress == one


@given(st.floats())
def test_a_loss_is_the_same_double_after_the_file(loss: float) -> None:
    progress = Progress().stepped(step=1, epoch=0.1, loss=loss, trained_tokens=1)
    again = Progress.from_bytes(progress.to_bytes(), name="progress.json")
    assert repr(again.losses[0].loss) == repr(loss)


def test_a_step_adds_its_loss_and_its_tokens_and_changes_nothing_else() -> None:
    first = Progress().stepped(step=1, epoch=0.5, loss=2.0, trained_tokens=7)
    second = first.stepped(step=2, epoch=1.0, loss=1.0, trained_tokens=5)
    assert (second.step, second.epoch, second.trained_tokens) == (2, 1.0, 12)
    assert [(line.step, line.epoch, line.loss) for line in second.losses] == [(1, 0.5, 2.0), (2, 1.0, 1.0)]
    assert (second.closed_epochs, second.epochs, second.best, second.finished) == (0, (), None, None)
    assert len(first.losses) == 1


def test_of_equal_epochs_the_earlier_is_the_best() -> None:
    assert closing([1.0, 1.0, 1.0])[-1].best == Best(step=STEPS, epoch=1, held_out_loss=1.0)


def test_patience_is_the_number_of_epochs_without_improvement() -> None:
    seen = closing([2.0, 1.0, 1.5, 1.2, 0.5], stopping=EarlyStopping(patience=2))
    assert [p.without_improvement for p in seen] == [0, 0, 1, 2]
    assert seen[-1].finished == "early stopping"


def test_an_improvement_begins_the_patience_anew() -> None:
    seen = closing([2.0, 2.5, 1.0, 1.5], stopping=EarlyStopping(patience=2))
    assert [p.without_improvement for p in seen] == [0, 1, 0, 1]
    assert seen[-1].finished is None


def test_a_smaller_fall_than_min_delta_is_the_best_and_spends_patience_all_the_same() -> None:
    seen = closing([1.0, 0.9375, 0.875], stopping=EarlyStopping(patience=2, min_delta=0.5))
    assert [p.without_improvement for p in seen] == [0, 1, 2]
    assert seen[-1].finished == "early stopping"
    assert seen[-1].best == Best(step=3 * STEPS, epoch=3, held_out_loss=0.875)


def test_a_fall_of_exactly_min_delta_is_not_more_than_it() -> None:
    assert closing([1.0, 0.5], stopping=EarlyStopping(patience=3, min_delta=0.5))[-1].without_improvement == 1
    assert closing([1.0, 0.25], stopping=EarlyStopping(patience=3, min_delta=0.5))[-1].without_improvement == 0


def test_the_last_epoch_finishes_even_when_patience_ends_there_too() -> None:
    assert closing([1.0, 2.0], epochs=2, stopping=EarlyStopping(patience=1))[-1].finished == "all epochs"


def test_without_held_out_rows_all_epochs_run_and_the_last_step_is_delivered() -> None:
    seen = closing([None, None, None], epochs=3)
    assert [p.finished for p in seen] == [None, None, "all epochs"]
    chosen = seen[-1].chosen()
    assert (chosen.step, chosen.epoch, chosen.held_out_loss) == (3 * STEPS, 3.0, None)
    assert "no rows are held out" in chosen.why
