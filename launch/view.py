"""What a person is told of a run: a value, computed from its records and its backend's word by pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from pydantic import AwareDatetime

from job.contract.budget import Budget
from job.contract.history import last_sign_of_life, phase_of, summarise_attempts
from job.contract.layout import RunLayout
from job.contract.ledger import Ledger, ledger_of
from job.contract.metrics import Committed, Evaluated, MetricLine, Restored, Step
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import AdapterManifest, AttemptClaim, AttemptEnd, AttemptSummary, Part, RunRecord
from job.contract.status import BackendState, Status, derive_status
from job.contract.submission import Submission
from launch.backend import Described

RECENT_STEPS: Final = 20
"""Steps that the speed is measured over: long enough to be steady, short enough to notice a change."""
AUTO_COMMIT_IS_OLD_SECONDS: Final = 30 * 60.0
"""With checkpoints.minutes "auto", an age of the last commit that deserves a warning."""


class Commit(Part):
    """The newest restorable checkpoint."""

    checkpoint: str
    step: int
    at: AwareDatetime
    age_seconds: float
    is_old: bool
    """Whether it is so old, in a run that trains, that something is wrong with committing."""


class Left(Part):
    """What still lives of a run that is over, by whom that was asked."""

    names: tuple[str, ...]
    asked: tuple[str, ...]
    not_asked: tuple[str, ...] = ()
    """Who could not be asked, and why."""


class RunView(Part):
    """One run. Numbers are None as long as nobody knows them."""

    run_id: str
    status: Status
    bucket: str
    created_at: AwareDatetime | None = None
    base_model: str | None = None
    base_revision: str | None = None
    adapter: str | None = None
    """Uri of the folder that holds the adapter's files."""
    attempts: tuple[AttemptSummary, ...] = ()
    phase: str | None = None
    """What the live attempt is doing."""
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    """Of the adapter once it is published, else of the newest evaluation; nats."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Share of the GPU's bf16 arithmetic, 0 to 1, over the same steps as the speed."""
    memory_bytes: int | None = None
    """Of the GPU, at the peak of those steps."""
    eta_seconds: float | None = None
    last_commit: Commit | None = None
    last_sign_of_life: AwareDatetime | None = None
    outcome: Outcome | None = None
    """How the newest attempt ended, by its own word or else by its exit code."""
    message: str = ""
    hint: str = ""
    spent_usd: float | None = None
    """By all attempts; None where a price is unknown."""
    silent_usd: float = 0.0
    """What the live attempt's machine has cost since its last sign of life, if it still is ours."""
    budget: Budget = Budget()
    left: Left | None = None
    """What still lives of a run that is over; None while it goes on, and where nobody asked."""

    @property
    def is_overspent(self) -> bool:
        """Whether the run has cost its whole budget and goes on."""
        if self.budget.max_usd is None or self.spent_usd is None or self.status.is_over:
            return False
        return self.spent_usd + self.silent_usd >= self.budget.max_usd

    @property
    def attempt(self) -> int:
        """Number of the newest attempt; 0 before the first."""
        return self.attempts[-1].attempt if self.attempts else 0


@dataclass
class Facts:
    """Everything read about a run so far."""

    record: RunRecord
    claims: dict[int, AttemptClaim] = field(default_factory=dict)
    ends: dict[int, AttemptEnd] = field(default_factory=dict)
    lines: dict[int, list[MetricLine]] = field(default_factory=dict)
    adapter: AdapterManifest | None = None
    """The final one, or, without it, the last that landed."""
    submissions: dict[int, Submission] = field(default_factory=dict)
    stops: set[int] = field(default_factory=set)
    """Submissions that were asked to stop."""

    @property
    def budget(self) -> Budget:
        """What holds now: the last submission's."""
        newest = max(self.submissions, default=0)
        return self.submissions[newest].budget if newest else self.record.recipe.budget

    def ledger(self, *, running: int | None) -> Ledger:
        """What all attempts have cost, as far as the records tell."""
        return ledger_of(self.claims, self.ends, self.lines, self.submissions.values(), running=running)


