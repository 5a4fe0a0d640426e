"""The stacks that bench/peers.py times: how each sets up its trainer, by its own code as it ships.

- trl: `SFTTrainer` and PEFT.
- liger: the same with Liger's kernels for norms, rotary embedding and SwiGLU.
- axolotl: Axolotl's LoRA kernels with Liger's others and its fused loss, in transformers' Trainer, which Axolotl's is.
  Only the files that compute are imported: the package as a whole pins other versions of everything.
- axolotl-trl: the same kernels in `SFTTrainer`.
- unsloth: `FastLanguageModel` and the `SFTTrainer` that it patches. Its loader is handed the model in memory.

Nothing that Unsloth patches may be imported before it: torch, transformers, PEFT and TRL are imported where used.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from workload import ROWS_PACKED, SHAPES, llama_config, random_model

from launch.shape import Shape

RANK: Final = 16
ALPHA: Final = 32
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNKNOWN: Final = "<unk>"
SPECIAL: Final = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "architectures": ["LlamaForCausalLM"]}


@dataclass(frozen=True)
class Setting:
    """What a peer is asked to do.

    Args:
        batch: sequences in a step.
        recompute: whether activations are recomputed in the backward pass, in the peer's own way.
        packed: whether each sequence is several rows that must not see each other.
    """

    peer: str
    shape: str
    batch: int
    recompute: bool = True
    packed: bool = False
    length: int = 2048

    @property
    def name(self) -> str:
        how = f"{'' if self.recompute else ', no recompute'}{', packed' if self.packed else ''}"
        return f"{self.peer} {self.shape} {self.batch}x1{how}"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * (self.length // ROWS_PACKED * ROWS_PACKED if self.packed else self.length)


@dataclass(frozen=True)
class Peer:
    """How a stack is set up.

    Args:
        trainer: makes its trainer for a setting; the folder is scratch, and its working directory.
        packages: distributions whose versions are said, the first of them the one that says whether it is installed.
        folders: of PEERS_SITE.
    """

    trainer: Callable[[Setting, Path, dict[str, Any]], Any]
    packages: tuple[str, ...]
    folders: tuple[str, ...] = ()
    needs_gpu: bool = True


def model_config(shape: Shape) -> Any:
    """With the tokens of `make_tokenizer`."""
    return llama_config(shape, **SPECIAL)


def make_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that knows as many tokens as the model; rows are token ids already, but every stack wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(4, vocabulary)}
    own = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, UNKNOWN: 3} | words, unk_token=UNKNOWN))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=own, **special)


def make_rows(setting: Setting, steps: int) -> Any:
    """Token ids that fill so many steps, as a dataset."""
    from datasets import Dataset

    draw = random.Random(7)
    parts = ROWS_PACKED if setting.packed else 1
    known = range(4, SHAPES[setting.shape].vocabulary)
    count, length = steps * setting.batch * parts, setting.length // parts
    return Dataset.from_dict({"input_ids": [draw.choices(known, k=length) for _ in range(count)]})


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, lora_config(LoraConfig))


def lora_config(kind: Any) -> Any:
    return kind(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _sft(setting: Setting, folder: Path, common: dict[str, Any], **own: Any) -> Any:
    """TRL's configuration; tokens beyond what a row has are never there, so nothing is cut."""
    from trl import SFTConfig

    return SFTConfig(output_dir=str(folder), max_length=setting.length, packing=setting.packed, **common, **own)


def trl(setting: Setting, folder: Path, common: dict[str, Any], **own: Any) -> Any:
    from peft import LoraConfig
    from trl import SFTTrainer

    shape = SHAPES[setting.shape]
    return SFTTrainer(
        model=random_model(model_config(shape)),
        args=_sft(setting, folder, common, gradient_checkpointing=setting.recompute, **own),
        train_dataset=make_rows(setting, common["max_steps"]),
        processing_class=make_tokenizer(shape.vocabulary),
        peft_config=lora_config(LoraConfig),
    )


def liger(setting: Setting, folder: Path, common: dict[str, Any]) -> Any:
    return trl(setting, folder, common, use_liger_kernel=True)


