"""What is stored: JSON with a schema_version. Frozen and closed; times are UTC, sizes bytes, digests sha256 hex."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from job.contract.errors import Damaged
from job.contract.layout import CheckpointName, is_key
from job.contract.outcome import Outcome
from job.contract.recipe import Recipe

SCHEMA_VERSION: Final = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(name: str) -> str:
    if not is_key(name):
        raise ValueError(f"{name!r} does not stay inside its folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""Of a file below a checkpoint or adapter. Files are written under names that a bucket told, so none may leave."""


class Part(BaseModel):
    """A frozen, closed value."""

    # JSON has no NaN; as a text it comes back as what it was, where null would be damage.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Record(Part):
    """A value with a place of its own in the bucket."""

    schema_version: Literal[1] = 1

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Self:
        """The record in these bytes; `name` is what errors call it.

        Raises:
            Damaged: the bytes are not such a record.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            version = _schema_version(data)
            if version > SCHEMA_VERSION:
                raise Damaged(
                    f"{name} was written by a newer ftjob: schema_version {version}, and this one reads "
                    f"{SCHEMA_VERSION}",
                    hint="upgrade ftjob",
                ) from error
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise Damaged(
                f"{name} is not a readable {cls.__name__}: {where + ': ' if where else ''}{first['msg']}",
                hint="it was cut short, changed, or written by another version of ftjob",
            ) from error


def _schema_version(data: bytes) -> int:
    """What the bytes say of themselves; 0 when they say nothing."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return 0
    version = found.get("schema_version") if isinstance(found, dict) else None
    return version if isinstance(version, int) else 0


class FileDigest(Part):
    """One file: its size in bytes and its sha256."""

    size: int = Field(ge=0)
    sha256: Sha256


class DatasetDigest(Part):
    """A JSONL file as it was at launch. A resume on other bytes is refused."""

    uri: str
    sha256: Sha256
    size: int = Field(ge=0)
    rows: int = Field(ge=0)


class Hardware(Part):
    """What an attempt ran on."""

    device: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int = Field(ge=0)
    count: int = Field(ge=1)

    def computes_unlike(self, other: Hardware) -> bool:
        """Whether sums may round differently there. How much memory there is changes no bit."""
        return (self.device, self.name, self.count) != (other.device, other.name, other.count)


class RunRecord(Record):
    """recipe.json: the run. Written by the launcher before anything is started."""

    run_id: str
    created_at: AwareDatetime
    recipe: Recipe
    recipe_digest: Sha256
    train: DatasetDigest
    held_out: DatasetDigest | None
    tokens_sha256: Sha256 | None = None
    """Of what the launcher's check rendered, and the job has to render too; None where it could not render."""
    ftjob: str


class Versions(Part):
    """What computed. Another value of any of these may change bits, so a resume names it and refuses."""

    python: str
    torch: str
    transformers: str
    peft: str
    bitsandbytes: str
    trl: str
    accelerate: str
    datasets: str
    tokenizers: str
    numpy: str
    ftjob: str


class Identity(Part):
    """All that decides the bits of a run. Equal identities, equal adapters.

    `hardware` is compared too, but a difference is a warning: a spot run may move to another GPU model, and is then
    the same run statistically, not bit for bit.
    """

    recipe: Sha256
    train: Sha256
    held_out: Sha256 | None
    tokens: Sha256
    base_model: Sha256
    world_size: int = Field(ge=1)
    threads: int = Field(ge=1)
    versions: Versions
    hardware: Hardware


class AttemptClaim(Record):
    """attempts/0001.json: one life of the job begins. Create-only: of two racers one gets the number."""

    attempt: int = Field(ge=1)
    nonce: str
    claimed_at: AwareDatetime
    pid: int
    host: str
    infra: dict[str, str]
    submission: int = Field(ge=0)
    """Which submission started it; 0 when none is on record."""
    machine_id: str
    """Equal for attempts on one machine (or rented container) in one life of it; empty when it cannot be told."""
    up_seconds: float = Field(ge=0)
    """For how long that machine had been up at the claim."""
    heartbeat_seconds: float = Field(gt=0)
    """Longest silence of this attempt while it lives."""


class AttemptEnd(Record):
    """attempts/0001.end.json: how it ended, by its own word. A killed attempt has none."""

    attempt: int = Field(ge=1)
    nonce: str
    ended_at: AwareDatetime
    outcome: Outcome
    step: int = Field(ge=0)
    message: str
    hint: str = ""
    elapsed: float = Field(ge=0)
    """Seconds since the claim, by a clock that only goes forward."""


class CheckpointManifest(Record):
    """checkpoints/step-….json: every file with its digest. Its existence is the commit."""

    step: int = Field(ge=0)
    attempt: int = Field(ge=1)
    epoch: float = Field(ge=0)
    reason: Literal["epoch", "interval", "notice", "budget"]
    created_at: AwareDatetime
    finished: bool
    held_out_loss: float | None
    identity: Identity
    files: dict[FileName, FileDigest]

    @property
    def name(self) -> CheckpointName:
        return CheckpointName(step=self.step, attempt=self.attempt)


class AdapterManifest(Record):
    """adapter.json: the published adapter. Create-only: of two overlapping attempts one publishes."""

    attempt: int = Field(ge=1)
    complete: bool
    created_at: AwareDatetime
    step: int = Field(ge=0)
    epoch: float = Field(ge=0)
    held_out_loss: float | None
    files: dict[FileName, FileDigest]


class StepLoss(Part):
    """The training loss of one optimizer step: mean over its trained tokens, in nats."""

    step: int
    epoch: float
    loss: float


class EpochResult(Part):
    """What an epoch ended with."""

    epoch: int
    step: int
    held_out_loss: float | None


class AttemptSummary(Part):
    """One life of the job, as far as its records tell."""

    attempt: int
    started_at: AwareDatetime
    ended_at: AwareDatetime | None
    """By its own word; for a killed attempt the last sign of life."""
    ended: str
    """An outcome; "killed" when it never said; "running" while it may be."""
    restored_step: int
    last_step: int
    steps_done: int
    steps_repeated: int
    hardware: Hardware | None
    """None for an attempt that ended before it began to train."""


def utc(moment: datetime) -> str:
    """ISO 8601 in UTC, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")
