"""passport.json, inside the adapter: everything that produced it."""

from __future__ import annotations

from pydantic import AwareDatetime

from job.contract.receipt import Receipt
from job.contract.recipe import Recipe
from job.contract.records import (
    AttemptSummary,
    DatasetDigest,
    EpochResult,
    FileDigest,
    FileName,
    Hardware,
    Part,
    Record,
    Sha256,
    StepLoss,
    Versions,
)


class Chosen(Part):
    """Which state became the adapter, and why."""

    step: int
    epoch: float
    held_out_loss: float | None
    why: str


class BaseModelPassport(Part):
    """The base model as it was read."""

    id: str
    revision: str | None
    parameters: int
    files: dict[FileName, FileDigest]


class DatasetPassport(Part):
    """The dataset as it was trained."""

    train: DatasetDigest
    held_out: DatasetDigest | None
    train_rows: int
    held_out_rows: int
    trained_tokens_per_epoch: int
    trained_tokens: int
    tokens_sha256: Sha256
    chat_template_sha256: Sha256
    tokenizer_sha256: Sha256


class Passport(Record):
    """passport.json, inside the adapter: everything that produced it."""

    run_id: str
    created_at: AwareDatetime
    recipe: Recipe
    recipe_sha256: Sha256
    learning_rate: float
    seed: int
    base_model: BaseModelPassport
    dataset: DatasetPassport
    versions: Versions
    git_commit: str | None
    """Of the folder the recipe came from, "-dirty" when it held uncommitted changes; None outside a checkout."""
    ftjob_commit: str | None
    """Of the checkout that ftjob ran from; None for an installed package, whose version says it."""
    image_digest: str | None
    hardware: Hardware
    threads: int
    attempts: tuple[AttemptSummary, ...]
    epochs: tuple[EpochResult, ...]
    losses: tuple[StepLoss, ...]
    chosen: Chosen
    complete: bool
    """False for an adapter that was published because the budget ended; the run can go on."""
    receipt: Receipt
    """What all attempts had cost when the papers were written: all but the upload of the adapter."""
    exact: bool
    """Whether this is bit for bit the uninterrupted run: every attempt computed on the same hardware, and if that is a
    GPU, and there were several, with training.reproducible."""