def view_of(
    facts: Facts, described: Described, *, bucket: str, now: datetime, silent_seconds: float | None = None
) -> RunView:
    """The run as it is. `described` must have been asked before the records were read.

    Args:
        silent_seconds: since the last sign of life, where the reader heard it; else by the calendars, which may differ.
    """
    newest = max(facts.claims, default=0)
    end = facts.ends.get(newest)
    status = derive_status(
        # What an earlier attempt landed says nothing of how this one ended.
        published=facts.adapter is not None and (facts.adapter.complete or facts.adapter.attempt == newest),
        complete=facts.adapter is not None and facts.adapter.complete,
        attempts=len(facts.claims),
        last_end=end.outcome if end else None,
        backend=described.state,
        asked_to_stop=max(facts.submissions, default=0) in facts.stops,
    )
    may_live = described.state in (BackendState.ALIVE, BackendState.UNREACHABLE)
    running = newest if may_live and end is None else None
    own = facts.lines.get(newest, [])
    message, hint = _message(status, end, described, facts.record.run_id)
    sign = last_sign_of_life(own)
    alive = status is Status.RUNNING
    progress = _progress(facts.lines)
    ledger = facts.ledger(running=running)
    return RunView(
        run_id=facts.record.run_id,
        status=status,
        bucket=bucket,
        created_at=facts.record.created_at,
        base_model=facts.record.recipe.base_model.id,
        base_revision=facts.record.recipe.base_model.revision,
        adapter=_adapter_uri(facts, bucket),
        attempts=summarise_attempts(facts.claims.values(), facts.ends, facts.lines, running=running),
        phase=phase_of(own) if alive else None,
        epoch=progress.epoch,
        epochs=facts.record.recipe.training.epochs,
        step=facts.adapter.step if facts.adapter and facts.adapter.complete else progress.step,
        total_steps=progress.total_steps,
        loss=progress.loss,
        held_out_loss=facts.adapter.held_out_loss if facts.adapter else progress.held_out_loss,
        tokens_per_second=progress.tokens_per_second if alive else None,
        mfu=progress.mfu if alive else None,
        memory_bytes=progress.memory_bytes if alive else None,
        eta_seconds=progress.eta_seconds if alive else None,
        last_commit=_last_commit(facts, running, now),
        last_sign_of_life=sign.at if sign else None,
        outcome=end.outcome if end else _outcome_of(described),
        message=message,
        hint=hint,
        spent_usd=ledger.usd if facts.submissions else None,
        silent_usd=_silent_usd(ledger, running, sign.at if sign else None, now, silent_seconds),
        budget=facts.budget,
    )


def _silent_usd(
    ledger: Ledger, running: int | None, sign: datetime | None, now: datetime, seconds: float | None
) -> float:
    charge = next((each for each in ledger.charges if each.attempt == running), None)
    if charge is None or charge.usd_per_hour is None:
        return 0.0
    if seconds is None:
        seconds = max((now - (sign or charge.started_at)).total_seconds(), 0.0)
    return seconds / 3600 * charge.usd_per_hour


def exit_code_of(view: RunView) -> int:
    """What a launcher that watched a run to this point exits with."""
    match view.status:
        case Status.SUCCEEDED:
            return EXIT_CODES[Outcome.DONE]
        case Status.OUT_OF_BUDGET:
            return EXIT_CODES[Outcome.OUT_OF_BUDGET]
        case Status.FAILED:
            return EXIT_CODES[Outcome.BAD_INPUT if view.outcome is Outcome.BAD_INPUT else Outcome.FAILED]
        case _:  # cancelled, interrupted, or left while it goes on: not over
            return EXIT_CODES[Outcome.PREEMPTED]


@dataclass(frozen=True)
class _Progress:
    epoch: float | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    eta_seconds: float | None = None


