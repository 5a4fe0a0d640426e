"""What the passport says that no other record does: versions, commit, and the story of all attempts."""

from __future__ import annotations

import platform
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from job.contract.errors import Damaged
from job.contract.history import summarise_attempts
from job.contract.layout import RunLayout
from job.contract.ledger import ledger_of
from job.contract.metrics import MetricLine, parse_lines
from job.contract.receipt import Receipt, receipt_of
from job.contract.records import AttemptClaim, AttemptEnd, AttemptSummary, Versions
from job.contract.submission import Submission
from job.logs import get_logger
from job.storage import Store


def versions() -> Versions:
    """What computes here."""
    return Versions(
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        peft=version("peft"),
        bitsandbytes=version("bitsandbytes"),
        trl=version("trl"),
        accelerate=version("accelerate"),
        datasets=version("datasets"),
        tokenizers=version("tokenizers"),
        numpy=version("numpy"),
        ftjob=version("ftjob"),
    )


def ftjob_commit() -> str | None:
    """The commit of the checkout this code runs from; None when it runs from an installed package."""
    here = Path(__file__)
    try:
        # Tracked, and not only somewhere below: an environment often lies in the checkout of something else.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


@dataclass(frozen=True)
class Story:
    """The records of all attempts."""

    claims: dict[int, AttemptClaim]
    ends: dict[int, AttemptEnd]
    lines: dict[int, list[MetricLine]]
    submissions: dict[int, Submission]

    def receipt(self, *, running: int | None) -> Receipt:
        """What all attempts have cost."""
        found = ledger_of(self.claims, self.ends, self.lines, self.submissions.values(), running=running)
        newest = max(self.submissions, default=0)
        return receipt_of(found, max_usd=self.submissions[newest].budget.max_usd if newest else None)

    def attempts(self, *, running: int | None) -> tuple[AttemptSummary, ...]:
        return summarise_attempts(self.claims.values(), self.ends, self.lines, running=running)

    def is_exact(self, *, reproducible: bool) -> bool:
        """Whether the attempts that trained are together what one would have been, bit for bit: on one kind of
        hardware, which sums in one order (`reproducible`: a GPU does so when it is asked to)."""
        trained = [a.hardware for a in self.attempts(running=None) if a.hardware is not None and a.steps_done]
        one_kind = not any(hardware.computes_unlike(trained[0]) for hardware in trained)
        return len(trained) < 2 or (one_kind and (reproducible or trained[0].device == "cpu"))


def read_story(store: Store, layout: RunLayout) -> Story:
    """The records of all attempts of a run, without metrics that cannot be read. Raises StorageError, Damaged."""
    claims: dict[int, AttemptClaim] = {}
    ends: dict[int, AttemptEnd] = {}
    for info in store.list(layout.attempts):
        if (attempt := layout.claimed_attempt(info.key)) is not None:
            claims[attempt] = AttemptClaim.from_bytes(store.get(info.key), name=info.key)
        elif (attempt := layout.ended_attempt(info.key)) is not None:
            ends[attempt] = AttemptEnd.from_bytes(store.get(info.key), name=info.key)
    lines: dict[int, list[MetricLine]] = defaultdict(list)
    for info in store.list(layout.metrics):
        if (position := layout.metrics_position(info.key)) is not None:
            try:
                lines[position[0]] += parse_lines(store.get(info.key), name=info.key)
            except Damaged as error:
                # No weight depends on it, and each line tells the time since its claim: the bill lacks an interval at
                # most. That is no reason to give up the run.
                get_logger().warning("metrics.damaged", error=error.message)
    submissions = {
        number: Submission.from_bytes(store.get(info.key), name=info.key)
        for info in store.list(layout.submissions)
        if (number := layout.submitted(info.key)) is not None
    }
    return Story(claims, ends, dict(lines), submissions)
