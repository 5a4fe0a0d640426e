"""The Recipe: what to train. Frozen, closed (unknown keys are refused), with the bound beside each default.

Sources of the defaults, quoted at each field:
  [QLoRA]    Dettmers et al. 2023, arXiv:2305.14314: NF4, double quantisation, all linear layers, constant-ish
             2e-4 for 7B-13B and 1e-4 for 33B-65B (table 9).
  [LoRA]     Hu et al. 2021, arXiv:2106.09685.
  [DoRA]     Liu et al. 2024, arXiv:2402.09353.
  [guides]   five practitioners' guides of 2026: rank 16, alpha 2 x rank, cosine, warmup 3-10 %, effective batch
             8-16, 1-3 epochs, length 2048, packing, 10-20 % held out, loss on assistant tokens only.
  [resume]   Young 1974 / Daly 2006: the interval between checkpoints that wastes least is sqrt(2 C M).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from job.contract.budget import Budget

TINY_MODEL: Final = "builtin:tiny"
"""Id of the tiny random Llama that ftjob carries for the quickstart and for tests."""

LARGE_MODEL_PARAMETERS: Final = 30_000_000_000
"""From this size on "auto" means 1e-4: [QLoRA] table 9 uses 1e-4 for 33B and 65B, 2e-4 below."""


def _one_of(says: str) -> WrapValidator:
    """A value of several types, refused with one sentence instead of with one complaint for each type."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"should be {says}") from error

    return WrapValidator(validate)


class Section(BaseModel):
    """A frozen, closed part of the recipe."""

    # Strict: "16", true and 16.0 are not the integer 16; whoever wrote them meant something else.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class BaseModelRef(Section):
    """Which weights the adapter is trained on."""

    id: str = Field(
        min_length=1,
        description=f'Hub id ("meta-llama/Llama-3.1-8B-Instruct"), a local folder ("./my-model", "/models/x", '
        f'"file:///models/x"), a folder in a bucket ("s3://mine/models/x"), or "{TINY_MODEL}" (a tiny random model for '
        f"trying things out).",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit on the hub; for hub ids only. It is pinned to a commit at launch.",
    )

    @model_validator(mode="after")
    def _is_somewhere_that_can_be_read(self) -> Self:
        scheme, mark, _ = self.id.partition("://")
        if mark and scheme not in ("s3", "file"):
            raise ValueError(f"id {self.id!r} cannot be read from: use a hub id, a folder, or s3://bucket/prefix")
        if self.revision is not None and not self.is_on_hub:
            raise ValueError("revision is for hub ids only: other folders are identified by the digests of their files")
        return self

    @property
    def is_on_hub(self) -> bool:
        """Whether the id names a repository on the hub, rather than a folder or the built-in model."""
        here = self.id in (TINY_MODEL, ".", "..") or self.id.startswith(("/", "./", "../", "~"))
        return not here and "://" not in self.id

    @property
    def is_in_bucket(self) -> bool:
        """Whether the id names a folder in a bucket."""
        return self.id.startswith("s3://")


class DatasetRef(Section):
    """Where the rows are."""

    train: str = Field(
        min_length=1,
        description="Uri of a JSONL file: s3://bucket/key, file:///path, or a path relative to the recipe. "
        'One object a line: {"messages": [{"role": ..., "content": ...}]} or {"prompt": ..., "completion": ...}.',
    )
    held_out: Annotated[
        Annotated[float, Field(gt=0, le=0.5)] | Annotated[str, Field(min_length=1)] | None,
        _one_of("a fraction above 0 and up to 0.5, a uri, or null"),
    ] = Field(
        default=0.1,
        description="Uri of a second JSONL file, or the fraction of rows to hold out (0-0.5), or null for none. "
        "Default 0.1: 10-20 % [guides]; the rows are chosen by training.seed.",
    )


class Lora(Section):
    """The adapter's shape."""

    rank: int = Field(default=16, ge=1, le=512, description="Default 16 [guides]; 32-64 for broad adaptation.")
    alpha: int = Field(default=32, ge=1, le=2048, description="Scaling is alpha / rank. Default 2 x rank [guides].")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Default 0 [guides]; 0.05 on small data [QLoRA, 33B and 65B]."
    )
    target_modules: Annotated[
        # Not strict in this one thing: JSON has lists and no tuples.
        Literal["all-linear"] | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)],
        _one_of('"all-linear" or a list of module names'),
    ] = Field(
        default="all-linear",
        description='Default "all-linear": adapting every linear layer is what matches full fine-tuning [QLoRA].',
    )
    dora: bool = Field(
        default=False,
        description="Weight-decomposed LoRA [DoRA]: about +1 % quality, slower; vLLM loads it only when it is merged.",
    )

    @model_validator(mode="after")
    def _targets_something(self) -> Self:
        if self.target_modules == ():
            raise ValueError('target_modules is empty: nothing would be trained; leave it out for "all-linear"')
        return self

    def targets_in(self, modules: Iterable[str]) -> dict[str, list[str]]:
        """Of the names of a model's modules, those that each target fits, as PEFT matches them: the whole name, or its
        end behind a dot. Nothing for "all-linear"."""
        targets = () if self.target_modules == "all-linear" else self.target_modules
        names = list(modules)
        return {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}


