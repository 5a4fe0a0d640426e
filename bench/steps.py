"""What the quote says of a step and of its memory, beside what this machine's GPU does: our own training, timed.

    python bench/steps.py [--settings 8B] [--steps 6] [--json]      needs an NVIDIA GPU
    python bench/steps.py --smoke                                   the tiny shape, on any machine, in seconds

A setting is a shape, a micro-batch, whether rows are packed, and what the recipe changes; the job takes the path that
it would take, and the quote is asked for the same. "plain" ones go through the modules, as other models do. For each
one the model is built with random weights on the GPU (bench/workload.py). All else is the job:
`job.train.Training`, steered and metered, every token trained, whole steps from one log line to the next. The
prediction is the quote's, for the micro-batches as they were.

Columns: tokens a second (median step); seconds of an evaluated micro-batch; GiB as torch.cuda.max_memory_allocated sees
them; GiB of the card that are taken. A ratio is measured over predicted.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import torch
import transformers
from peft import get_peft_model
from transformers import set_seed
from workload import ROWS_PACKED, SHAPES, Deviation, keeps_variance, llama_config, random_model

from job.callbacks import Steering
from job.contract.metrics import MetricLine, Step
from job.contract.recipe import TINY_MODEL, BaseModelRef, Recipe
from job.dataset.reader import LineNumber
from job.dataset.render import RenderedRow
from job.logs import configure
from job.model import hardware, load_tokenizer, lora_config, settle_quantised
from job.notice import Notice
from job.speed import speed_up
from job.train import Rows, Training
from job.weights import locate
from launch.cards import Card, card_of
from launch.fast_path import kept_by, why_plain
from launch.memory import fast_terms, memory_of, peak_gib
from launch.roofline import batch_of, full_batch
from launch.shape import Shape
from launch.speeds import pace, pace_on_cpu

EVALUATED: Final = 4
"""Micro-batches that are held out."""
TITLES: Final = ("tokens a second", "evaluation, seconds", "allocated, GiB", "used, GiB")
NEVER: Final = 1e9
"""Seconds between checkpoints: none is timed here."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        shape: a name of SHAPES.
        lora: keys of the recipe's section that differ from its defaults.
        plain: through the modules, although the job would go the fast path.
        gib: memory that the job may use; None for all of the card's.
    """

    shape: str
    batch_size: int
    gradient_accumulation: int
    packing: bool
    max_length: int = 2048
    lora: tuple[tuple[str, float], ...] = ()
    optimizer: str = "adamw"
    precision: str = "bf16"
    plain: bool = False
    gib: float | None = None

    @property
    def name(self) -> str:
        said = f"{self.shape} {self.batch_size}x{self.gradient_accumulation}{' packed' if self.packing else ''}"
        own = [f"{key} {value:g}" for key, value in self.lora] + ([self.optimizer] if self.optimizer != "adamw" else [])
        own += [self.precision] if self.precision != "bf16" else []
        own += ["plain"] if self.plain else []
        own += [f"within {self.gib:g} GiB"] if self.gib else []
        return ", ".join([said, *own])

    def recipe(self) -> Recipe:
        """One epoch, nothing held out. Rank 16 on all linear layers is the recipe's default."""
        return Recipe.model_validate(
            {
                "base_model": {"id": TINY_MODEL},
                "dataset": {"train": "file:///made/up.jsonl", "held_out": None},
                "lora": dict(self.lora),
                "training": {
                    "epochs": 1,
                    "batch_size": self.batch_size,
                    "gradient_accumulation": self.gradient_accumulation,
                    "max_length": self.max_length,
                    "packing": self.packing,
                    "optimizer": self.optimizer,
                    "precision": self.precision,
                },
            }
        )