def _axolotl_model(setting: Setting, folder: Path, *, fused_loss: bool) -> Any:
    """The model with Axolotl's LoRA kernels in it, and Liger's for all else, as its documentation sets them up.

    Liger's come first: Axolotl copies the attention's code with the rotary embedding that it finds.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=fused_loss
    )
    kernels = _axolotl_kernels()
    shape = SHAPES[setting.shape]
    model_config(shape).save_pretrained(folder)
    known = {"base_model": str(folder), "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": True}
    kernels.patch_self_attn_lora(kernels.DictDefault(known))
    model = kernels.apply_lora_kernel_patches(lora(random_model(model_config(shape))), kernels.DictDefault(known))
    attention = model.base_model.model.model.layers[0].self_attn
    if attention.apply_qkv.__func__ is not kernels.apply_lora_qkv:
        raise RuntimeError("Axolotl did not put its kernels in")
    return model


def _axolotl_kernels() -> Any:
    """`axolotl.monkeypatch.lora_kernels`, past a package between that imports all of Axolotl's dependencies."""
    import types

    import axolotl.utils

    between = types.ModuleType("axolotl.utils.callbacks")
    between.__path__ = [str(Path(axolotl.utils.__path__[0]) / "callbacks")]
    sys.modules.setdefault(between.__name__, between)
    return importlib.import_module("axolotl.monkeypatch.lora_kernels")


def axolotl(setting: Setting, folder: Path, common: dict[str, Any]) -> Any:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    if setting.packed:
        raise NotImplementedError("packed rows need flash-attn there")
    model = _axolotl_model(setting, folder, fused_loss=True)
    if setting.recompute:
        model.enable_input_require_grads()
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), gradient_checkpointing=setting.recompute, **common),
        train_dataset=make_rows(setting, common["max_steps"]),
        data_collator=DataCollatorForLanguageModeling(make_tokenizer(SHAPES[setting.shape].vocabulary), mlm=False),
    )


def axolotl_trl(setting: Setting, folder: Path, common: dict[str, Any]) -> Any:
    from trl import SFTTrainer

    return SFTTrainer(
        model=_axolotl_model(setting, folder, fused_loss=False),
        args=_sft(setting, folder, common, gradient_checkpointing=setting.recompute),
        train_dataset=make_rows(setting, common["max_steps"]),
        processing_class=make_tokenizer(SHAPES[setting.shape].vocabulary),
    )


def unsloth(setting: Setting, folder: Path, common: dict[str, Any]) -> Any:
    """Its loader reads a folder with a configuration and a tokenizer, and is given the model that they describe."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    import unsloth.models.llama as patched
    from unsloth import FastLanguageModel  # isort: skip
    from trl import SFTTrainer  # isort: skip

    shape, checkpoint = SHAPES[setting.shape], folder / "checkpoint"
    model_config(shape).save_pretrained(checkpoint)
    make_tokenizer(shape.vocabulary).save_pretrained(checkpoint)

    class InMemory(patched.AutoModelForCausalLM):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> Any:
            return random_model(model_config(shape))

    patched.AutoModelForCausalLM = InMemory
    recompute = "unsloth" if setting.recompute else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint),
        max_seq_length=setting.length,
        load_in_4bit=True,
        use_exact_model_name=True,
        use_gradient_checkpointing=recompute,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(LINEARS),
        use_gradient_checkpointing=recompute,
    )
    # Where it recomputes, its examples leave this to the default; TRL's default would switch it on again.
    own = {} if setting.recompute else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=model,
        args=_sft(setting, folder, common, **own),
        train_dataset=make_rows(setting, common["max_steps"]),
        processing_class=tokenizer,
    )


PEERS: Final = {
    "trl": Peer(trl, ("trl", "peft", "bitsandbytes"), needs_gpu=False),
    "liger": Peer(liger, ("liger-kernel", "trl", "peft", "bitsandbytes"), ("liger",)),
    "axolotl": Peer(axolotl, ("axolotl", "liger-kernel", "peft", "bitsandbytes"), ("axolotl", "liger")),
    "axolotl-trl": Peer(axolotl_trl, ("axolotl", "liger-kernel", "trl", "peft", "bitsandbytes"), ("axolotl", "liger")),
    "unsloth": Peer(unsloth, ("unsloth", "unsloth-zoo", "trl", "peft", "bitsandbytes"), ("unsloth",)),
}
