"""The end of the training: the final adapter is published, or, when the budget ends first, the best so far lands."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from job.claim import Insist
from job.contract.environ import JobEnviron
from job.contract.errors import StorageError, Unreachable
from job.contract.layout import RunLayout
from job.contract.metrics import Published
from job.contract.outcome import Outcome
from job.contract.passport import Chosen
from job.contract.records import AttemptClaim, RunRecord
from job.ending import Ending
from job.journal import Journal, now
from job.logs import get_logger
from job.passport import read_story
from job.publish import publish, write_papers
from job.spool import Spool
from job.storage import Store
from job.storage.store import translate_os_error

if TYPE_CHECKING:
    from job.loading import Loaded

_LOOK_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Delivery:
    """Everything that it takes to deliver.

    Args:
        insist: does something again while the store or the disk is in the way.
        time_to_save: seconds until this process may be killed.
    """

    store: Store
    layout: RunLayout
    record: RunRecord
    loaded: Loaded
    claim: AttemptClaim
    environ: JobEnviron
    journal: Journal
    uploads: Spool
    insist: Insist
    time_to_save: Callable[[], float]

    def publish(self) -> Ending:
        """Deliver the final adapter. Whatever fails leaves it on this disk, and the next attempt publishes it.

        Raises:
            StorageError: it could not be written.
        """
        training = self.loaded.training
        self._deliver(training.write_chosen, landed=None)
        why = f"{training.progress.finished}; {training.progress.chosen().why}"
        return Ending(Outcome.DONE, why, step=training.progress.step)

    def land(self, why: str, more: str) -> Ending:
        """Deliver the best adapter so far, since the budget ends.

        Everything is committed first, so what follows here is no part of the run: it goes on, exactly, from there.

        Args:
            why: what ended it.
            more: how to go on.

        Raises:
            StorageError: it could not be written.
        """
        training = self.loaded.training
        self._commit_last()
        self.journal.phase("landing")
        chosen, as_it_is = self._choose()
        self._deliver(partial(training.write_chosen, as_it_is=as_it_is), landed=chosen)
        step = training.progress.step
        said = (
            f"stopped at step {step} of {training.total_steps}: {why}; the adapter of step {chosen.step} is published"
        )
        return Ending(Outcome.OUT_OF_BUDGET, said, more, step=step)

    def _choose(self) -> tuple[Chosen, bool]:
        """The best of what there is: an epoch that was evaluated, or the weights as they are now."""
        progress = self.loaded.training.progress
        loss = self.loaded.training.evaluate() if self.loaded.training.evaluates else None
        best = progress.best
        if best is not None and (loss is None or best.held_out_loss <= loss):
            return progress.chosen(), False
        if best is None and loss is None:
            why = "the last step before the budget ended"
        else:
            why = "lowest held-out loss when the budget ended"
        return Chosen(step=progress.step, epoch=progress.epoch, held_out_loss=loss, why=why), True

    def _deliver(self, write: Callable[[Path], None], *, landed: Chosen | None) -> None:
        folder = Path(self.environ.workdir) / "adapter"

        def write_adapter() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write(folder)

        self.insist("disk", partial(_on_disk, write_adapter, folder))
        try:
            self._commit_last()
            self.insist("journal", self.journal.flush)
            story = self.insist("records", lambda: read_story(self.store, self.layout))
            passport = self.loaded.passport(
                self.record, story, running=self.claim.attempt, environ=self.environ, landed=landed
            )
            papers = partial(write_papers, passport, self.loaded.base.folder, folder)
            self.insist("disk", partial(_on_disk, papers, folder))
            attempt = self.claim.attempt
            self.insist("adapter", lambda: publish(self.store, self.layout, passport, folder, attempt=attempt))
        except StorageError as error:
            raise type(error)(
                f"{error.message}; the adapter is on this disk: {folder}",
                hint="the next attempt publishes it: ftjob launch --run " + self.record.run_id,
            ) from error
        self.journal.write(Published(at=now(), step=passport.chosen.step))
        get_logger().info("delivered", step=passport.chosen.step, complete=passport.complete)

    def _commit_last(self) -> None:
        """Wait for the last checkpoint. Raises StorageError with what is in its way."""
        until = time.monotonic() + self.environ.final_retry_seconds
        while not self.uploads.flush(_LOOK_SECONDS):
            if time.monotonic() > until or not self.time_to_save():
                trouble = self.uploads.trouble or Unreachable("it takes longer than there is time")
                raise type(trouble)(
                    f"the last checkpoint could not be written to {self.store.uri}: {trouble.message}",
                    hint=trouble.hint,
                )


def _on_disk(write: Callable[[], None], folder: Path) -> None:
    """Write; a full disk is Unreachable, which may be tried again."""
    try:
        write()
    except OSError as error:
        raise translate_os_error(error, str(folder)) from error
