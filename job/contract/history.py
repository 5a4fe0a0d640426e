"""What all attempts of a run did together: pure arithmetic over their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from job.contract.metrics import Heartbeat, MetricLine, Restored, Step
from job.contract.records import AttemptClaim, AttemptEnd, AttemptSummary


def summarise_attempts(
    claims: Iterable[AttemptClaim],
    ends: Mapping[int, AttemptEnd],
    lines: Mapping[int, Sequence[MetricLine]],
    *,
    running: int | None = None,
) -> tuple[AttemptSummary, ...]:
    """Each attempt's part in the run, in order.

    Args:
        claims: the claims found; one an attempt.
        ends: the end records found, by attempt.
        lines: metric lines by attempt, in the order written; may be missing for an attempt killed early.
        running: the attempt that is still alive, if one is.

    A step is repeated when an earlier attempt had already done it and lost it with its process.
    """
    summaries: list[AttemptSummary] = []
    furthest = 0
    for claim in sorted(claims, key=lambda c: c.attempt):
        own = lines.get(claim.attempt, ())
        begun = next((line for line in own if isinstance(line, Restored)), None)
        restored = begun.step if begun else 0
        steps = [line.step for line in own if isinstance(line, Step)]
        last = max([restored, *steps])
        end = ends.get(claim.attempt)
        last_sign = max((line.at for line in own), default=claim.claimed_at)
        alive = end is None and claim.attempt == running
        summaries.append(
            AttemptSummary(
                attempt=claim.attempt,
                started_at=claim.claimed_at,
                ended_at=end.ended_at if end else None if alive else last_sign,
                ended=end.outcome.value if end else "running" if alive else "killed",
                restored_step=restored,
                last_step=last,
                steps_done=len(steps),
                steps_repeated=sum(1 for step in steps if step <= furthest),
                hardware=begun.hardware if begun else None,
            )
        )
        furthest = max(furthest, last)
    return tuple(summaries)


def effective_steps(lines: Mapping[int, Sequence[MetricLine]]) -> dict[int, Step]:
    """Each optimizer step once, in order, as the newest attempt that did it reports it.

    Exact resume makes the choice moot.
    """
    newest = {line.step: line for attempt in sorted(lines) for line in lines[attempt] if isinstance(line, Step)}
    return dict(sorted(newest.items()))


def last_sign_of_life(lines: Sequence[MetricLine]) -> MetricLine | None:
    """The newest line, a heartbeat included, by the clock that only goes forward: a calendar may have been set back;
    None when the attempt never wrote one."""
    return max(lines, key=lambda line: (line.elapsed, line.at), default=None)


def phase_of(lines: Sequence[MetricLine]) -> str:
    """What the attempt was doing at its last heartbeat."""
    return next((line.phase for line in reversed(lines) if isinstance(line, Heartbeat)), "starting")
