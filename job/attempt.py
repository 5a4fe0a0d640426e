"""One attempt, top to bottom: claim -> read -> load -> restore -> train -> publish -> end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from job import checkpoints, sealed, spool
from job.ceiling import Ceiling
from job.claim import claim_next, forget_starts, is_published, read_run, without_a_claim
from job.contract.environ import JobEnviron
from job.contract.errors import FtjobError, Unreachable
from job.contract.identity import check_resumable
from job.contract.layout import CheckpointName, RunLayout
from job.contract.metrics import Committed, Restored
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import AttemptClaim, DatasetDigest, RunRecord
from job.dataset.source import fetch_dataset
from job.deliver import Delivery
from job.ending import Ending, ending_of, record_end
from job.grace import Grace
from job.journal import Journal, now
from job.logs import bind, get_logger
from job.notice import Notice
from job.patience import insist
from job.rows import Files
from job.stop import REASON, is_asked_to_stop, watch_for_stop
from job.storage import Store, open_store
from job.storage.store import translate_os_error
from job.variables import settle

if TYPE_CHECKING:
    from job.callbacks import Reason
    from job.loading import Loaded
    from job.train import Training

T = TypeVar("T")


class _BudgetSpent(Exception):
    """Not even landing can be paid for."""


class _NoticeGiven(Exception):
    """The notice came while there was nothing to save yet, or nothing left to save."""


class Attempt:
    """One life of the job. `live` is the story; the rest are its sentences."""

    def __init__(self, environ: JobEnviron, notice: Notice, *, store: Store | None = None) -> None:
        self._environ = environ
        self._notice = notice
        self._grace = Grace(notice, environ.grace_seconds)
        self._workdir = Path(environ.workdir)
        self._store = open_store(environ.bucket) if store is None else store
        self._layout = RunLayout(environ.run_id)
        self._upload_seconds = 0.0
        self._ceiling: Ceiling | None = None

    def live(self) -> Ending:
        """Live it.

        Raises:
            FtjobError: before there is a claim to end; afterwards every ending is a value, and on record.
        """
        bind(run_id=self._environ.run_id)
        try:
            record = self._insist("recipe", lambda: read_run(self._store, self._layout))
            if self._insist("adapter", lambda: is_published(self._store, self._layout)):
                return Ending(Outcome.DONE, "the adapter is published already")
            if self._insist("stop", lambda: is_asked_to_stop(self._store, self._layout, self._environ.submission)):
                # Not "try again": a backend that was not told to stop would start the job for ever.
                again = f"`ftjob launch --run {self._environ.run_id}` goes on from the last commit"
                return Ending(Outcome.FAILED, f"not begun: there is {REASON}", again)
            # From before the claim, which reads how long this machine has been up: no second in between is unpaid.
            began = time.monotonic()
            claim = claim_next(self._store, self._layout, self._environ, insist=self._insist)
        except _NoticeGiven:
            return Ending(Outcome.PREEMPTED, f"stopped by {self._notice.reason} before it began")
        except Unreachable as error:
            return without_a_claim(error, self._workdir, self._environ)
        forget_starts(self._workdir, self._environ)
        bind(attempt=claim.attempt)
        get_logger().info("attempt.claimed", claim=claim.attempt)
        beat = self._environ.heartbeat_seconds
        attempt = claim.attempt
        with Journal(self._store, self._layout, attempt=attempt, heartbeat_seconds=beat, began=began) as journal:
            stop = watch_for_stop(self._store, self._layout, claim.submission, self._notice)
            ending = self._one_too_many(claim) or self._ending(record, claim, journal)
            stop.set()
            if self._ceiling is not None:
                self._ceiling.close()
            record_end(self._store, self._layout, claim, ending, journal, grace=self._grace)
        return ending

    def _one_too_many(self, claim: AttemptClaim) -> Ending | None:
        """An end to restarts, for backends that know none: a job that always dies would spend for ever."""
        last = self._environ.last_attempt
        if last is None or claim.attempt <= last:
            return None
        return Ending(
            Outcome.FAILED,
            f"gave up after attempt {last}, the last that this launch allows",
            f"read `ftjob logs {self._environ.run_id}`; `ftjob launch --run {self._environ.run_id}` goes on",
        )

    def _ending(self, record: RunRecord, claim: AttemptClaim, journal: Journal) -> Ending:
        """Train and publish; whatever goes wrong becomes an ending."""
        try:
            self._ceiling = self._insist("budget", lambda: self._open_ceiling(claim, journal))
            if self._ceiling.is_too_late_to_begin:
                raise _BudgetSpent(self._ceiling.why)
            return self._train_and_publish(record, claim, journal)
        except _BudgetSpent as spent:
            why = f"{spent}: nothing is left to train or to publish with"
            return Ending(Outcome.OUT_OF_BUDGET, why, self._more_budget())
        except _NoticeGiven:
            return Ending(Outcome.PREEMPTED, f"stopped by {self._notice.reason}; nothing was left unsaved")
        except FtjobError as error:
            return ending_of(error)
        except OSError as error:  # this machine's disk, mostly: another attempt may find it free again
            trouble = translate_os_error(error, str(self._workdir))
            return Ending(Outcome.PREEMPTED, trouble.message, trouble.hint)
        except Exception as error:  # a bug, ours or a library's: it must be on record, not only in a log
            get_logger().exception("attempt.crashed")
            return Ending(Outcome.FAILED, f"{type(error).__name__}: {error}", "the log has the traceback")

    def _train_and_publish(self, record: RunRecord, claim: AttemptClaim, journal: Journal) -> Ending:
        journal.phase("reading the dataset")
        files = self._fetch_dataset(record)
        journal.phase("loading the model")
        loaded = self._load(record, files, journal)
        journal.phase("restoring")
        damaged = self._restore(loaded, journal)
        uploads = spool.Spool(
            self._store,
            self._layout,
            self._workdir / "spool",
            attempt=claim.attempt,
            keep=record.recipe.checkpoints.keep,
            journal=journal,
            on_commit=lambda commit: self._note_commit(commit, journal),
            damaged=damaged,
        )
        try:
            journal.phase("training")
            stopped = self._train(record, loaded, claim, journal, uploads)
            if stopped is not None:
                return stopped
            journal.phase("publishing")
            return self._delivery(record, loaded, claim, journal, uploads).publish()
        finally:
            uploads.close()

    # Before training.

    def _insist(self, what: str, action: Callable[[], T]) -> T:
        return insist(action, what=what, seconds=self._environ.final_retry_seconds, sleep=self._pause)

    def _pause(self, seconds: float) -> None:
        if self._notice.wait(seconds):
            raise _NoticeGiven

    def _go_on(self) -> None:
        if self._notice.given:
            raise _NoticeGiven
        if self._ceiling is not None and self._ceiling.is_spent:
            raise _BudgetSpent(self._ceiling.why)

    def _open_ceiling(self, claim: AttemptClaim, journal: Journal) -> Ceiling:
        def stop(why: str) -> None:
            # Money flows and the main thread may hang: what is committed stays, and nothing else is waited for.
            get_logger().error("budget.stopped_hard", why=why)
            ending = Ending(Outcome.OUT_OF_BUDGET, f"{why}: stopped in the middle", self._more_budget())
            patience = self._grace.last_words
            record_end(self._store, self._layout, claim, ending, journal, grace=self._grace, patience=patience)
            os._exit(EXIT_CODES[Outcome.OUT_OF_BUDGET])

        return Ceiling(self._store, self._layout, claim, elapsed=lambda: journal.elapsed, stop=stop)

    def _more_budget(self) -> str:
        more = "--by TIME" if self._ceiling is not None and self._ceiling.lacks_time else "--budget +USD"
        return f"`ftjob launch --run {self._environ.run_id} {more}` goes on from the last commit"

    def _fetch_dataset(self, record: RunRecord) -> Files:
        def bring(digest: DatasetDigest) -> Path:
            path = self._insist("dataset", lambda: self._fetch(digest))
            self._go_on()
            return path

        return Files(bring(record.train), bring(record.held_out) if record.held_out else None)

    def _fetch(self, digest: DatasetDigest) -> Path:
        mount = self._environ.mounts.get(digest.uri)
        return fetch_dataset(digest, self._workdir / "data", mounted=Path(mount) if mount else None)

    def _load(self, record: RunRecord, files: Files, journal: Journal) -> Loaded:
        settle(os.environ)
        # The heavy libraries are imported here, after the claim: whoever watches sees the attempt meanwhile.
        from job.loading import load

        return load(
            record,
            files,
            workdir=self._workdir,
            threads=self._environ.threads,
            notice=self._notice,
            go_on=self._go_on,
            say=journal.phase,
            retry_seconds=self._environ.final_retry_seconds,
            needs_gpu=self._environ.gpu,
        )

    def _restore(self, loaded: Loaded, journal: Journal) -> frozenset[CheckpointName]:
        """Take up the newest usable checkpoint; returns those that were too damaged to use."""
        self._insist("spool", lambda: sealed.adopt(self._store, self._layout, self._workdir / "spool"))
        folder = self._workdir / "restored"
        restored = self._insist("checkpoint", lambda: checkpoints.restore(self._store, self._layout, folder))
        if restored.manifest is not None:
            for warning in check_resumable(restored.manifest.identity, loaded.identity):
                get_logger().warning("resume.not_bit_exact", why=warning)
            loaded.training.restore(restored.folder)
        step = loaded.training.progress.step
        name = str(restored.manifest.name) if restored.manifest else None
        get_logger().info("attempt.restored", step=step, checkpoint=name, damaged=len(restored.damaged))
        journal.write(
            Restored(
                at=now(),
                step=step,
                checkpoint=name,
                total_steps=loaded.training.total_steps,
                epochs=loaded.training.recipe.training.epochs,
                train_rows=len(loaded.rows.train),
                hardware=loaded.identity.hardware,
            )
        )
        self._go_on()
        return restored.damaged

    # Training.

    def _has_to_land(self, training: Training) -> bool:
        if self._ceiling is None or self._ceiling.budget.is_none:
            return False
        evaluation, step = training.evaluate_seconds(), training.step_seconds
        self._ceiling.note_evaluation(evaluation)
        # At an epoch's last step the next look comes after its evaluation.
        closes = (training.progress.step + 2) % training.steps_per_epoch == 0
        self._ceiling.note_look(step + evaluation if closes else step)
        return self._ceiling.has_to_land

    def _train(
        self, record: RunRecord, loaded: Loaded, claim: AttemptClaim, journal: Journal, uploads: spool.Spool
    ) -> Ending | None:
        """Train to the end (None), to the budget's end, or to a notice."""
        from job.callbacks import Steering

        training = loaded.training

        def save(reason: Reason) -> float:
            started = time.monotonic()
            write = training.snapshot()
            blocking = time.monotonic() - started
            uploads.stage(loaded.manifest(claim.attempt, reason), write, blocking_seconds=blocking)
            return blocking

        minutes = training.recipe.checkpoints.minutes
        steering = Steering(
            training,
            self._notice,
            save=save,
            write=journal.write,
            interval=None if minutes == "auto" else minutes * 60,
            upload_seconds=lambda: self._upload_seconds,
            has_to_land=lambda: self._has_to_land(training),
        )
        training.run(steering)
        if training.progress.finished:
            return None
        if not self._notice.given:
            return self._delivery(record, loaded, claim, journal, uploads).land(
                self._ceiling.why if self._ceiling else "", self._more_budget()
            )
        return self._answer_notice(training.progress.step, uploads)

    def _answer_notice(self, step: int, uploads: spool.Spool) -> Ending:
        """Save everything within the grace, before a word; then say what became of it."""
        saved = uploads.flush(self._grace.time_to_save())
        seconds = round(time.monotonic() - self._notice.at, 2)
        self._notice.answer()
        get_logger().info(
            "notice.answered",
            reason=self._notice.reason,
            committed=saved,
            step=step,
            notice_to_commit_seconds=seconds,
        )
        if saved:
            how = "everything is committed"
        elif uploads.sealed:
            how = "the last checkpoint is on the local disk only"
        else:
            how = f"what was done since the last checkpoint could not be saved: {uploads.trouble}"
        return Ending(Outcome.PREEMPTED, f"stopped by {self._notice.reason} at step {step}; {how}", step=step)

    def _note_commit(self, commit: spool.Commit, journal: Journal) -> None:
        self._upload_seconds = commit.seconds
        if self._ceiling is not None:
            self._ceiling.note_save(commit.seconds)
        journal.write(
            Committed(
                at=now(),
                checkpoint=str(commit.name),
                step=commit.name.step,
                size=commit.size,
                blocking_seconds=commit.blocking_seconds,
                seconds=commit.seconds,
            )
        )

    def _delivery(
        self, record: RunRecord, loaded: Loaded, claim: AttemptClaim, journal: Journal, uploads: spool.Spool
    ) -> Delivery:
        return Delivery(
            store=self._store,
            layout=self._layout,
            record=record,
            loaded=loaded,
            claim=claim,
            environ=self._environ,
            journal=journal,
            uploads=uploads,
            insist=self._insist,
            time_to_save=self._grace.time_to_save,
        )
