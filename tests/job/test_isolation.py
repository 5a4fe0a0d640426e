"""Promise: a model in which packed rows see each other does not train packed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from job.contract.errors import ModelInvalid
from job.isolation import prove_isolation
from job.notice import Notice
from job.train import Rows, Training
from job.weights import Base
from tests.job.stack import adapted, row, tiny_recipe

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
LEAKY: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},  # a state space
    "bloom": {"vocab_size": 256, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi, which asks no positions
}


def random_model(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_built_in_model_keeps_packed_rows_apart(base: Base, method: str) -> None:
    prove_isolation(adapted(tiny_recipe(method=method), base), autocast=contextlib.nullcontext)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_round_otherwise_are_no_leak(dtype: torch.dtype) -> None:
    prove_isolation(random_model("mixtral", **SMALL, num_local_experts=4).to(dtype), autocast=contextlib.nullcontext)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEAKY)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_sees_the_row_before_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelInvalid, match="packed rows would see each other in this base model") as raised:
        prove_isolation(random_model(kind, **LEAKY[kind]).to(dtype), autocast=contextlib.nullcontext)
    assert raised.value.hint == "set training.packing to false"


def test_a_model_that_cannot_be_asked_is_refused() -> None:
    class Stubborn(torch.nn.Linear):
        def forward(self, input_ids: Any) -> Any:
            raise AssertionError

    with pytest.raises(ModelInvalid, match=r"cannot compute packed rows: .*position_ids") as raised:
        prove_isolation(Stubborn(2, 2), autocast=contextlib.nullcontext)
    assert raised.value.hint == "set training.packing to false"


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_mode_gradients_and_random_state_alone(base: Base, training: bool) -> None:
    model = adapted(tiny_recipe(lora={"dropout": 0.5}), base).train(training)
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    prove_isolation(model, autocast=contextlib.nullcontext)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_model_that_draws_at_random_moves_no_random_state() -> None:
    class Drawing(torch.nn.Linear):
        def forward(self, input_ids: Any, **_: Any) -> Any:  # type: ignore[override]
            torch.rand(5)
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 256))

    model = Drawing(2, 2)  # its weights are drawn too
    before = torch.get_rng_state()
    prove_isolation(model, autocast=contextlib.nullcontext)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_training_asks_its_model_only_if_it_packs(base: Base, tokenizer: Any, tmp_path: Path, packing: bool) -> None:
    recipe = tiny_recipe(training={"packing": packing, "max_length": 32})
    training = Training(
        recipe, adapted(recipe, base), tokenizer, Rows([row(1, 9)], []), workdir=tmp_path, notice=Notice()
    )
    training.prove_isolation()
    training.model = random_model("mamba", **LEAKY["mamba"])
    with pytest.raises(ModelInvalid) if packing else contextlib.nullcontext():
        training.prove_isolation()
