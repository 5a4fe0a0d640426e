"""What `ftjob check` found: the problems of a dataset, and the numbers of what would be trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from job.contract.records import DatasetDigest, Part, Sha256

Severity = Literal["error", "warning", "notice"]
"""An error refuses the launch; a warning says what it will do to the model; a notice, what was done with the rows."""


class Problem(Part):
    """One thing that is wrong, or worth knowing, with one line or with a whole file."""

    code: str
    """Kebab case, one for each kind: "role-unknown"."""
    severity: Severity
    file: str
    """As the recipe names it; empty where it is about the base model or the recipe."""
    line: int | None = None
    """From 1; None where it is about the whole."""
    message: str
    """What and why, without file and line."""
    hint: str = ""

    @property
    def text(self) -> str:
        """File, line and message in one."""
        where = f"{self.file} line {self.line}: " if self.line is not None else f"{self.file}: " if self.file else ""
        return where + self.message


class FileCheck(Part):
    """One file, every line of it accounted for: lines = blank + rows + bad."""

    digest: DatasetDigest
    """Of the very bytes that were checked; the run is held to it."""
    lines: int = Field(ge=0)
    blank: int = Field(ge=0)
    rows: int = Field(ge=0)
    """Lines that are rows without an error."""
    bad: int = Field(ge=0)
    """Lines with an error."""


class Lengths(Part):
    """How long rows are, in tokens: `counts[i]` of them are longer than `edges[i]` and up to `edges[i + 1]`."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    shortest: int
    median: int
    p95: int
    longest: int


class Supervision(Part):
    """What the base model's own tokenizer and chat template make of the rows."""

    rows: int
    held_out_rows: int
    tokens: int
    """Of an epoch's rows, after cutting to max_length; held-out rows excluded, as in the next ones."""
    trained_tokens: int
    """Of these, those that carry a loss."""
    cut_rows: int
    lengths: Lengths
    """Before cutting."""
    sequences: int
    """Rows, or what packing makes of them."""
    fill: float
    """Tokens over the room that the sequences have: packing's efficiency, or 1 - padding."""
    steps_per_epoch: int
    stop_tokens: tuple[str, ...]
    """The texts of the tokens that end a turn, and are trained."""
    masked_by: str
    """How it is known what the assistant says."""
    tokens_sha256: Sha256
    """Over every token and label: the run's passport has the same one, or the job refuses."""


class Check(Part):
    """The whole answer."""

    train: FileCheck
    held_out: FileCheck | None
    problems: tuple[Problem, ...]
    """The first of each kind, in order of severity, then file and line."""
    counts: dict[str, int]
    """Of each kind, by code: also those that are not listed."""
    supervision: Supervision | None
    not_checked: str = ""
    """Why there is no supervision: no tokenizer here, or errors that come first."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def times(self, code: str) -> int:
        """How often there is a problem of this kind. One of a whole file is one, however many rows it is about."""
        listed = [problem for problem in self.problems if problem.code == code]
        if all(problem.line is None for problem in listed):
            return len(listed)
        return max(self.counts.get(code, 0), len(listed))
