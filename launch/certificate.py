"""The resume certificate: whether a run that was killed is the run that was not. Pure comparison of their records."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.contract.history import effective_steps
from job.contract.metrics import Evaluated, MetricLine, Restored, Step
from job.contract.records import FileDigest, Part

_NAMED = 5
"""Differences that are spelled out; the rest is counted."""


@dataclass(frozen=True)
class Evidence:
    """What a finished run left: its metric lines in the order written, by attempt, and its adapter's files."""

    lines: Sequence[tuple[int, MetricLine]]
    adapter: Mapping[str, FileDigest]


class Check(Part):
    """One claim of the certificate, and what was found."""

    claim: str
    holds: bool
    found: str


class Certificate(Part):
    """All claims. Clean when every one holds."""

    checks: tuple[Check, ...]

    @property
    def clean(self) -> bool:
        return all(check.holds for check in self.checks)


def certify(untouched: Evidence, killed: Evidence) -> Certificate:
    """Compare the two runs of one recipe."""
    return Certificate(
        checks=(
            _rows_once(killed),
            _repeats_equal(killed),
            *_same_numbers(untouched, killed),
            *_same_files(untouched, killed),
        )
    )


def _steps(evidence: Evidence) -> dict[int, Step]:
    lines: dict[int, list[MetricLine]] = defaultdict(list)
    for attempt, line in evidence.lines:
        lines[attempt].append(line)
    return effective_steps(lines)


def _rows_once(killed: Evidence) -> Check:
    claim = "each row was trained exactly once an epoch"
    restored = next((line for _, line in killed.lines if isinstance(line, Restored)), None)
    steps = _steps(killed)
    if restored is None or not steps:
        return Check(claim=claim, holds=False, found="the run has no steps on record")
    per_epoch = restored.total_steps // restored.epochs
    missing = [number for number in range(1, max(steps) + 1) if number not in steps]
    faults = [f"step {number} is missing" for number in missing]
    epochs, left = divmod(max(steps), per_epoch)
    if left:
        faults.append(f"{left} steps beyond the last whole epoch")
    for epoch in range(epochs):
        numbers = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        counts = Counter(row for number in numbers if number in steps for row in steps[number].rows)
        wrong = sum(count != 1 for count in counts.values())
        if wrong or len(counts) != restored.train_rows:
            faults.append(f"epoch {epoch + 1}: {len(counts)} of {restored.train_rows} rows, {wrong} more than once")
    return Check(claim=claim, holds=not faults, found=_text(faults) or f"{restored.train_rows} rows x {epochs} epochs")


def _computed(line: Step) -> tuple[object, ...]:
    return line.epoch, line.loss, line.grad_norm, line.learning_rate, line.tokens, line.rows


def _repeats_equal(killed: Evidence) -> Check:
    seen: dict[int, Step] = {}
    evaluated: dict[int, Evaluated] = {}
    repeated, faults = 0, []
    for _, line in killed.lines:
        if isinstance(line, Step):
            first = seen.setdefault(line.step, line)
            repeated += first is not line
            if _computed(first) != _computed(line):
                faults.append(f"step {line.step}: loss {first.loss!r}, then {line.loss!r}")
        elif isinstance(line, Evaluated):
            before = evaluated.setdefault(line.step, line)
            if before.held_out_loss != line.held_out_loss:
                faults.append(f"step {line.step}: held-out loss {before.held_out_loss!r}, then {line.held_out_loss!r}")
    return Check(
        claim="repeated steps were repeated exactly", holds=not faults, found=_text(faults) or f"{repeated} steps"
    )


def _same_numbers(untouched: Evidence, killed: Evidence) -> list[Check]:
    ours, theirs = _steps(killed), _steps(untouched)
    losses = [
        f"step {step}: {_loss(theirs, step)} untouched, {_loss(ours, step)} killed"
        for step in sorted(ours.keys() | theirs.keys())
        if step not in ours or step not in theirs or _computed(ours[step]) != _computed(theirs[step])
    ]
    left, right = (
        {(line.epoch, line.step): line.held_out_loss for _, line in evidence.lines if isinstance(line, Evaluated)}
        for evidence in (untouched, killed)
    )
    held_out = [
        f"epoch {epoch}, step {step}: {left.get((epoch, step), 'missing')} untouched, "
        f"{right.get((epoch, step), 'missing')} killed"
        for epoch, step in sorted(left.keys() | right.keys())
        if left.get((epoch, step)) != right.get((epoch, step))
    ]
    return [
        Check(claim="every training loss is equal", holds=not losses, found=_text(losses) or f"{len(ours)} steps"),
        Check(
            claim="every held-out loss is equal",
            holds=not held_out,
            found=_text(held_out) or f"{len(left)} evaluations",
        ),
    ]


def _same_files(untouched: Evidence, killed: Evidence) -> list[Check]:
    checks = []
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = killed.adapter.get(name), untouched.adapter.get(name)
        holds = ours is not None and ours == theirs
        found = f"sha256 {ours.sha256}" if holds and ours else f"{_sha(theirs)} untouched, {_sha(ours)} killed"
        checks.append(Check(claim=f"{name} is equal, byte for byte", holds=holds, found=found))
    return checks


def _loss(steps: Mapping[int, Step], step: int) -> str:
    return repr(steps[step].loss) if step in steps else "missing"


def _sha(digest: FileDigest | None) -> str:
    return digest.sha256 if digest else "missing"


def _text(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return "; ".join(faults[:_NAMED]) + more
