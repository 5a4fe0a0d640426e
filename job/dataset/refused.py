"""A row that cannot be trained, without its file and line."""

from __future__ import annotations

from job.contract.errors import FtjobError


class RowRefused(FtjobError):
    """A row cannot be trained with this template and tokenizer; whoever knows the file adds it, and the line.

    Args:
        code: the kind of problem, as in job.contract.check.Problem.
    """

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
