"""The lines of metrics/*.jsonl: what happened, in the order it happened. Also the heartbeat of an attempt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from job.contract.errors import Damaged
from job.contract.records import Hardware


class Line(BaseModel):
    """One event; `at` is UTC by the clock of the machine that wrote it."""

    # JSON has no NaN, and the loss that broke a run is the one to read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    at: AwareDatetime
    elapsed: float = 0.0
    """Seconds since the attempt's claim, by a clock that only goes forward. The journal fills it in."""


class Heartbeat(Line):
    """Alive, and in which phase."""

    event: Literal["heartbeat"] = "heartbeat"
    phase: str


class Restored(Line):
    """Where the attempt began: at a checkpoint, or at step 0."""

    event: Literal["restored"] = "restored"
    step: int
    checkpoint: str | None
    total_steps: int
    epochs: int
    train_rows: int
    hardware: Hardware


class Step(Line):
    """One optimizer step."""

    event: Literal["step"] = "step"
    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Tokens through the model in this step, padding excluded."""
    seconds: float
    rows: tuple[int, ...]
    """Line numbers of the dataset rows trained on: the sample ledger."""
    mfu: float | None = None
    """Share of the GPU's bf16 arithmetic that the model used, 0 to 1; None where either is unknown."""
    memory_bytes: int | None = None
    """Of the GPU, at the step's peak; None without one."""


class Evaluated(Line):
    """The held-out rows were evaluated."""

    event: Literal["evaluated"] = "evaluated"
    step: int
    epoch: int
    held_out_loss: float


class Committed(Line):
    """A checkpoint became restorable."""

    event: Literal["committed"] = "committed"
    checkpoint: str
    step: int
    size: int
    blocking_seconds: float
    """For how long the training stood still for it."""
    seconds: float
    """From the decision to save until the commit."""


class Published(Line):
    """The adapter was published."""

    event: Literal["published"] = "published"
    step: int


MetricLine = Annotated[Heartbeat | Restored | Step | Evaluated | Committed | Published, Field(discriminator="event")]

_LINE: TypeAdapter[MetricLine] = TypeAdapter(MetricLine)


def dump_lines(lines: list[MetricLine]) -> bytes:
    """The lines as JSONL."""
    return b"".join(line.model_dump_json().encode() + b"\n" for line in lines)


def parse_lines(data: bytes, *, name: str) -> list[MetricLine]:
    """The lines of one metrics object; `name` is what errors call it.

    Raises:
        Damaged: a line is not one of ours.
    """
    lines: list[MetricLine] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lines.append(_LINE.validate_json(line))
        except ValidationError as error:
            raise Damaged(f"{name} line {number} is not a metric: {error.errors()[0]['msg']}") from error
    return lines