def _progress(lines: Mapping[int, Sequence[MetricLine]]) -> _Progress:
    everything = [line for attempt in sorted(lines) for line in lines[attempt]]
    began = next((line for line in reversed(everything) if isinstance(line, Restored)), None)
    # A new attempt begins behind the one before it: what is true now is what the newest that said something says.
    own = next(
        (lines[a] for a in sorted(lines, reverse=True) if any(isinstance(x, Restored | Step) for x in lines[a])), ()
    )
    steps = [line for line in own if isinstance(line, Step)]
    last = steps[-1] if steps else None
    step = last.step if last else began.step if began else None
    reached = next(
        (x for x in reversed(everything) if isinstance(x, Step) and step is not None and x.step <= step), None
    )
    evaluated = [x for x in everything if isinstance(x, Evaluated) and (step is None or x.step <= step)]
    recent = steps[-RECENT_STEPS:]
    seconds = sum(line.seconds for line in recent)
    total = began.total_steps if began else None
    return _Progress(
        epoch=reached.epoch if reached else 0.0 if step == 0 else None,
        step=step,
        total_steps=total,
        loss=reached.loss if reached else None,
        held_out_loss=evaluated[-1].held_out_loss if evaluated else None,
        tokens_per_second=sum(line.tokens for line in recent) / seconds if seconds > 0 else None,
        mfu=_mfu(recent),
        memory_bytes=max((line.memory_bytes for line in recent if line.memory_bytes is not None), default=None),
        eta_seconds=(total - step) * seconds / len(recent)
        if recent and total is not None and step is not None
        else None,
    )


def _mfu(steps: Sequence[Step]) -> float | None:
    known = [(line.mfu, line.seconds) for line in steps if line.mfu is not None]
    seconds = sum(each for _, each in known)
    return sum(mfu * each for mfu, each in known) / seconds if seconds > 0 else None


def _last_commit(facts: Facts, running: int | None, now: datetime) -> Commit | None:
    # By the order of the records: calendars differ from machine to machine, and are set back.
    commits = [line for attempt in sorted(facts.lines) for line in facts.lines[attempt] if isinstance(line, Committed)]
    if not commits:
        return None
    newest = commits[-1]
    age = max((now - newest.at).total_seconds(), 0.0)
    # What an attempt has not yet lived it cannot have committed.
    lived = (now - facts.claims[running].claimed_at).total_seconds() if running in facts.claims else 0.0
    minutes = facts.record.recipe.checkpoints.minutes
    bound = AUTO_COMMIT_IS_OLD_SECONDS if minutes == "auto" else 2 * 60 * minutes + 60
    return Commit(
        checkpoint=newest.checkpoint, step=newest.step, at=newest.at, age_seconds=age, is_old=min(age, lived) > bound
    )


def _adapter_uri(facts: Facts, bucket: str) -> str | None:
    if facts.adapter is None:
        return None
    layout = RunLayout(facts.record.run_id)
    return f"{bucket}/{layout.adapter_files(facts.adapter.attempt).rstrip('/')}"


def _outcome_of(described: Described) -> Outcome | None:
    if described.state is not BackendState.FAILED:
        return None
    return Outcome.BAD_INPUT if described.exit_code == EXIT_CODES[Outcome.BAD_INPUT] else Outcome.FAILED


def _message(status: Status, end: AttemptEnd | None, described: Described, run_id: str) -> tuple[str, str]:
    """What to say about the status, and what to try next."""
    again = f"`ftjob launch --run {run_id}` goes on from the last commit"
    said, advice = (end.message, end.hint) if end else ("", "")
    match status:
        case Status.SUCCEEDED:
            return "", f"`ftjob fetch {run_id}` brings the adapter here"
        case Status.FAILED:
            why = said or described.detail or "the job failed without a word"
            return why, advice or f"`ftjob logs {run_id}` has the rest; `ftjob launch --run {run_id}` tries again"
        case Status.OUT_OF_BUDGET:
            return said or described.detail, advice or again
        case Status.CANCELLED:
            return "stopped on request", again
        case Status.INTERRUPTED:
            return "; ".join(part for part in (said, described.detail) if part) or "nothing runs any more", again
        case Status.UNKNOWN:
            return described.detail or "its backend could not be asked", ""
        case Status.PENDING | Status.RUNNING | Status.RECOVERING:
            return described.detail, ""
