"""Promise: what was measured is predicted, and what was not measured is said to be so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from job.contract.recipe import Lora, Recipe
from job.contract.submission import Offer
from job.tiny import write_tiny_model
from launch.cards import CARDS, WITHOUT_BF16, card_of
from launch.memory import TIGHT, full_batch, memory_of, peak_gib
from launch.shape import TINY_SHAPE, Shape, shape_of
from launch.speeds import (
    ANCHORS,
    LLAMA_8B,
    LLAMA_70B,
    OURS,
    OWN,
    Measured,
    batch_of,
    calibration,
    pace,
    predicted,
    seconds_of_batch,
    tokens_per_second,
)

LLAMA_8B_CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def recipe_of(method: str = "qlora", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "base_model": {"id": "org/model"},
            "dataset": {"train": "s3://mine/rows.jsonl"},
            "method": method,
            "training": training,
        }
    )


@pytest.mark.parametrize("row", [*ANCHORS, *OWN], ids=lambda row: str(row.what))
def test_every_measured_step_is_predicted_within_a_tenth_and_its_memory_too(row: Measured) -> None:
    assert predicted(row) / (calibration(CARDS[row.card]) if row in OWN else 1) == pytest.approx(
        row.tokens_per_second, rel=0.10
    )
    recipe = recipe_of(optimizer="paged_adamw_8bit" if row.paged else "adamw")
    assert peak_gib(row.shape, recipe, row.batch, stack=row.stack) == pytest.approx(row.gib, rel=0.10)


@pytest.mark.parametrize(
    ("size", "dropout", "speed", "gib"),
    [(2, 0.0, 3417, 11.5), (8, 0.0, 4568, 24.5), (2, 0.05, 2648, 12.0), (8, 0.05, 3361, 25.8)],
)
def test_dora_is_predicted_within_a_tenth_of_what_was_measured(
    size: int, dropout: float, speed: float, gib: float
) -> None:
    """Steps of the 8B shape by bench/steps.py, one H200, 2026-11-23."""
    plain = recipe_of(batch_size=size, gradient_accumulation=8 // size, packing=False)
    recipe = plain.model_copy(update={"lora": Lora(dora=True, dropout=dropout)})
    assert tokens_per_second(LLAMA_8B, recipe, CARDS["H200"]) == pytest.approx(speed, rel=0.10)
    assert peak_gib(LLAMA_8B, recipe, full_batch(recipe)) == pytest.approx(gib, rel=0.10)


def test_a_small_micro_batch_costs_what_the_host_needs_for_it() -> None:
    one, half = (batch_of(1, length, packing=False) for length in (1024, 512))
    seconds = [seconds_of_batch(LLAMA_8B, CARDS["H200"], batch, nf4=True, stack=OURS) for batch in (one, half)]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.05)


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_costs_a_third_of_a_training_pass_or_a_little_more(packing: bool) -> None:
    recipe = recipe_of(batch_size=8, packing=packing)
    took = pace(LLAMA_8B, recipe, CARDS["H200"], full_batch(recipe))
    assert 0.2 < took.evaluated_micro_batch / took.micro_batch < 0.4


def test_steps_of_our_own_move_the_prediction_of_their_card_and_of_cards_without_any() -> None:
    slow = ANCHORS[0]._replace(tokens_per_second=predicted(ANCHORS[0]) / 2)
    fast = ANCHORS[0]._replace(card="L40S")
    fast = fast._replace(tokens_per_second=predicted(fast) * 3)
    assert calibration(CARDS["H200"], (slow, fast)) == pytest.approx(2)
    assert calibration(CARDS["L40S"], (slow, fast)) == pytest.approx(1 / 3)
    assert calibration(CARDS["A100"], (slow,)) == pytest.approx(2)
    assert calibration(CARDS["A100"], ()) == 1


def test_published_sizes_are_counted_from_the_shape() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248
    assert LLAMA_70B.parameters == 70_553_706_496
    assert LLAMA_8B.adapter_parameters(Lora(rank=16)) == 41_943_040  # what PEFT prints for it
    attention = Lora(rank=8, target_modules=("q_proj", "v_proj"))
    assert LLAMA_8B.adapter_parameters(attention) == 3_407_872  # likewise


def test_a_shape_is_read_from_config_json(tmp_path: Path) -> None:
    assert shape_of(LLAMA_8B_CONFIG) == LLAMA_8B
    write_tiny_model(tmp_path)
    assert shape_of(json.loads((tmp_path / "config.json").read_text())) == TINY_SHAPE


@pytest.mark.parametrize(
    "change", [{"model_type": "mixtral"}, {"model_type": None}, {"hidden_size": "wide"}, {"num_hidden_layers": 0}]
)
def test_a_shape_that_cannot_be_told_is_not_invented(change: dict[str, Any]) -> None:
    assert isinstance(shape_of(LLAMA_8B_CONFIG | change), str)


def test_a_faster_card_a_smaller_model_and_recompute_do_what_they_should() -> None:
    recipe = recipe_of(packing=False)
    speeds = [tokens_per_second(LLAMA_8B, recipe, CARDS[name]) for name in ("H200", "H100", "A100-80GB", "L4")]
    assert speeds == sorted(speeds, reverse=True)
    assert tokens_per_second(LLAMA_70B, recipe, CARDS["H200"]) < speeds[0] / 5
    packed = tokens_per_second(LLAMA_8B, recipe_of(batch_size=8), CARDS["H200"])
    assert packed < tokens_per_second(LLAMA_8B, recipe_of(batch_size=8, packing=False), CARDS["H200"])


def test_cards_are_found_by_the_names_of_the_catalog() -> None:
    catalog = Path(__file__).parent / "catalog" / "v8"
    sold = {
        row.split(",")[header.index("AcceleratorName")]
        for path in catalog.glob("*/vms.csv")
        for header, *rows in [[line.split(",") for line in path.read_text().splitlines()]]
        for row in [",".join(each) for each in rows]
    } - {""}
    assert sold, "the catalog is empty: has it moved?"
    assert {gpu for gpu in sold if isinstance(card_of(gpu), str)} <= WITHOUT_BF16
    assert card_of("h100") == CARDS["H100"]
    assert card_of("H100", "runpod") == CARDS["H100-PCIE"]
    assert isinstance(card_of("Quantum"), str)


def test_memory_is_refused_where_it_does_not_fit_and_each_remedy_does() -> None:
    huge = recipe_of(batch_size=8, max_length=8192, packing=False)
    memory = memory_of(LLAMA_70B, huge, CARDS["H100"])
    assert memory.verdict == "does not fit"
    assert memory.fixes
    for fix in memory.fixes:
        changes = {name: int(value) for name, value in re.findall(r"(batch_size|max_length) (\d+)", fix)}
        remedied = memory_of(LLAMA_70B, recipe_of(**huge.training.model_dump() | changes), CARDS["H100"])
        assert remedied.verdict == "fits", fix
        assert remedied.gib is not None
        assert f"{remedied.gib:.1f} GiB" in fix


def test_the_effective_batch_is_kept_by_the_remedy_that_makes_it_smaller() -> None:
    memory = memory_of(LLAMA_70B, recipe_of(batch_size=8, max_length=8192), CARDS["H100"])
    size, accumulation = (
        int(n) for n in re.findall(r"batch_size (\d+) with gradient_accumulation (\d+)", memory.fixes[0])[0]
    )
    assert size * accumulation == 8 * 4


def test_what_no_change_makes_fit_is_told_how_large_a_card_would_have_to_be() -> None:
    memory = memory_of(LLAMA_70B, recipe_of(batch_size=1), CARDS["A10G"])
    assert len(memory.fixes) == 1
    needed = float(re.findall(r"a GPU with (\d+) GiB", memory.fixes[0])[0])
    assert memory.gib is not None
    assert needed == pytest.approx(memory.gib / TIGHT, abs=1)


def test_sixteen_bit_bases_are_told_that_four_bits_would_do() -> None:
    memory = memory_of(LLAMA_8B, recipe_of("lora", max_length=4096), CARDS["L4"])
    assert memory.verdict in ("tight", "does not fit")
    assert any('method "qlora"' in fix for fix in memory.fixes)
    assert memory.largest[0].name == "base weights in 16 bits"


def test_an_offer_can_be_asked_for_its_card() -> None:
    offer = Offer(cloud="runpod", gpu="H100-SXM", gpus=1, spot=True, usd_per_hour=2.0)
    assert card_of(offer.gpu, offer.cloud) == CARDS["H100"]
    assert Shape.model_validate(LLAMA_8B.model_dump()) == LLAMA_8B