class EarlyStopping(Section):
    """Stop when the held-out loss has not improved for `patience` epochs."""

    patience: int = Field(default=1, ge=1, le=100, description="Epochs without improvement that are tolerated.")
    min_delta: float = Field(default=0.0, ge=0, description="Smallest fall of the held-out loss that counts, in nats.")


class Training(Section):
    """How to train."""

    epochs: int = Field(default=3, ge=1, le=1000, description="Default 3 [guides: 1-3]; the best epoch is delivered.")
    learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=1)] | Literal["auto"], _one_of('a number above 0 and up to 1, or "auto"')
    ] = Field(default="auto", description='Default "auto": 2e-4, and 1e-4 from 30B parameters on [QLoRA table 9].')
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="Default cosine [guides]."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=0.5, description="Default 0.03 [QLoRA; guides: 3-10 %].")
    batch_size: int = Field(default=2, ge=1, le=1024, description="Sequences per forward pass [guides: 1-4].")
    gradient_accumulation: int = Field(
        default=4,
        ge=1,
        le=4096,
        description="Forward passes per optimizer step. Effective batch 2 x 4 = 8 [guides: 8-16].",
    )
    max_length: int = Field(
        default=2048, ge=16, le=1_048_576, description="Tokens per sequence. Default 2048 [guides]."
    )
    packing: bool = Field(
        default=True,
        description="Fill sequences with several rows, isolated from each other. Default true [guides].",
    )
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Decides the order, the split, the init and dropout.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="Default adamw (fp32 states): a LoRA's state is small; the 8-bit ones are for the edge of memory.",
    )
    precision: Literal["bf16", "fp8"] = Field(
        default="bf16",
        description='What the frozen base multiplies in on a GPU. "fp8" (e4m3, Hopper and newer) is up to half as fast '
        "again, and noisier: the gradients of the adapter are within some percent of bf16's.",
    )
    reproducible: bool = Field(
        default=False,
        description="On a GPU, compute every sum in the same order: a resumed run is then the uninterrupted one bit "
        "for bit on the same GPU model, and slower. On a CPU it always is.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Default 0 [QLoRA].")
    max_grad_norm: float = Field(default=0.3, gt=0, le=100, description="Gradient clipping. Default 0.3 [QLoRA].")
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Absent: all epochs run. Needs held-out rows. The best epoch is delivered either way.",
    )


class Checkpoints(Section):
    """When to commit. Every epoch always; between epochs by the clock; and on a preemption notice."""

    minutes: Annotated[
        Annotated[float, Field(gt=0, le=24 * 60)] | Literal["auto"],
        _one_of('a number above 0 and up to 1440, or "auto"'),
    ] = Field(
        default="auto",
        description='Minutes between commits. Default "auto": sqrt(2 C M) from the measured cost of a save [resume].',
    )
    keep: int = Field(default=3, ge=2, le=1000, description="Newest checkpoints kept; at least 2, so that one may rot.")


class Output(Section):
    """Where everything lands."""

    bucket: str | None = Field(
        default=None,
        min_length=1,
        description="s3://bucket/prefix or file:///folder. Absent: the default bucket of the person's settings.",
    )


class Recipe(Section):
    """What to train."""

    base_model: BaseModelRef
    dataset: DatasetRef
    method: Literal["qlora", "lora"] = Field(
        default="qlora",
        description="qlora: 4-bit NF4 base, double quantisation [QLoRA]; lora: 16-bit base [LoRA].",
    )
    lora: Lora = Field(default_factory=Lora)
    training: Training = Field(default_factory=Training)
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    output: Output = Field(default_factory=Output)
    budget: Budget = Field(default_factory=Budget)

    @model_validator(mode="after")
    def _early_stopping_has_something_to_watch(self) -> Self:
        if self.training.early_stopping is not None and self.dataset.held_out is None:
            raise ValueError("training.early_stopping needs held-out rows: set dataset.held_out (a fraction or a uri)")
        return self

    def digest(self) -> str:
        """Sha256 of what decides the weights.

        Where the adapter lands, how often it is saved and what it may cost do not; nor does where the dataset lies:
        its bytes do, and they have digests of their own.
        """
        decisive = self.model_dump(
            mode="json", exclude={"output": True, "checkpoints": True, "budget": True, "dataset": {"train"}}
        )
        for key, default in _ADDED_LATER.items():
            if decisive["training"][key] == default:
                del decisive["training"][key]
        if isinstance(self.dataset.held_out, str):
            decisive["dataset"]["held_out"] = "a file of its own"
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_ADDED_LATER: Final = {"precision": "bf16", "reproducible": False}
"""Keys of training that recipes did not always have: at these values they count for nothing, so that a run of before is
the run it was."""


def resolve_learning_rate(recipe: Recipe, parameters: int) -> float:
    """The learning rate to use on a base model of this many parameters ([QLoRA] table 9)."""
    rate = recipe.training.learning_rate
    if rate == "auto":
        return 1e-4 if parameters >= LARGE_MODEL_PARAMETERS else 2e-4
    return rate
