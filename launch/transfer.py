"""The progress bar of a transfer: in a terminal, and gone when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from job.storage import Progress


@contextmanager
def transfer_bar(text: str, size: int) -> Iterator[Progress]:
    """A bar on stderr that fills up as its value is called with counts of bytes.

    Args:
        size: bytes in all.
    """
    console = Console(stderr=True)
    columns = (*Bar.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(text, total=size)
        yield lambda count: bar.advance(task, count)
