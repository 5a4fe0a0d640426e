"""Promise: as much is kept for the backward pass as memory allows, and never more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from job.contract.errors import ModelInvalid
from job.contract.fast_path import ON_HOST, TRAVELLING, Keep, Shape, what_to_keep
from job.contract.recipe import Lora
from job.fast.attention import Documents
from job.fast.layer import Where
from job.fast.linear import refresh
from job.fast.model import FastModel
from job.fast.offload import HostMemory
from job.speed import shape_of, speed_up
from job.weights import Base
from launch.fast_path import layer_shape
from launch.shape import Shape as ModelShape
from launch.shape import shape_of as shape_told_by
from tests.job.stack import adapted, tiny_recipe

LLAMA_70B = Shape(
    layers=80,
    hidden=8192,
    heads=10240,
    attended=8192,
    feed_forward=28672,
    rank=112,
    weights=8192 * 18432 + 3 * 8192 * 28672,
)
GIB = 2**30
CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
"""Heads that are wider together than the stream between layers, as in Qwen 3's 0.6B, 4B and 32B."""


@pytest.fixture(params=[LlamaConfig, Qwen3Config], ids=["Llama", "Qwen 3"])
def wide_heads(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param(**CONFIG)).bfloat16()
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_what_a_layer_keeps_is_what_is_counted(wide_heads: Any) -> None:
    """Bytes of all that `_Kept` holds on to, whatever shares a tensor's memory counted once."""
    fast, tokens = FastModel(wide_heads), 16
    layer = fast.layers[0]
    refresh(layer.groups, torch.bfloat16)
    angle = torch.randn(tokens, layer.head_dim // 2)
    inputs = HostMemory().for_batch([], angle)
    where = Where(Documents.of([tokens], angle.device), angle.cos(), angle.sin(), inputs)
    _, kept = layer.run(torch.randn(tokens, 32).bfloat16(), where, differentiable=True)
    found = [part for value in vars(kept).values() for part in (value if isinstance(value, tuple) else (value,))]
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in found if part is not None}
    counted = shape_of(fast).kept("all") * tokens
    assert counted - 16 * tokens < sum(memory.values()) <= counted


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_what_is_held_of_the_weights_is_what_is_counted(wide_heads: Any, fp8: bool) -> None:
    fast = FastModel(wide_heads)
    if fp8:
        fast.use_fp8()
    fast.keep_dequantised()
    groups = [group for layer in fast.layers for group in layer.groups]
    held = [group.frozen._kept for group in groups]
    held += [part for group in groups if group.fp8 for part in (group.fp8._rows, group.fp8._columns)]
    assert sum(weight.nbytes for weight in held if weight is not None) == shape_of(fast).dequantised(fp8=fp8)


def test_the_launcher_counts_what_the_job_counts(wide_heads: Any) -> None:
    told = shape_told_by(wide_heads.config.to_dict())
    assert isinstance(told, ModelShape)
    assert layer_shape(told, Lora(rank=4)) == shape_of(FastModel(wide_heads))


@given(tokens=st.integers(1, 20_000), room=st.integers(-GIB, 200 * GIB))
def test_what_is_kept_fits_and_one_layer_more_would_not(tokens: int, room: int) -> None:
    keeps = what_to_keep(LLAMA_70B, tokens, room)
    assert len(keeps) == LLAMA_70B.layers
    used = LLAMA_70B.kept_by(keeps) * tokens
    least = LLAMA_70B.kept("input") * (1 + TRAVELLING) * tokens
    assert used <= max(room, least)
    richer: dict[Keep, Keep] = {"input on the host": "input", "input": "no gate and up", "no gate and up": "all"}
    for keep in set(keeps) - {"all"}:
        last = len(keeps) - 1 - keeps[::-1].index(keep)
        if keep == "input" and ON_HOST in keeps:
            continue  # what is on the host comes first
        assert LLAMA_70B.kept_by([*keeps[:last], richer[keep], *keeps[last + 1 :]]) * tokens > room


@given(tokens=st.integers(1, 20_000), room=st.integers(-GIB, 3 * GIB))
def test_layers_keep_their_input_on_the_host_only_where_not_all_fit_the_first_and_never_the_last(
    tokens: int, room: int
) -> None:
    keeps = what_to_keep(LLAMA_70B, tokens, room)
    fits = room >= LLAMA_70B.kept("input") * LLAMA_70B.layers * tokens
    assert fits != (ON_HOST in keeps)
    assert ON_HOST not in keeps[keeps.count(ON_HOST) :]
    assert keeps[-1] != ON_HOST
    assert LLAMA_70B.on_host(keeps) == 2 * 8192 * keeps.count(ON_HOST)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_so_few_layers_that_none_would_be_spared_stay_on_the_gpu(layers: int) -> None:
    assert what_to_keep(replace(LLAMA_70B, layers=layers), 2048, 0) == ["input"] * layers


@pytest.mark.parametrize(
    ("keep", "tokens", "gib"),
    [("all", 2048, 29.3), ("no gate and up", 6144, 33.4), ("input", 6144, 8.9)],
)
def test_the_bytes_are_those_that_were_measured(keep: Any, tokens: int, gib: float) -> None:
    """Differences of torch.cuda.max_memory_allocated between batches of 2048 and of more tokens: 70B on one H200,
    2026-11-23."""
    passing = 2 * (4 * LLAMA_70B.feed_forward + 6 * LLAMA_70B.hidden)
    assert (LLAMA_70B.kept(keep) * LLAMA_70B.layers + passing) * tokens / GIB == pytest.approx(gib, rel=0.06)


def test_without_a_gpu_everything_goes_through_the_modules(base: Base) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    recipe = tiny_recipe()
    assert speed_up(recipe, adapted(recipe, base), tokens=64, longest=64) is None
    fp8 = tiny_recipe(training={"precision": "fp8"})
    with pytest.raises(ModelInvalid, match="no GPU") as refused:
        speed_up(fp8, adapted(fp8, base), tokens=64, longest=64)
    assert "bf16" in refused.value.hint
