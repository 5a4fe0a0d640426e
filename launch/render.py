"""Answers as text: tables and lines for people, one line of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Final

from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from job.contract.recipe import TINY_MODEL
from job.contract.records import utc
from job.contract.status import Status
from job.dataset.source import local_path
from job.logs import mask
from launch.fetch import Fetched
from launch.view import Commit, Left, RunView

COLOURS: Final = {
    Status.PENDING: "cyan",
    Status.RUNNING: "green",
    Status.RECOVERING: "yellow",
    Status.SUCCEEDED: "bold green",
    Status.OUT_OF_BUDGET: "yellow",
    Status.FAILED: "bold red",
    Status.CANCELLED: "yellow",
    Status.INTERRUPTED: "yellow",
    Status.UNKNOWN: "magenta",
}


def as_json(value: BaseModel | Sequence[BaseModel]) -> str:
    """A model, or a list of them, as one line."""
    # Not json.dumps: a loss may be NaN, which JSON has not.
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return f"[{', '.join(item.model_dump_json() for item in value)}]"


def duration(seconds: float) -> str:
    """0:42, 12:05, 3:12:05."""
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def view_text(view: RunView) -> Text:
    """Everything about a run, a fact a line."""
    text = Text()
    text.append(f"{view.run_id}  ")
    text.append(view.status.value, style=COLOURS[view.status])
    rows = [
        ("", view.message),
        ("hint", view.hint),
        ("progress", progress_line(view)),
        ("last commit", commit_line(view.last_commit) if view.last_commit else "none yet"),
        ("bucket", view.bucket),
        ("spent", _spent(view)),
        ("adapter", view.adapter or "none yet"),
    ]
    for name, value in rows:
        if value:
            text.append(f"\n  {name:<12}{value}" if name else f"\n  {value}")
    for attempt in view.attempts:
        repeated = f", {attempt.steps_repeated} repeated" if attempt.steps_repeated else ""
        ended = f" to {utc(attempt.ended_at)}" if attempt.ended_at else ""
        where = f" on {attempt.hardware.name}" if attempt.hardware else ""
        text.append(
            f"\n  attempt {attempt.attempt:<4}{attempt.ended}: steps {attempt.restored_step} to {attempt.last_step}"
            f"{repeated}; {utc(attempt.started_at)}{ended}{where}"
        )
    return text


def _spent(view: RunView) -> str:
    """Dollars, where anybody knows a price."""
    if view.spent_usd is None:
        return ""
    ceiling = f" of ${view.budget.max_usd:,.2f}" if view.budget.max_usd is not None else ""
    return f"${view.spent_usd:,.2f}{ceiling}"


def left_text(left: Left) -> str:
    """What still costs money, and who said so."""
    lines = [f"\n  {'left':<12}{len(left.names)} left"]
    lines[0] += f" (asked {', '.join(left.asked)})" if left.asked else ": nobody could be asked"
    lines += [f"\n  {'':<12}{name}" for name in left.names]
    lines += [f"\n  {'':<12}not asked: {why}" for why in left.not_asked]
    return "".join(lines)


def progress_line(view: RunView) -> str:
    """Epoch, step, losses, speed, memory, time left: whatever of it is known."""
    parts = [
        f"attempt {view.attempt}" if view.attempt > 1 else None,
        view.phase,
        f"epoch {view.epoch:.2f}/{view.epochs}" if view.epoch is not None else None,
        f"step {view.step}/{view.total_steps or '?'}" if view.step is not None else None,
        f"loss {view.loss:.4f}" if view.loss is not None else None,
        f"held-out {view.held_out_loss:.4f}" if view.held_out_loss is not None else None,
        f"{view.tokens_per_second:,.0f} tokens/s" if view.tokens_per_second is not None else None,
        f"MFU {view.mfu:.0%}" if view.mfu is not None else None,
        f"{view.memory_bytes / 2**30:.1f} GiB" if view.memory_bytes is not None else None,
        f"ETA {duration(view.eta_seconds)}" if view.eta_seconds is not None else None,
    ]
    return " · ".join(part for part in parts if part)


def commit_line(commit: Commit) -> str:
    """Which step the last commit is of, its age, and whether that is alarming."""
    warning = " - old: is the bucket out of reach?" if commit.is_old else ""
    return f"step {commit.step}, {duration(commit.age_seconds)} ago{warning}"


def list_table(views: Sequence[RunView]) -> Table:
    """One line a run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("RUN", "STATUS", "CREATED (UTC)", "ATTEMPTS"):
        table.add_column(column, no_wrap=True)
    for column in ("MODEL", "BUCKET"):
        table.add_column(column, overflow="fold")
    for view in views:
        table.add_row(
            Text(view.run_id),
            Text(view.status.value, style=COLOURS[view.status]),
            f"{view.created_at.astimezone(UTC):%Y-%m-%d %H:%M}" if view.created_at else "",
            str(len(view.attempts)),
            Text(view.base_model or ""),
            Text(view.bucket),
        )
    return table


def summary_text(view: RunView) -> Text:
    """How a run that was watched ended, and what to do with it."""
    text = view_text(view)
    folder = local_path(view.adapter) if view.adapter else None
    if folder is not None and view.base_model:
        text.append(f"\n\n{load_text(folder, view.base_model, view.base_revision)}")
    return text


def fetched_text(fetched: Fetched) -> str:
    """What was brought here, and how to use it."""
    size = sum(digest.size for digest in fetched.files.values())
    landed = "" if fetched.complete else "\nIt is the best of a run that its budget ended early, not the final one."
    return (
        f"{fetched.folder}: {len(fetched.files)} files, {size:,} bytes, every digest verified{landed}\n\n"
        f"{load_text(Path(fetched.folder), fetched.base_model, fetched.base_revision)}"
    )


def load_text(folder: Path, base_model: str, revision: str | None) -> str:
    """How to load an adapter on the very base model that it was trained on."""
    made, at = "", f", revision={revision!r}" if revision else ""
    if base_model == TINY_MODEL:
        made = "  write_tiny_model(Path('tiny'))  # from job.tiny\n"
        base_model = "tiny"
    elif base_model.startswith("s3://"):
        made = f"  # first: aws s3 cp --recursive {base_model} base\n"
        base_model = "base"
    return (
        f"load it with\n{made}"
        f"  model = AutoModelForCausalLM.from_pretrained({base_model!r}{at})\n"
        f"  model = PeftModel.from_pretrained(model, {str(folder)!r})"
    )


def log_line(line: str) -> str:
    """A line of a log for people; what is not JSON, a traceback say, stays as it is. Secrets are masked."""
    try:
        event = json.loads(line)
    except ValueError:
        return str(mask(line))
    if not isinstance(event, dict) or "event" not in event:
        return str(mask(line))
    told = {key: value for key, value in event.items() if key not in ("at", "event", "level", "run_id")}
    rest = " ".join(f"{k}={v if isinstance(v, str | int | float) else json.dumps(v)}" for k, v in mask(told).items())
    return f"{str(event.get('at', ''))[:19]} {event.get('level', ''):<7} {mask(event['event'])} {rest}".rstrip()
