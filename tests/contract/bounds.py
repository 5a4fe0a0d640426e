"""The bounds of every key of a recipe, as a table that tests go through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.contract.examples import recipe_data

BOUNDS: Mapping[str, tuple[list[object], list[object]]] = {
    # key: what is taken, up to the very bounds; what is refused, from just beyond them
    "base_model.id": (
        ["m", "./folder", "org/model", "builtin:tiny", "s3://b/m", "file:///m"],
        ["", 1, None, ["m"], True],
    ),
    "base_model.revision": (["main", None], ["", 1, True]),
    "dataset.train": (["rows.jsonl", "s3://b/rows.jsonl"], ["", 1, None, 0.5, ["a"]]),
    "dataset.held_out": ([0.5, 1e-9, "rows.jsonl", None], [0, 0.0, -0.1, 0.500001, 1, 1e308, "", [], {}, True, False]),
    "method": (["qlora", "lora"], ["full", "QLORA", "", None, 1]),
    "lora.rank": ([1, 512], [0, 513, -1, 16.0, 1.5, "16", True, None]),
    "lora.alpha": ([1, 2048], [0, 2049, 32.0, "32", None]),
    "lora.dropout": ([0, 0.0, 0.999], [-0.001, 1, 1.0, "0", True, None]),
    "lora.target_modules": (["all-linear", ["q_proj"], ["a", "b"]], ["q_proj", [], [""], ["a", 1], None, 1, {"a": 1}]),
    "lora.dora": ([True, False], [1, 0, "true", None]),
    "training.epochs": ([1, 1000], [0, 1001, 3.0, "3", True, None]),
    "training.learning_rate": ([1, 1e-9, "auto"], [0, -1e-4, 1.001, "2e-4", "", None, True]),
    "training.scheduler": (["cosine", "linear", "constant", "constant_with_warmup"], ["Cosine", "", None, 1]),
    "training.warmup_ratio": ([0, 0.5], [-0.01, 0.51, "0.03", None]),
    "training.batch_size": ([1, 1024], [0, 1025, 2.0, "2", None]),
    "training.gradient_accumulation": ([1, 4096], [0, 4097, 2.0, "2", None]),
    "training.max_length": ([16, 1_048_576], [15, 1_048_577, 2048.0, "2048", None]),
    "training.packing": ([True, False], [1, "no", None]),
    "training.seed": ([0, 2**32 - 1], [-1, 2**32, 10**30, 1.0, "42", None]),
    "training.optimizer": (["adamw", "adamw_8bit", "paged_adamw_8bit"], ["sgd", "", None]),
    "training.precision": (["bf16", "fp8"], ["fp16", "", None]),
    "training.reproducible": ([True, False], [1, "yes", None]),
    "training.weight_decay": ([0, 1], [-0.1, 1.1, "0", None]),
    "training.max_grad_norm": ([1e-9, 100], [0, -1, 100.1, "1", None]),
    "training.early_stopping.patience": ([1, 100], [0, 101, 1.0, "1", None]),
    "training.early_stopping.min_delta": ([0, 0.5, 1000], [-0.1, "0", None]),
    "checkpoints.minutes": ([1e-9, 1440, "auto"], [0, -1, 1440.1, "5", "", None, True]),
    "checkpoints.keep": ([2, 1000], [1, 0, 1001, 2.0, "3", None]),
    "output.bucket": (["s3://b", None], ["", 1, True]),
    "budget.max_usd": ([0.01, 40, 1e9, None], [0, -1, "40", True]),
    "budget.max_hourly_usd": ([0.01, 3, None], [0, -1, "3", True]),
    "budget.deadline": (
        [None],
        ["tomorrow", "2026-12-01", "2026-12-01T18:00:00", "0001-01-01T00:00:00+14:00", True, ["x"]],
    ),
}
SECTIONS = ["base_model", "dataset", "lora", "training", "training.early_stopping", "checkpoints", "output", "budget"]

TAKEN = [(path, value) for path, (taken, _) in BOUNDS.items() for value in taken]
REFUSED = [(path, value) for path, (_, refused) in BOUNDS.items() for value in refused]


def with_value(path: str, value: object) -> dict[str, Any]:
    """The shortest recipe, and one value in it."""
    data = recipe_data()
    *sections, key = path.split(".")
    place = data
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return data
