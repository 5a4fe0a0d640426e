"""Promise: the base is what its digests say, the adapter on it is saved and put back bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.contract.errors import Damaged, ModelInvalid
from job.contract.recipe import BaseModelRef
from job.fast.attention import Documents
from job.fast.model import FastModel
from job.model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_state,
    hardware,
    load,
    load_tokenizer,
    parameters,
    raise_adapter_to_fp32,
    read_adapter,
    set_adapter,
    write_adapter,
)
from job.notice import Notice
from job.train import Rows, Training
from job.weights import Base, locate
from tests.job.stack import adapted, bits, row, same_tensors, tiny_recipe

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
DORA = {"rank": 4, "alpha": 8, "dora": True}


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Path:
    """A folder of one's own with the built-in model."""
    return Path(shutil.copytree(base.folder, tmp_path / "model"))


# The base model.


def test_the_digests_are_those_of_the_files(base: Base) -> None:
    assert set(base.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name, digest in base.files.items():
        data = (base.folder / name).read_bytes()
        assert (digest.size, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_changed_byte_in_any_file_changes_the_digest(base: Base, copy: Path, name: str, tmp_path: Path) -> None:
    ref = BaseModelRef(id=str(copy))
    assert locate(ref, tmp_path).digest == base.digest
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    assert locate(ref, tmp_path).digest != base.digest


def test_a_file_that_came_changes_the_digest_if_it_decides_anything(base: Base, copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("hello")
    assert locate(BaseModelRef(id=str(copy)), tmp_path).digest == base.digest
    (copy / "chat_template.jinja").write_text("another")
    assert locate(BaseModelRef(id=str(copy)), tmp_path).digest != base.digest


def test_the_chat_template_has_a_digest_wherever_it_stands(base: Base, copy: Path, tmp_path: Path) -> None:
    assert base.chat_template_digest == locate(BaseModelRef(id=str(copy)), tmp_path).chat_template_digest
    (copy / "chat_template.jinja").write_text("another")
    located = locate(BaseModelRef(id=str(copy)), tmp_path)
    assert located.chat_template_digest == hashlib.sha256(b"another").hexdigest()


def test_a_digest_of_some_files_ignores_the_others_and_those_that_are_not_there(base: Base) -> None:
    assert base.digest_of("tokenizer.json", "merges.txt") == base.digest_of("tokenizer.json")
    assert base.digest_of("tokenizer.json") != base.digest_of("tokenizer_config.json")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    remove_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil",
    [shutil.rmtree, remove_weights, pickle_weights, lambda folder: (folder / "config.json").unlink()],
    ids=["no folder", "no weights", "pickled weights only", "no config"],
)
def test_a_folder_that_is_no_safe_model_is_refused_by_name(
    copy: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(copy)
    with pytest.raises(ModelInvalid, match=str(copy)) as raised:
        locate(BaseModelRef(id=str(copy)), tmp_path)
    assert "safe_serialization" in raised.value.hint


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage, and long enough for a header"),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "of the future"}'),
    ],
)
def test_weights_or_config_that_cannot_be_read_are_the_models_fault(
    copy: Path, tmp_path: Path, name: str, data: bytes
) -> None:
    (copy / name).write_bytes(data)
    recipe = tiny_recipe(base_model={"id": str(copy)})
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        load(recipe, locate(recipe.base_model, tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", b"garbage"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"type": "none"}, "added_tokens": []}'),
        ("tokenizer_config.json", b"garbage"),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_the_models_fault(
    copy: Path, tmp_path: Path, name: str, data: bytes
) -> None:
    (copy / name).write_bytes(data)
    with pytest.raises(ModelInvalid, match="cannot be loaded"):
        load_tokenizer(locate(BaseModelRef(id=str(copy)), tmp_path))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(copy: Path, tmp_path: Path) -> None:
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    tokenizer = load_tokenizer(locate(BaseModelRef(id=str(copy)), tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_padding_token_that_the_model_does_not_know_is_not_used(copy: Path, tmp_path: Path) -> None:
    """One was added to the tokenizer, and the model was never resized for it."""
    path, added = copy / "tokenizer_config.json", "<|added|>"
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens([added])
    tokenizer.save(str(copy / "tokenizer.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": added}))
    base = locate(BaseModelRef(id=str(copy)), tmp_path)
    loaded = load_tokenizer(base)
    assert loaded.convert_tokens_to_ids(added) == json.loads((copy / "config.json").read_text())["vocab_size"]
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nope"], "fits nothing in .* with 'nope'"),
        (["q_proj", "v_porj", "proj"], "fits nothing in .* with 'v_porj', 'proj'"),
        (["q_proj", "input_layernorm"], "fits nothing"),
        (["q_proj", "lm_head"], "the output layer"),
    ],
)
def test_target_modules_that_would_not_all_be_trained_are_refused(base: Base, targets: list[str], said: str) -> None:
    with pytest.raises(ModelInvalid, match=said) as raised:
        load(tiny_recipe(lora={"target_modules": targets}), base)
    assert "all-linear" in raised.value.hint


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", "model.layers.1.mlp.up_proj", "embed_tokens"])
def test_target_modules_are_named_as_peft_matches_them(base: Base, target: str) -> None:
    model = load(tiny_recipe(lora={"target_modules": [target]}), base)
    assert any(parameter.requires_grad for parameter in model.parameters())


# The model in memory.


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("dora", [True, False])
def test_the_number_of_parameters_is_the_published_one(base: Base, method: str, dora: bool) -> None:
    """As counted from the file: packed 4-bit weights count for what they stand for, the adapter not at all."""
    with safe_open(base.folder / "model.safetensors", "np") as file:
        stored = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118  it is no dict
    assert parameters(load(tiny_recipe(method=method, lora=DORA | {"dora": dora}), base)) == stored


def test_qlora_quantises_every_linear_layer_but_the_head_and_lora_none(base: Base) -> None:
    quantised = [m for m in load(tiny_recipe(), base).modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 2 * 7
    assert all(m.weight.quant_type == "nf4" and m.weight.compress_statistics for m in quantised)
    assert not [m for m in load(tiny_recipe(method="lora"), base).modules() if isinstance(m, Linear4bit)]


def test_a_model_that_was_published_in_4_bits_computes_what_it_does_when_they_are_made_here(
    base: Base, copy: Path, tmp_path: Path
) -> None:
    """Whatever types its publisher computed in: fp16 overflows."""
    logits = []
    for how in (None, BitsAndBytesConfig(load_in_4bit=True, **NF4, bnb_4bit_compute_dtype=torch.float16)):
        published = AutoModelForCausalLM.from_pretrained(base.folder, quantization_config=how, dtype=torch.float16)
        published.save_pretrained(copy)
        recipe = tiny_recipe(base_model={"id": str(copy)})
        model = load(recipe, locate(recipe.base_model, tmp_path))
        with torch.no_grad():
            logits.append(model(input_ids=torch.arange(24).reshape(2, 12)).logits)
    assert logits[0].dtype == torch.float32
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["fp8", "bitsandbytes"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_that_is_published_as_codes_is_refused(copy: Path, tmp_path: Path, kind: str, method: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    recipe = tiny_recipe(base_model={"id": str(copy)}, method=method)
    with pytest.raises(ModelInvalid, match="published quantised"):
        load(recipe, locate(recipe.base_model, tmp_path))


def test_the_seed_alone_decides_the_fresh_adapter(base: Base) -> None:
    first = adapter_state(load(tiny_recipe(), base))
    torch.manual_seed(12345)
    assert same_tensors(first, adapter_state(load(tiny_recipe(), base)))
    assert not same_tensors(first, adapter_state(load(tiny_recipe(training={"seed": 43}), base)))


def test_only_the_adapter_is_trained(base: Base) -> None:
    model = load(tiny_recipe(lora=DORA), base)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_the_4_bit_weights_are_the_same_bits_after_an_evaluation(base: Base) -> None:
    model = adapted(tiny_recipe(), base)
    weights = {name: p for name, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(weights) == 2 * 7
    before = {name: bits(p.data) for name, p in weights.items()}
    ids = torch.arange(40).reshape(2, 20)
    model.train()
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert {name: bits(p.data) for name, p in model.named_parameters() if name in weights} == before
    assert not any(getattr(p.quant_state, "packing_format_for_cpu", False) for p in weights.values())
    model.train()
    assert float(model(input_ids=ids, labels=ids).loss.detach()) == loss


@pytest.mark.parametrize("fast", [False, True], ids=["by the modules", "on the fast path"])
def test_a_batch_computes_the_same_whatever_longer_one_came_before_it(copy: Path, tmp_path: Path, fast: bool) -> None:
    """A run that is resumed has not met it. "dynamic" frequencies follow the longest row."""
    config = json.loads((copy / "config.json").read_text())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8, "rope_parameters": rope}))
    model = load(tiny_recipe(), locate(BaseModelRef(id=str(copy)), tmp_path)).eval()

    def computed(length: int) -> torch.Tensor:
        tokens = torch.arange(length)
        if fast:
            return FastModel(model).states(tokens, Documents.of([length], tokens.device))
        found: torch.Tensor = model(input_ids=tokens[None]).logits[0]
        return found

    with torch.no_grad():
        short, middle = computed(6), computed(12)
        assert not torch.equal(computed(20)[:12], middle), "the frequencies have followed the length"
        assert torch.equal(computed(12), middle)
        assert torch.equal(computed(6), short)


def test_the_adapters_masters_are_fp32_and_the_base_stays_as_it_was(base: Base) -> None:
    model = load(tiny_recipe(lora=DORA), base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does
    frozen = {name: bits(p.data) for name, p in model.named_parameters() if not p.requires_grad}
    raise_adapter_to_fp32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {name: bits(p.data) for name, p in model.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_training_trains_fp32_masters(base: Base, tokenizer: Any, tmp_path: Path, method: str) -> None:
    recipe = tiny_recipe(method=method, lora=DORA)
    rows = Rows([row(1, 8), row(2, 8)], [row(3, 8)])
    made = Training(recipe, load(recipe, base), tokenizer, rows, workdir=tmp_path, notice=Notice())
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    assert {tensor.dtype for tensor in adapter_state(made.model).values()} == {torch.float32}


# The adapter on the disk.


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_an_adapter_comes_back_bit_for_bit_and_computes_the_same(
    base: Base, tmp_path: Path, method: str, dora: bool
) -> None:
    recipe = tiny_recipe(method=method, lora=DORA | {"dora": dora})
    model = adapted(recipe, base)
    state = adapter_state(model)
    assert any("magnitude" in name for name in state) == dora
    write_adapter(state, adapter_config(model, recipe), tmp_path)
    fresh = load(recipe, base)
    raise_adapter_to_fp32(fresh)
    assert not same_tensors(adapter_state(fresh), state)
    set_adapter(fresh, read_adapter(tmp_path / ADAPTER_WEIGHTS))
    assert same_tensors(adapter_state(fresh), state)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_state_is_a_copy(base: Base) -> None:
    model = adapted(tiny_recipe(), base)
    state = adapter_state(model)
    kept = {name: bits(tensor) for name, tensor in state.items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    assert {name: bits(tensor) for name, tensor in state.items()} == kept


def test_equal_adapters_are_equal_bytes(base: Base, tmp_path: Path) -> None:
    recipe = tiny_recipe(lora=DORA)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model = adapted(recipe, base)
        write_adapter(adapter_state(model), adapter_config(model, recipe), tmp_path / name)
    for file in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


State = dict[str, torch.Tensor]


def without_one(state: State) -> State:
    return dict(list(state.items())[1:])


def with_another(state: State) -> State:
    return state | {"base_model.model.extra.lora_A.weight": torch.zeros(1)}


def misshapen(state: State) -> State:
    name = next(iter(state))
    return state | {name: state[name].T.contiguous()}


@pytest.mark.parametrize("spoil", [without_one, with_another, misshapen])
def test_tensors_that_are_not_this_adapters_are_damage_and_change_nothing(
    base: Base, spoil: Callable[[State], State]
) -> None:
    model = adapted(tiny_recipe(), base)
    before = adapter_state(model)
    with pytest.raises(Damaged, match="does not hold the tensors"):
        set_adapter(model, spoil({name: tensor + 1 for name, tensor in before.items()}))
    assert same_tensors(adapter_state(model), before)


def test_an_adapter_of_another_rank_is_damage(base: Base) -> None:
    with pytest.raises(Damaged):
        set_adapter(load(tiny_recipe(), base), adapter_state(load(tiny_recipe(lora={"rank": 8}), base)))


def config_text(folder: str) -> str:
    """What `adapter_config` says of the model in a folder; also run in processes of their own."""
    recipe = tiny_recipe(lora=DORA, method="lora")
    return adapter_config(load(recipe, locate(BaseModelRef(id=folder), Path(folder))), recipe)


@pytest.mark.slow
def test_the_adapters_config_is_the_same_text_in_every_process(base: Base) -> None:
    """PEFT keeps sets, and those are ordered by the process's hash seed."""
    here = config_text(str(base.folder))
    script = f"from tests.job.test_model import config_text\nprint(config_text({str(base.folder)!r}), end='')"
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONHASHSEED": other},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == here
    said = json.loads(here)
    assert said["target_modules"] == sorted(said["target_modules"])
    assert len(said["target_modules"]) > 5, "so few, that another hash seed may order them the same"


def test_the_adapters_config_names_the_base_as_the_recipe_does_and_no_path_of_this_machine(base: Base) -> None:
    text = adapter_config(load(tiny_recipe(), base), tiny_recipe())
    said = json.loads(text)
    assert said["base_model_name_or_path"] == "builtin:tiny"
    assert (said["r"], said["lora_alpha"], said["peft_type"], said["task_type"]) == (4, 8, "LORA", "CAUSAL_LM")
    assert said["inference_mode"] is True
    assert str(base.folder) not in text


def test_this_machine_has_a_name_and_memory() -> None:
    found = hardware()
    assert found.name
    assert found.memory_bytes > 2**28
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
