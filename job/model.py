"""The base model and the adapter on it: loaded in 4 bits, saved and put back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from job.contract.errors import Damaged, ModelInvalid, TrainingFailed
from job.contract.quantised import is_quantised, refuse_quantised
from job.contract.recipe import Recipe
from job.contract.records import Hardware
from job.dataset.control import read_object
from job.dataset.render import RenderedRow
from job.tensors import frozen, write_tensors
from job.weights import Base

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"


def check_gpu() -> None:
    """Refuse to train on the CPU of a machine whose GPU is paid for. Raises TrainingFailed."""
    if not torch.cuda.is_available():
        raise TrainingFailed(
            "this machine's GPU cannot be used, and training on its CPU would only cost money",
            hint="the image needs an NVIDIA driver of version 580 or newer (CUDA 13); another cloud may have it",
        )


def hardware() -> Hardware:
    """What this process computes on."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return Hardware(device="cuda", name=card.name, memory_bytes=card.total_memory, count=torch.cuda.device_count())
    pages: int = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(device="cpu", name=f"CPU {torch.backends.cpu.get_cpu_capability()}", memory_bytes=pages, count=1)


def load_tokenizer(base: Base) -> Any:
    """The base model's own tokenizer.

    Raises:
        ModelInvalid: there is none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a strange file leads it to
        raise ModelInvalid(f"the tokenizer in {base.folder} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(recipe: Recipe, base: Base) -> Any:
    """The base model, frozen and quantised as the recipe says, with a fresh adapter on it (initialised by the seed).

    Raises:
        ModelInvalid: the weights cannot be loaded, or one of the recipe's target_modules names nothing in it that can
            be trained.
        TrainingFailed: they do not fit into the GPU.
    """
    published = _is_published_quantised(recipe, base)
    cuda = torch.cuda.is_available()
    # On a CPU bf16 arithmetic is emulated: fp32 is exact and faster.
    compute = torch.bfloat16 if cuda else torch.float32
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=compute,
            device_map={"": 0} if cuda else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # Not as None: that would hide from transformers that weights are codes.
            **({"quantization_config": quantisation} if recipe.method == "qlora" and not published else {}),
        )
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            f"base model {recipe.base_model.id} does not fit into the memory of this GPU: {error}",
            hint='choose a larger GPU, or method "qlora"',
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelInvalid(f"base model {recipe.base_model.id} cannot be loaded: {error}") from error
    settle_quantised(model, compute)
    _forget_longer_batches(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    set_seed(recipe.training.seed)  # the adapter's initialisation is random
    _check_targets(recipe, model)
    try:
        return get_peft_model(model, lora_config(recipe))
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise ModelInvalid(
                f"lora.dropout cannot be had in {recipe.base_model.id}: {error}",
                hint="set lora.dropout to 0: an adapter on experts, which share one weight, has none",
            ) from error
        raise ModelInvalid(
            f"lora.target_modules fits nothing in {recipe.base_model.id}: {error}",
            hint='leave lora.target_modules out for "all-linear"',
        ) from error


def padding_token(tokenizer: Any, model: Any) -> int:
    """What shorter rows are filled up with. It is masked, so that any token will do that the model has: tokenizers may
    have none for it, or one that was added and the model never grew for."""
    token: int | None = tokenizer.pad_token_id
    return token if token is not None and token < _embedded(model) else 0


def check_tokens(rows: Iterable[RenderedRow], model: Any) -> None:
    """Raises ModelInvalid for rows with tokens that the model does not have: a GPU would end with an assertion."""
    for row in rows:
        if max(row.ids) >= _embedded(model):
            raise ModelInvalid(
                f"line {row.line} has token {max(row.ids)}, and the base model has {_embedded(model)}",
                hint="its tokenizer was given tokens for which it never grew: resize its embeddings",
            )


def _embedded(model: Any) -> int:
    """How many tokens the model has."""
    return int(model.get_input_embeddings().weight.shape[0])


def _is_published_quantised(recipe: Recipe, base: Base) -> bool:
    """Whether the weights are in 4 bits already. Raises ModelInvalid when they cannot be trained so."""
    try:
        config = read_object(base.folder / "config.json")
    except ModelInvalid:
        return False  # whoever loads it says what is wrong
    if (refused := refuse_quantised(config, recipe.method, model=recipe.base_model.id)) is not None:
        raise refused
    return is_quantised(config)


def _check_targets(recipe: Recipe, model: Any) -> None:
    """That every name of target_modules is one in this model: PEFT is content with one of them, and would train less
    than was asked for without a word.

    Raises:
        ModelInvalid: names those that are none; or one is the output layer, whose adapter the loss would pass by, or
            shares its weight.
    """
    modules = dict(model.named_modules())
    found = recipe.lora.targets_in(modules)
    nothing = [target for target, fitting in found.items() if not fitting]
    if nothing:
        raise ModelInvalid(
            f"lora.target_modules fits nothing in {recipe.base_model.id} with {', '.join(map(repr, nothing))}",
            hint='correct it, or leave lora.target_modules out for "all-linear"',
        )
    named = {id(modules[name]) for fitting in found.values() for name in fitting}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if id(head) in named:
        raise ModelInvalid(
            f"lora.target_modules names the output layer of {recipe.base_model.id}: its adapter would not be trained, "
            "since the loss is computed with the layer's own weights",
            hint='leave it out, or lora.target_modules for "all-linear"',
        )
    if head is not None and head.weight is embedding.weight and id(embedding) in named:
        raise ModelInvalid(
            f"lora.target_modules names the embedding of {recipe.base_model.id}, which is its output layer too: an "
            "adapter is trained as the embedding's alone, and would change both where it is merged",
            hint='leave it out, or lora.target_modules for "all-linear"',
        )


def settle_quantised(model: Any, compute: torch.dtype) -> None:
    """Let nothing but the weights' codes decide what 4-bit weights compute.

    A model that was published in 4 bits names the types of whoever published it, fp16 perhaps, which overflows. And on
    CPUs with AVX512-BF16 bitsandbytes repacks weights at the first evaluation, for an inference kernel that rounds to
    bf16, and training goes on with those: a run that evaluated and one that has not yet would compute different losses.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = compute, True
            module.weight.quant_state.dtype = compute


