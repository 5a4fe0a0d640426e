"""Promise: a base model need not be a Llama: what transformers loads is trained, and its losses are the tokens'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from job.callbacks import Steering
from job.contract.errors import ModelInvalid
from job.contract.metrics import MetricLine, Step
from job.contract.recipe import BaseModelRef
from job.dataset.render import RenderedRow
from job.model import adapter_state, load, load_tokenizer
from job.notice import Notice
from job.tiny import write_tiny_model
from job.train import Rows, Training
from job.weights import locate
from tests.job.stack import row, same_tensors, tiny_recipe

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "router_aux_loss_coef": 5.0,
}
SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "no hidden_act": {
        name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    | {"model_type": "falcon"},
    "layers of several sizes": SMALL | TWO_KINDS | {"model_type": "gemma4_text"},
    "images too, and no count of tokens": {
        "model_type": "gemma4",
        "text_config": SMALL | TWO_KINDS,
        "vision_config": SEEN,
        "audio_config": None,
    },
    "experts": SMALL | EXPERTS | {"model_type": "qwen2_moe"},
}
LENGTHS = [4, 30, 7, 25, 12, 3, 18, 9, 22, 6]
ROWS = Rows([row(n, length) for n, length in enumerate(LENGTHS, start=1)], [row(11, 20), row(12, 9), row(13, 5)])


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """Random weights, and the built-in model's tokenizer."""
    write_tiny_model(folder)
    torch.manual_seed(0)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    (folder / "model.safetensors").unlink()
    made.float().save_pretrained(folder)
    return folder


def training(folder: Path, work: Path, rows: Rows = ROWS, **how: Any) -> Training:
    small = {"epochs": 1, "batch_size": 2, "gradient_accumulation": 3, "packing": False, "max_length": 32}
    recipe = tiny_recipe(base_model={"id": str(folder)}, method="lora", training=small | how)
    base = locate(BaseModelRef(id=str(folder)), work)
    return Training(recipe, load(recipe, base), load_tokenizer(base), rows, workdir=work, notice=Notice())


def run(made: Training) -> list[Step]:
    lines: list[MetricLine] = []
    save: Callable[[Any], float] = lambda _: 0.0  # noqa: E731
    made.run(Steering(made, Notice(), save=save, write=lines.append, interval=3600.0, upload_seconds=lambda: 0.0))
    return [line for line in lines if isinstance(line, Step)]


def loss_of(model: Any, rows: list[RenderedRow]) -> float:
    """Mean nats of their trained tokens, from nothing but the logits of each row alone."""
    total, count = torch.zeros(()), 0
    for one in rows:
        labels = torch.tensor(one.labels)[1:]
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([one.ids])).logits[0, :-1]
        total += cross_entropy(logits, labels, reduction="sum")
        count += int((labels >= 0).sum())
    return float(total) / count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_and_its_losses_are_the_mean_over_all_its_trained_tokens(tmp_path: Path, family: str) -> None:
    made = training(write_model(tmp_path / "model", FAMILIES[family]), tmp_path / "work")
    fresh = adapter_state(made.model)
    made.model.eval()
    expected, held_out = loss_of(made.model, ROWS.train), loss_of(made.model, ROWS.held_out)
    assert made.evaluate() == pytest.approx(held_out, rel=1e-4)
    steps = run(made)
    assert len(steps) == 2
    # A fresh adapter adds nothing, and after one step at the rate of a warm-up next to nothing.
    counts = [sum(ROWS.train[number - 1].trained_tokens for number in step.rows) for step in steps]
    mean = sum(step.loss * count for step, count in zip(steps, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(expected, rel=1e-2)
    assert not same_tensors(adapter_state(made.model), fresh)


# A tokenizer and a model that were not made for each other.


def _edited(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def without_padding_or_end(folder: Path) -> None:
    _edited(folder, pad_token=None, eos_token=None)


def padding_that_the_model_never_grew_for(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _edited(folder, pad_token="[PAD]")


@pytest.mark.parametrize("change", [without_padding_or_end, padding_that_the_model_never_grew_for])
def test_what_rows_are_filled_up_with_changes_nothing(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write_tiny_model(tmp_path / "plain")
    change(Path(shutil.copytree(tmp_path / "plain", tmp_path / "changed")))
    plain, changed = (training(tmp_path / name, tmp_path / f"work {name}") for name in ("plain", "changed"))
    assert plain._trainer.data_collator.pad_token_id != changed._trainer.data_collator.pad_token_id == 0
    assert [step.loss for step in run(plain)] == [step.loss for step in run(changed)]
    assert same_tensors(adapter_state(plain.model), adapter_state(changed.model))


def test_a_row_with_a_token_that_the_model_does_not_have_is_refused_by_its_line(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    strange = RenderedRow(row(7, 4).line, (1, 2, 259, 4), (1, 2, 259, 4))
    with pytest.raises(ModelInvalid, match="line 7 has token 259, and the base model has 259"):
        training(tmp_path / "model", tmp_path / "work", Rows(ROWS.train, [strange]))


def test_experts_that_share_a_weight_and_dropout_are_refused_by_the_name_of_the_setting(tmp_path: Path) -> None:
    config = SMALL | EXPERTS | {"model_type": "qwen3_moe"}
    folder = write_model(tmp_path / "model", config)
    recipe = tiny_recipe(base_model={"id": str(folder)}, lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    with pytest.raises(ModelInvalid, match=r"lora\.dropout") as raised:
        load(recipe, locate(recipe.base_model, tmp_path / "work"))
    assert "set lora.dropout to 0" in raised.value.hint
