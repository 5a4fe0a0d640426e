"""Promise: what was measured is predicted, and what was not measured is said to be so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from job.contract.recipe import Lora, Recipe
from job.contract.submission import Offer
from job.shortage import STATE_BYTES
from job.tiny import write_tiny_model
from launch.cards import CARDS, WITHOUT_BF16, card_of, lacks_fp8
from launch.fast_path import STATES, kept_by, why_plain
from launch.measured import ANCHORS, OWN, TRIALS, Measured, calibration, predicted
from launch.memory import HOST_BASE_GIB, TIGHT, fast_terms, memory_of, peak_gib
from launch.roofline import OURS, batch_of, full_batch, seconds_of_batch
from launch.shape import LLAMA_8B, LLAMA_70B, TINY_SHAPE, Shape, shape_of
from launch.speeds import pace, tokens_per_second

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

OTHER_8B = LLAMA_8B.model_copy(update={"kind": "phi3"})
"""Whose layers go through the modules."""


def recipe_of(method: str = "qlora", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "base_model": {"id": "org/model"},
            "dataset": {"train": "s3://mine/rows.jsonl"},
            "method": method,
            "training": training,
        }
    )


def recipe_from(row: Measured) -> Recipe:
    """What was trained."""
    return recipe_of(
        optimizer="paged_adamw_8bit" if row.paged else "adamw",
        precision="fp8" if row.fp8 else "bf16",
        batch_size=round(row.batch.tokens / 2048),
        gradient_accumulation=row.micro_batches,
        packing=row.batch.masked,
    )


def named(row: Measured) -> str:
    return f"{row.what} {row.kept.words}".strip()


ROWS = (*ANCHORS, *OWN, *TRIALS)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_every_measured_step_is_predicted_within_a_tenth_and_its_memory_too(row: Measured) -> None:
    fast = row.stack is None
    calibrated = calibration(CARDS[row.card], fast=fast) if row in OWN else 1
    assert predicted(row) / calibrated == pytest.approx(row.tokens_per_second, rel=0.05 if fast else 0.10)
    if math.isnan(row.gib):
        return
    if row.stack is None:
        gib = sum(term.gib for term in fast_terms(row.shape, recipe_from(row), row.batch, row.kept))
    else:
        gib = peak_gib(row.shape, recipe_from(row), row.batch, stack=row.stack)
    assert gib == pytest.approx(row.gib, rel=0.05 if fast else 0.10)


@pytest.mark.parametrize("row", [row for row in OWN if row.stack is None], ids=named)
def test_what_layers_will_keep_is_foretold_and_so_is_the_speed_of_the_whole_recipe(row: Measured) -> None:
    recipe, card = recipe_from(row), CARDS[row.card]
    kept = kept_by(row.shape, recipe, full_batch(recipe).tokens, row.within_gib or card.gib)
    # Within 47 GiB the job kept nothing but inputs, and this says that a few layers keep more.
    assert kept == row.kept or (row.within_gib == 47 and kept.layers[0] == ("input", 72))
    speed = row.batch.tokens * row.micro_batches / pace(row.shape, recipe, card, row.batch).step
    if row.within_gib is None:
        assert speed == pytest.approx(row.tokens_per_second, rel=0.05)
    else:
        assert tokens_per_second(row.shape, recipe, card, within_gib=row.within_gib) == pytest.approx(
            row.tokens_per_second, rel=0.05
        )


def test_the_bytes_of_an_optimizer_are_those_that_the_job_counts() -> None:
    assert {name: 4 + state for name, state in STATE_BYTES.items()} == STATES


@pytest.mark.parametrize(
    ("config", "changes", "why"),
    [
        ({}, {}, None),
        ({"model_type": "qwen2"}, {}, None),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, {}, None),
        ({"model_type": "qwen2", "sliding_window": 512}, {}, None),  # unused, unless it is told to
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True}, {}, "512 tokens back"),
        ({"model_type": "qwen3"}, {}, None),
        ({"model_type": "qwen3", "sliding_window": 512}, {}, None),
        ({"model_type": "qwen3", "sliding_window": 512, "use_sliding_window": True}, {}, "512 tokens back"),
        ({"model_type": "qwen3", "use_sliding_window": True}, {"training": {"max_length": 8192}}, "4096 tokens back"),
        ({"model_type": "mistral", "sliding_window": None}, {}, None),
        ({"model_type": "mistral", "sliding_window": 512}, {}, "512 tokens back"),
        ({"model_type": "mistral"}, {"training": {"max_length": 8192}}, "4096 tokens back"),
        ({"model_type": "gemma2"}, {}, "another layer than Llama"),
        ({"hidden_act": "gelu"}, {}, "gelu"),
        ({"attention_dropout": 0.1}, {}, "dropout"),
        ({}, {"lora": {"dropout": 0.05}}, None),
        ({}, {"lora": {"dora": True}}, "DoRA"),
        ({}, {"lora": {"target_modules": ["q_proj", "self_attn.v_proj"]}}, None),
        ({}, {"lora": {"target_modules": ["q_proj", "lm_head"]}}, "lm_head"),
    ],
)
def test_the_path_that_the_job_takes_is_told_from_config_json(
    config: dict[str, Any], changes: dict[str, Any], why: str | None
) -> None:
    shape = shape_of(LLAMA_8B_CONFIG | config)
    assert isinstance(shape, Shape)
    recipe = Recipe.model_validate(recipe_of().model_dump(exclude={"output"}) | changes)
    found = why_plain(shape, recipe)
    assert found is None if why is None else why in str(found)
    how = pace(shape, recipe, CARDS["H200"], full_batch(recipe)).how
    assert how == "on the fast path" if why is None else why in how


def test_a_window_that_no_row_reaches_is_none() -> None:
    shape = LLAMA_8B.model_copy(update={"window": 512})
    assert why_plain(shape, recipe_of(), 500) is None
    assert why_plain(shape, recipe_of(), 513) is not None


def test_rows_that_share_a_sequence_cost_no_attention_to_each_other_on_the_fast_path() -> None:
    alone, shared = (batch_of(8, 2048, packing=True, row=row) for row in (None, 200))
    recipe = recipe_of(batch_size=8)
    pairs = [[pace(s, recipe, CARDS["H200"], b).micro_batch for b in (alone, shared)] for s in (LLAMA_8B, OTHER_8B)]
    assert pairs[0][1] < 0.95 * pairs[0][0]
    assert pairs[1][1] == pairs[1][0]


def test_the_less_memory_a_card_has_the_less_is_kept_and_the_slower_it_is() -> None:
    recipe = recipe_of(batch_size=8, gradient_accumulation=1)
    speeds = [tokens_per_second(LLAMA_8B, recipe, CARDS["H200"], within_gib=gib) for gib in (130, 60, 40, 20, 14)]
    assert speeds == sorted(set(speeds), reverse=True)
    takes = [memory_of(LLAMA_8B, recipe, CARDS["H200"]._replace(gib=gib)) for gib in (130, 60, 40, 20, 14)]
    assert all(found.gib is not None and found.gib < found.of_gib for found in takes if found.of_gib)
    assert {found.least_gib for found in takes[:3]} == {takes[0].least_gib}
    assert all(found.verdict in ("fits", "tight") for found in takes)
    assert all(found.host_gib is None for found in takes)
    assert memory_of(LLAMA_8B, recipe, CARDS["H200"]._replace(gib=9)).verdict == "does not fit"


def test_inputs_that_do_not_fit_go_to_the_host_at_no_cost_of_time_and_the_quote_says_how_much_that_takes() -> None:
    recipe = recipe_of(batch_size=8, gradient_accumulation=1)
    enough, short = (CARDS["H200"]._replace(gib=gib) for gib in (14, 11))
    found = memory_of(LLAMA_8B, recipe, short)
    kept = kept_by(LLAMA_8B, recipe, 8 * 2048, short.gib)
    (first, away), (then, here) = kept.layers
    assert (first, then, away + here) == ("input on the host", "input", LLAMA_8B.layers)
    assert found.host_gib == away * 8 * 2048 * LLAMA_8B.hidden * 2 / 2**30
    assert f"{found.host_gib:.1f} GiB of inputs go to the machine's own memory, of which nobody says" in found.basis
    assert found.gib is not None
    assert found.gib < short.gib
    assert found.verdict == "fits"
    assert tokens_per_second(LLAMA_8B, recipe, short) == tokens_per_second(LLAMA_8B, recipe, enough)


def test_a_machine_without_the_memory_for_inputs_is_refused_and_each_remedy_is_not() -> None:
    recipe, short = recipe_of(batch_size=8, gradient_accumulation=1), CARDS["H200"]._replace(gib=11)
    host = memory_of(LLAMA_8B, recipe, short).host_gib
    assert host is not None
    enough, little = host + HOST_BASE_GIB, host + HOST_BASE_GIB - 0.1
    has = memory_of(LLAMA_8B, recipe, short, host_of_gib=enough)
    lacks = memory_of(LLAMA_8B, recipe, short, host_of_gib=little)
    assert (has.verdict, lacks.verdict) == ("fits", "does not fit")
    assert not lacks.is_short_of_gpu
    assert lacks.basis.endswith("too little")
    assert any(f"a machine with {enough:.0f} GiB" in fix for fix in lacks.fixes)
    changed = [dict(re.findall(r"(batch_size|gradient_accumulation|max_length) (\d+)", fix)) for fix in lacks.fixes]
    for changes in filter(None, changed):
        remedied = recipe_of(**recipe.training.model_dump() | {name: int(value) for name, value in changes.items()})
        assert memory_of(LLAMA_8B, remedied, short, host_of_gib=little).verdict == "fits"
    assert len(list(filter(None, changed))) == 2
    assert memory_of(LLAMA_8B, recipe, CARDS["H200"], host_of_gib=1).verdict == "fits"  # nothing goes there


def test_cards_that_multiply_in_e4m3_are_ada_hopper_and_blackwell() -> None:
    assert {gpu for gpu in CARDS if lacks_fp8(gpu)} == {
        *["A100", "A100-80GB", "A100-80GB-SXM", "A10", "A10G", "A40", "A6000", "RTXA6000", "RTX3090"]
    }
    assert lacks_fp8("T4")
    assert not lacks_fp8("Quantum")  # nobody knows: the job will tell


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
def test_an_evaluation_costs_a_third_of_a_pass_that_recomputes_and_half_of_one_that_does_not(packing: bool) -> None:
    recipe = recipe_of(batch_size=8, packing=packing)
    took = pace(LLAMA_8B, recipe, CARDS["H200"], full_batch(recipe))
    assert 0.4 < took.evaluated_micro_batch / took.micro_batch < 0.5
    took = pace(OTHER_8B, recipe, CARDS["H200"], full_batch(recipe))
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
    left_out = shape_of(LLAMA_8B_CONFIG | {"model_type": "qwen3", "num_attention_heads": 64})
    assert isinstance(left_out, Shape)
    assert left_out.head_dim == 128  # and not 4096 / 64


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
    masked, causal = (recipe_of(batch_size=8, packing=packing) for packing in (True, False))
    slow, less_slow = (tokens_per_second(OTHER_8B, recipe, CARDS["H200"]) for recipe in (masked, causal))
    assert slow < less_slow < tokens_per_second(LLAMA_8B, recipe_of(batch_size=8), CARDS["H200"])


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
    huge = recipe_of(batch_size=16, max_length=8192, packing=False)
    memory = memory_of(LLAMA_70B, huge, CARDS["H100"])
    assert memory.verdict == "does not fit"
    assert memory.fixes
    for fix in memory.fixes:
        changes = {name: int(value) for name, value in re.findall(r"(batch_size|max_length) (\d+)", fix)}
        remedied = memory_of(LLAMA_70B, recipe_of(**huge.training.model_dump() | changes), CARDS["H100"])
        assert remedied.verdict == "fits", fix
        needed = remedied.least_gib or remedied.gib
        assert f"{needed:.1f} GiB" in fix


def test_the_effective_batch_is_kept_by_the_remedy_that_makes_it_smaller() -> None:
    memory = memory_of(LLAMA_70B, recipe_of(batch_size=16, max_length=8192), CARDS["H100"])
    size, accumulation = (
        int(n) for n in re.findall(r"batch_size (\d+) with gradient_accumulation (\d+)", memory.fixes[0])[0]
    )
    assert size * accumulation == 16 * 4


def test_what_no_change_makes_fit_is_told_how_large_a_card_would_have_to_be() -> None:
    memory = memory_of(LLAMA_70B, recipe_of(batch_size=1), CARDS["A10G"])
    assert len(memory.fixes) == 1
    needed = float(re.findall(r"a GPU with (\d+) GiB", memory.fixes[0])[0])
    assert memory.gib is not None
    assert needed == pytest.approx(memory.gib / TIGHT, abs=1)


def test_sixteen_bit_bases_are_told_that_four_bits_would_do() -> None:
    memory = memory_of(LLAMA_8B, recipe_of("lora", max_length=4096, batch_size=16), CARDS["L4"])
    assert memory.verdict in ("tight", "does not fit")
    assert any('method "qlora"' in fix for fix in memory.fixes)
    assert memory.largest[0].name == "base weights in 16 bits"


def test_an_offer_can_be_asked_for_its_card() -> None:
    offer = Offer(cloud="runpod", gpu="H100-SXM", gpus=1, spot=True, usd_per_hour=2.0)
    assert card_of(offer.gpu, offer.cloud) == CARDS["H100"]
    assert Shape.model_validate(LLAMA_8B.model_dump()) == LLAMA_8B