def _forget_longer_batches(model: Any) -> None:
    """Make what a batch computes a function of that batch.

    Rotary frequencies of the type "dynamic" follow the longest row, and transformers keeps those of the longest that it
    has met (5.17, modeling_rope_utils.py, dynamic_frequency_update). A run that is resumed has not met it.
    """

    def as_new(module: Any, _: Any) -> None:
        module.max_seq_len_cached = module.original_max_seq_len
        module.inv_freq = module.original_inv_freq

    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_forward_pre_hook(as_new)


def parameters(model: Any) -> int:
    """Number of parameters of the base model, as published: 4-bit weights are packed two to a byte."""
    return sum(
        parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
        for parameter in model.get_base_model().parameters()
        if not parameter.requires_grad
    )


def lora_config(recipe: Recipe) -> LoraConfig:
    targets = recipe.lora.target_modules
    return LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
        use_dora=recipe.lora.dora,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )


def raise_adapter_to_fp32(model: Any) -> None:
    """Make the adapter's weights fp32 masters.

    TRL casts them to bf16 on a quantised base: most updates of a small learning rate are then rounded away, and a
    resume is not exact, since PEFT loads them as fp32.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


AdapterState = dict[str, torch.Tensor]
"""The adapter's tensors under PEFT's names, on the CPU, never written to."""


def adapter_state(model: Any) -> AdapterState:
    """A copy of the adapter as it is now."""
    return {name: frozen(tensor) for name, tensor in _live_adapter_state(model).items()}


def adapter_config(model: Any, recipe: Recipe) -> str:
    """The text of PEFT's adapter_config.json; equal adapters give equal texts."""
    config = model.peft_config["default"].to_dict()
    config |= {
        "inference_mode": True,
        "base_model_name_or_path": recipe.base_model.id,
        "revision": recipe.base_model.revision,
        # PEFT keeps a set, whose order differs from process to process.
        "target_modules": sorted(config["target_modules"]),
    }
    return json.dumps(config, indent=2, sort_keys=True, default=_as_json) + "\n"


def write_adapter(state: AdapterState, config: str, folder: Path) -> None:
    """Write PEFT's own two files; equal adapters give equal bytes. Raises OSError."""
    write_tensors(state, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(config, encoding="utf-8")


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def read_adapter(path: Path) -> AdapterState:
    """The tensors of a saved adapter."""
    state: AdapterState = load_file(path)
    return state


def set_adapter(model: Any, state: AdapterState) -> None:
    """Put an adapter back, bit for bit.

    Raises:
        Damaged: these are not exactly this adapter's tensors.
    """
    expected = {name: tensor.shape for name, tensor in _live_adapter_state(model).items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise Damaged("the saved adapter does not hold the tensors of this recipe's adapter")
    set_peft_model_state_dict(model, state)


def _live_adapter_state(model: Any) -> AdapterState:
    # False: the base model's embeddings are not the adapter's, and looking for changes in them would ask the hub.
    state: AdapterState = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