SETTINGS: Final = (
    *(Setting("8B", 8, 1, packing, precision=p) for p in ("bf16", "fp8") for packing in (False, True)),
    *(Setting("8B", size, 8 // size, False) for size in (1, 2)),
    *(Setting("70B", 2, 2, False, precision=p) for p in ("bf16", "fp8")),
    *(Setting("70B", 1, 4, False, precision=p, gib=79) for p in ("bf16", "fp8")),
    Setting("70B", 1, 4, False, gib=47),
    *(Setting("8B", size, 8 // size, packing, plain=True) for packing in (False, True) for size in (1, 2, 8)),
    *(Setting("70B", size, 8 // size, packing, plain=True) for packing in (False, True) for size in (1, 2)),
    Setting("8B", 2, 4, False, lora=(("dora", True),)),
    Setting("8B", 2, 4, False, lora=(("dora", True), ("dropout", 0.05))),
    Setting("8B", 2, 4, False, optimizer="paged_adamw_8bit"),
)
SMOKE: Final = tuple(Setting("tiny", 2, 2, packing, max_length=96) for packing in (False, True))


@dataclass(frozen=True)
class Timed:
    """A setting, measured and predicted. None where there is no GPU.

    Args:
        seconds: of each step after the warm-up.
        batch_tokens: of a mean micro-batch.
        evaluation: seconds of a micro-batch without a backward pass.
        allocated, reserved: GiB of torch's allocator, at the peak.
        used: GiB of the card, CUDA's own included.
        losses: of the first step and of the last.
    """

    setting: str
    seconds: tuple[float, ...]
    batch_tokens: float
    tokens_per_second: float
    predicted_tokens_per_second: float
    evaluation: float
    predicted_evaluation: float
    allocated: float | None
    predicted_allocated: float | None
    reserved: float | None
    used: float | None
    predicted_used: float | None
    losses: tuple[float, float]


def build(shape: Shape, recipe: Recipe, deviation: Deviation = keeps_variance) -> Any:
    """The model that `job.model.load` would give for random weights of this shape."""
    set_seed(recipe.training.seed)  # what is compared has the same weights
    model = random_model(llama_config(shape), deviation=deviation)
    settle_quantised(model, model.dtype)
    model.requires_grad_(False)
    set_seed(recipe.training.seed)
    return get_peft_model(model, lora_config(recipe))


def make_rows(setting: Setting, vocabulary: int, sequences: int) -> list[RenderedRow]:
    """Rows that fill so many sequences; every token is trained."""
    draw = random.Random(7)
    parts = ROWS_PACKED if setting.packing else 1
    rows = []
    for line in range(1, sequences * parts + 1):
        ids = tuple(draw.choices(range(vocabulary), k=setting.max_length // parts))
        rows.append(RenderedRow(LineNumber(line), ids, ids))
    return rows


def timed(setting: Setting, *, steps: int, warm_up: int) -> Timed:
    """Train a setting on fresh weights, one epoch of so many steps, and evaluate at its end."""
    shape, recipe = SHAPES[setting.shape], setting.recipe()
    how = recipe.training
    rows = make_rows(setting, shape.vocabulary, (warm_up + steps) * how.batch_size * how.gradient_accumulation)
    held_out = make_rows(setting, shape.vocabulary, EVALUATED * how.batch_size)
    lines: list[MetricLine] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = load_tokenizer(locate(BaseModelRef(id=TINY_MODEL), folder))
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(setting.gib * 2**30 / total if setting.gib else 1.0)
        training = Training(
            recipe,
            build(shape, recipe),
            tokenizer,
            Rows(rows, held_out),
            workdir=folder,
            notice=Notice(),
            accelerate=_through_the_modules if setting.plain else speed_up,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steering = Steering(
            training,
            Notice(),
            save=lambda _: 0.0,
            write=lines.append,
            interval=NEVER,
            upload_seconds=lambda: 0.0,
        )
        training.run(steering)
    taken = [line for line in lines if isinstance(line, Step)]
    if len(taken) != warm_up + steps:
        raise AssertionError(f"{setting.name}: {len(taken)} steps, and not {warm_up + steps}")
    losses = (taken[0].loss, taken[-1].loss)
    return _beside_the_quote(setting, taken[warm_up:], training.evaluate_seconds() / EVALUATED, losses)


def _beside_the_quote(
    setting: Setting, counted: Sequence[Step], evaluation: float, losses: tuple[float, float]
) -> Timed:
    """What was measured, the allocator's peaks included, and what the quote says of the same."""
    shape, recipe = SHAPES[setting.shape], setting.recipe()
    how = recipe.training
    mean = statistics.fmean(step.tokens for step in counted) / how.gradient_accumulation
    row = how.max_length // ROWS_PACKED
    batch = (
        batch_of(1, mean, packing=True, row=row)
        if how.packing
        else batch_of(how.batch_size, how.max_length, packing=False)
    )
    card = this_card()
    card = card._replace(gib=setting.gib) if card and setting.gib else card
    # The quote takes the path by the model's type: another one's layers go through the modules.
    quoted = shape.model_copy(update={"kind": "phi3"}) if setting.plain else shape
    expected = pace(quoted, recipe, card, batch) if card else pace_on_cpu(quoted, recipe, batch)
    memory = memory_of(quoted, recipe, card) if card else None
    free, total = torch.cuda.mem_get_info() if card else (0, 0)
    return Timed(
        setting=setting.name,
        seconds=tuple(step.seconds for step in counted),
        batch_tokens=mean,
        tokens_per_second=statistics.median(step.tokens / step.seconds for step in counted),
        predicted_tokens_per_second=mean * how.gradient_accumulation / expected.step,
        evaluation=evaluation,
        predicted_evaluation=expected.evaluated_micro_batch,
        allocated=torch.cuda.max_memory_allocated() / 2**30 if card else None,
        predicted_allocated=_allocated(quoted, recipe, card) if card else None,
        reserved=torch.cuda.max_memory_reserved() / 2**30 if card else None,
        used=(total - free) / 2**30 if card else None,
        predicted_used=memory.gib if memory else None,
        losses=losses,
    )


def _through_the_modules(*_: object, **__: object) -> None:
    """As job.speed.speed_up where there is no fast path."""


def _allocated(shape: Shape, recipe: Recipe, card: Card) -> float:
    """GiB of torch's allocator that the quote expects at the peak."""
    batch = full_batch(recipe)
    if why_plain(shape, recipe) is not None:
        return peak_gib(shape, recipe, batch)
    return sum(term.gib for term in fast_terms(shape, recipe, batch, kept_by(shape, recipe, batch.tokens, card.gib)))


def this_card() -> Card | None:
    """What the quote knows of this machine's GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    name = hardware().name
    found = [card for known in name.split() if isinstance(card := card_of(known), Card)]
    if not found:
        raise SystemExit(f"the quote knows nothing of {name}")
    return found[0]


def row_of(found: Timed) -> str:
    """A line of the table."""

    def pair(measured: float | None, predicted: float | None, digits: int) -> str:
        if measured is None or predicted is None:
            return f"{'-':>8} {'-':>8} {'-':>5}"
        return f"{measured:8.{digits}f} {predicted:8.{digits}f} {measured / predicted:5.2f}"

    return "  ".join(
        [
            f"{found.setting:30}",
            pair(found.tokens_per_second, found.predicted_tokens_per_second, 0),
            pair(found.evaluation, found.predicted_evaluation, 3),
            pair(found.allocated, found.predicted_allocated, 1),
            pair(found.used, found.predicted_used, 1),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=[], help="names of shapes or of settings; default: all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="the tiny shape")
    parser.add_argument("--json", action="store_true", help="an object for each setting, a line each")
    asked = parser.parse_args(arguments)
    settings = SMOKE if asked.smoke else SETTINGS
    chosen = [each for each in settings if not asked.settings or {each.name, each.shape} & set(asked.settings)]
    if not chosen:
        parser.error("no such setting; there are: " + ", ".join(each.name for each in settings))
    if not (asked.smoke or torch.cuda.is_available()):
        parser.error("this needs an NVIDIA GPU; --smoke does not")
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    if not asked.json:
        print(f"{hardware().name}, torch {torch.__version__}; each: measured, predicted, ratio")
        print("  ".join([" " * 30, *(f"{title:>23}" for title in TITLES)]))
    for setting in chosen:
        found = timed(setting, steps=asked.steps, warm_up=asked.warm_up)
        print(json.dumps(asdict(found)) if asked.json else row_of(found), flush=True)
        gc.collect()  # the model and its trainer refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    configure()  # the job's events, to stderr
    torch.set_num_threads(1)  # as the job computes on a CPU
    main()
