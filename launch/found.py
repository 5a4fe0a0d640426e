"""Problems from everywhere, gathered: the files, the base model, and what its template makes of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from job.contract.check import Problem, Severity
from job.dataset.examine import Examination

_ORDER: Final[tuple[Severity, ...]] = ("error", "warning", "notice")


class Found:
    """What was found until now; begins with what examinations found."""

    def __init__(self, seen: Iterable[Examination]) -> None:
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        for each in seen:
            self.add(each.problems, each.counts)

    def add(self, problems: Iterable[Problem], counts: Mapping[str, int] | None = None) -> None:
        """Take more.

        Args:
            counts: of each kind, listed or not; None where all are listed.
        """
        problems = list(problems)
        self.problems += problems
        self.counts.update(counts if counts is not None else Counter(problem.code for problem in problems))

    @property
    def has_errors(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)

    @property
    def in_order(self) -> tuple[Problem, ...]:
        """By severity; then as they came, file by file; the lines of a file in their order."""
        files = list(dict.fromkeys(problem.file for problem in self.problems))
        return tuple(sorted(self.problems, key=lambda p: (_ORDER.index(p.severity), files.index(p.file), p.line or 0)))
