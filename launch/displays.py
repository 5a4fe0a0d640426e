"""What is shown of a run while somebody stays with it: lines, or a picture in a terminal."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from job.contract.metrics import Committed, Evaluated, MetricLine, Published, Restored, Step
from job.contract.status import Status
from launch.render import COLOURS, commit_line, duration, progress_line
from launch.runs import Poll
from launch.view import RunView

STEP_LINE_SECONDS: Final = 2.0
"""Between two plain lines about steps: a log of a long run stays readable."""


class PlainDisplay:
    """Lines, one an event: for files, pipes and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._phase: str | None = None
        self._last_step_line = float("-inf")

    def show(self, poll: Poll) -> None:
        view = poll.view
        steps = [index for index, (_, line) in enumerate(poll.news) if isinstance(line, Step)]
        for index, (attempt, line) in enumerate(poll.news):
            if isinstance(line, Step):
                done = view.total_steps is not None and line.step >= view.total_steps
                # Of the steps of one look only the newest is told, and not too often; the last one always.
                if not done and (index != steps[-1] or time.monotonic() - self._last_step_line < STEP_LINE_SECONDS):
                    continue
                self._last_step_line = time.monotonic()
            if text := _news_line(attempt, line, view):
                self.say(text, at=line.at)
        if view.status is not self._status:
            self._status = view.status
            self.say(f"{view.status.value}{f': {view.message}' if view.message else ''}")

        if view.phase not in (None, self._phase):
            self._phase = view.phase
            self.say(f"attempt {view.attempt}: {view.phase}")

    def say(self, text: str, *, at: datetime | None = None) -> None:
        moment = (at or datetime.now(UTC)).strftime("%H:%M:%S")
        self._console.print(f"{moment} {text}", markup=False, highlight=False, soft_wrap=True)


def _news_line(attempt: int, line: MetricLine, view: RunView) -> str:
    match line:
        case Restored(checkpoint=None):
            return f"attempt {attempt}: starts at step 0 of {line.total_steps}"
        case Restored():
            return f"attempt {attempt}: goes on from {line.checkpoint} of {line.total_steps} steps"
        case Step():
            speed = f" · {line.tokens / line.seconds:,.0f} tokens/s" if line.seconds > 0 else ""
            mfu = f" · MFU {line.mfu:.0%}" if line.mfu is not None else ""
            memory = f" · {line.memory_bytes / 2**30:.1f} GiB" if line.memory_bytes is not None else ""
            eta = f" · ETA {duration(view.eta_seconds)}" if view.eta_seconds else ""
            return (
                f"epoch {line.epoch:.2f}/{view.epochs} · step {line.step}/{view.total_steps or '?'} · "
                f"loss {line.loss:.4f}{speed}{mfu}{memory}{eta}"
            )
        case Evaluated():
            return f"epoch {line.epoch} evaluated: held-out loss {line.held_out_loss:.4f}"
        case Committed():
            return f"committed {line.checkpoint} ({line.size:,} bytes; training waited {line.blocking_seconds:.2f} s)"
        case Published():
            return f"published the adapter of step {line.step}"
        case _:
            return ""


class LiveDisplay:
    """A picture that is redrawn, on a terminal; what happened, steps aside, stays above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, poll: Poll) -> None:
        for attempt, line in poll.news:
            if not isinstance(line, Step) and (text := _news_line(attempt, line, poll.view)):
                self._live.console.print(Text(f"{line.at:%H:%M:%S} {text}", style="dim"))
        self._live.update(live_picture(poll.view), refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(Text(text, style="yellow"))


def live_picture(view: RunView) -> Group:
    """The picture of a run that goes on."""
    head = Text(f"{view.run_id}  ")
    head.append(view.status.value, style=COLOURS[view.status])
    lines: list[Any] = [head]
    if view.total_steps and view.step is not None:
        bar = Table.grid()  # a bar by itself does not end its line
        bar.add_row(ProgressBar(total=view.total_steps, completed=view.step, width=60))
        lines.append(bar)
    lines.append(Text(progress_line(view)))
    if view.last_commit is not None:
        style = "bold yellow" if view.last_commit.is_old else ""
        lines.append(Text(f"last commit: {commit_line(view.last_commit)}", style=style))
    if view.message:
        lines.append(Text(view.message, style="yellow"))
    return Group(*lines)
