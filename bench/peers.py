"""What other stacks reach on the same shapes: whole training steps of TRL, Liger, Axolotl and Unsloth, timed.

    python bench/peers.py --list                               what is installed here, and what each is tried with
    python bench/peers.py --peer unsloth --shape 8B            all its settings for that shape, a process for each
    python bench/peers.py --peer unsloth --shape 8B --batch 8 [--no-recompute] [--packed] [--json]      one setting
    python bench/peers.py --smoke                              TRL on the tiny shape, on any machine, in seconds

A peer trains a Llama-like model with random weights made on the GPU (70B of them fit on few disks): NF4 with double
quantisation, LoRA r16 alpha 32 on all linears without dropout, full rows of 2048 tokens or rows packed into as many,
every token trained. What computes is the peer's own code as it ships; only the weights do not come from a file.

- trl: `SFTTrainer` and PEFT.
- liger: the same with Liger's kernels for norms, rotary embedding and SwiGLU.
- axolotl: Axolotl's LoRA kernels with Liger's others and its fused loss, in transformers' Trainer, which Axolotl's is.
  Only the files that compute are imported: the package as a whole pins other versions of everything.
- axolotl-trl: the same kernels in `SFTTrainer`.
- unsloth: `FastLanguageModel` and the `SFTTrainer` that it patches. Its loader is handed the model in memory.

Each runs in a process of its own, since Unsloth and the kernels patch transformers for the whole process. Packages may
lie in a folder instead of being installed: PEERS_SITE names it, with `liger`, `axolotl` and `unsloth` in it, each put
first on the import path of the peers that use it. An optimizer that is fused (torch's AdamW) is used for all: at these
sizes it is faster than the 8-bit one that most examples of these stacks name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from launch.shape import LLAMA_8B, LLAMA_70B, TINY_SHAPE, Shape

# Nothing that Unsloth patches may be imported before it: torch, transformers, PEFT and TRL are imported where used.

SHAPES: Final = {"tiny": TINY_SHAPE, "8B": LLAMA_8B, "70B": LLAMA_70B}
SITE: Final = "PEERS_SITE"
RANK: Final = 16
ALPHA: Final = 32
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS_PACKED: Final = 5
"""In each packed sequence, equally long, so that hardly two lengths are met: see bench/steps.py."""
UNKNOWN: Final = "<unk>"


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


SETTINGS: Final = (
    Setting("trl", "8B", 8),
    Setting("trl", "8B", 4, recompute=False),
    Setting("trl", "70B", 4),
    Setting("liger", "8B", 8),
    Setting("liger", "8B", 4, recompute=False),
    Setting("liger", "70B", 4),
    Setting("axolotl", "8B", 4, recompute=False),
    Setting("axolotl", "8B", 8, recompute=False),
    Setting("axolotl", "70B", 4),
    Setting("axolotl", "70B", 2, recompute=False),
    Setting("axolotl", "70B", 1, recompute=False),
    Setting("axolotl-trl", "8B", 4, recompute=False),
    Setting("axolotl-trl", "70B", 4),
    Setting("unsloth", "8B", 8),
    Setting("unsloth", "8B", 4, recompute=False),
    Setting("unsloth", "70B", 4),
    Setting("unsloth", "70B", 1, recompute=False),
)


@dataclass(frozen=True)
class Measured:
    """A setting, timed; or why it could not be.

    Args:
        seconds: of each step after the warm-up.
        tokens_per_second: of the median step. None where it did not run.
        gib: of torch's allocator while it trained. None without a GPU.
        loss: the mean over all steps. Random weights give about log(vocabulary) + 0.5: else something is amiss.
        trouble: None where it ran, and its loss is a number.
        versions: of the packages that took part.
    """

    setting: Setting
    seconds: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    gib: float | None = None
    loss: float | None = None
    trouble: str | None = None
    versions: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> str:
        return json.dumps({"name": self.setting.name, **asdict(self), "versions": dict(self.versions)})


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


def random_model(shape: Shape, dtype: Any = None) -> Any:
    """A Llama-like model with random weights, as transformers loads one with bitsandbytes: on the GPU where there is
    one, and without any weights in a file. bench/steps.py has the same for the job's own loading.

    Args:
        dtype: of the weights before they are quantised, and of what is computed; bf16 on a GPU, else fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    compute = dtype or (torch.bfloat16 if cuda else torch.float32)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    quantiser = Bnb4BitHfQuantizer(quantisation, pre_quantized=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config(shape), dtype=compute)
    quantiser.preprocess_model(model, dtype=compute, device_map={"": device})
    for module in model.modules():
        _fill(module, compute, device)
    with device:  # its frequencies are no weights: they are computed when it is made
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.hf_quantizer = quantiser
    model.config.quantization_config = quantisation
    quantiser.postprocess_model(model)
    model.config.use_cache = False
    model.eval()
    return model


def _fill(module: Any, dtype: Any, device: Any) -> None:
    """Ones in norms, and elsewhere what keeps the variance.

    In the checkpoint's dtype, whatever the empty ones have: bitsandbytes gives weights back in the dtype that it
    quantised, and Axolotl's kernels multiply them by activations as they are.
    """
    import torch
    from torch import nn

    for name, empty in list(module.named_parameters(recurse=False)):
        if empty.ndim == 1:
            value = torch.ones(empty.shape, dtype=dtype, device=device)
        else:
            value = torch.randn(empty.shape, dtype=dtype, device=device) * empty.shape[-1] ** -0.5
        if type(empty) is nn.Parameter:
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        else:  # bitsandbytes' own, which quantises what is moved
            setattr(module, name, type(empty)(value, requires_grad=False, **empty.__dict__).to(device))


def model_config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    )


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
        model=random_model(shape),
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
    model = kernels.apply_lora_kernel_patches(lora(random_model(shape)), kernels.DictDefault(known))
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
            return random_model(shape)

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


def add_to_path(peer: Peer) -> None:
    """Put the folders of PEERS_SITE first, if there is one."""
    if site := os.environ.get(SITE):
        sys.path[:0] = [str(Path(site).absolute() / folder) for folder in peer.folders]


def versions(peer: Peer) -> tuple[tuple[str, str], ...]:
    """Of its packages, and of what they stand on, as far as installed."""
    found = []
    for name in (*peer.packages, "transformers", "torch", "triton"):
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def timed(setting: Setting, *, steps: int, warm_up: int, optimizer: str = "adamw_torch_fused") -> Measured:
    """Train in this process. Where that fails, the traceback goes to stderr and its last line is the trouble."""
    peer = PEERS[setting.peer]
    add_to_path(peer)
    found = versions(peer)
    if peer.packages[0] not in dict(found):
        return Measured(setting, trouble=f"{peer.packages[0]} is not installed", versions=found)
    here = Path.cwd()
    # What Axolotl and Unsloth set for themselves, for all: it leaves less memory in pieces too small to use.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # Unsloth writes what it compiles where it is
        try:
            return _train(setting, Path(scratch), steps, warm_up, optimizer, found)
        except Exception as problem:
            traceback.print_exc()
            return Measured(setting, trouble=f"{type(problem).__name__}: {problem}", versions=found)
        finally:
            os.chdir(here)


def _train(
    setting: Setting, folder: Path, steps: int, warm_up: int, optimizer: str, found: tuple[tuple[str, str], ...]
) -> Measured:
    peer = PEERS[setting.peer]
    if setting.peer == "unsloth":
        import unsloth as _  # noqa: F401  (before torch: it sets what torch reads when it is first imported)
    import torch

    if peer.needs_gpu and not torch.cuda.is_available():
        return Measured(setting, trouble="needs an NVIDIA GPU", versions=found)
    cuda = torch.cuda.is_available()
    common = {
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": warm_up + steps,
        "learning_rate": 1e-5,
        "optim": optimizer,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    begun = time.perf_counter()
    trainer = peer.trainer(setting, folder, common)
    print(f"{setting.name}: ready after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    ends = _clock(trainer)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    if len(ends) != warm_up + steps + 1:
        raise AssertionError(f"{len(ends) - 1} steps, and not {warm_up + steps}")
    seconds = tuple(end - begin for begin, end in pairwise(ends))[warm_up:]
    return Measured(
        setting,
        seconds=seconds,
        tokens_per_second=setting.tokens / statistics.median(seconds),
        gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        loss=loss,
        trouble=None if math.isfinite(loss) else f"the loss is {loss}",
        versions=found,
    )


def _clock(trainer: Any) -> list[float]:
    """Lets the trainer note when it begins and when each step has ended on the GPU."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    def note() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        print(f"  step {len(ends) - 1}", file=sys.stderr, flush=True)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            note()

        def on_step_end(self, *_: object, **__: object) -> None:
            note()

    trainer.add_callback(Clock())
    return ends


def row_of(found: Measured) -> str:
    """A line of the table."""
    if found.tokens_per_second is None:
        return f"{found.setting.name:36} {found.trouble}"
    peak = "-" if found.gib is None else f"{found.gib:.1f}"
    said = ", ".join(f"{name} {version}" for name, version in found.versions)
    trouble = f"  TROUBLE: {found.trouble}" if found.trouble else ""
    speed = f"{found.tokens_per_second:8.0f} tok/s {peak:>6} GiB  loss {found.loss:.2f}{trouble}"
    return f"{found.setting.name:36} {speed}  {said}"


def apart(setting: Setting, *, steps: int, warm_up: int, optimizer: str = "adamw_torch_fused") -> Measured:
    """Train in a process of its own, whose stderr goes where this one's does."""
    command = [sys.executable, str(Path(__file__).absolute()), "--json", "--peer", setting.peer]
    command += ["--shape", setting.shape, "--batch", str(setting.batch), "--length", str(setting.length)]
    command += ["--steps", str(steps), "--warm-up", str(warm_up), "--optimizer", optimizer]
    command += ["--recompute" if setting.recompute else "--no-recompute"]
    command += ["--packed"] if setting.packed else []
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"name"'):
            return _read(json.loads(line))
    return Measured(setting, trouble=f"its process ended with {ended.returncode} and said nothing")


def _read(said: dict[str, Any]) -> Measured:
    del said["name"]
    said |= {
        "setting": Setting(**said["setting"]),
        "seconds": tuple(said["seconds"]),
        "versions": tuple(said["versions"].items()),
    }
    return Measured(**said)


def show_list() -> None:
    """What is installed, and the settings of each peer."""
    before = list(sys.path)
    for name, peer in PEERS.items():
        add_to_path(peer)
        found = dict(versions(peer))
        sys.path[:] = before
        there = peer.packages[0] in found
        print(f"{name}: " + (", ".join(f"{key} {found[key]}" for key in found) if there else "not installed"))
        for setting in SETTINGS:
            if setting.peer == name:
                print(f"    {setting.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, help="default: all that a peer has settings for")
    parser.add_argument("--batch", type=int, help="one setting, in this process; else all, each in its own")
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="default: as the list has it for that batch; else yes",
    )
    parser.add_argument("--packed", action="store_true", help=f"{ROWS_PACKED} rows in each sequence")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="a name that transformers knows")
    parser.add_argument("--smoke", action="store_true", help="TRL on the tiny shape; needs no GPU")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", action="store_true", help="an object for each setting, a line each")
    asked = parser.parse_args(arguments)
    how = {"steps": asked.steps, "warm_up": asked.warm_up, "optimizer": asked.optimizer}
    if asked.list:
        show_list()
        return 0
    if asked.smoke:
        results = [timed(Setting("trl", "tiny", 2, asked.recompute is not False, asked.packed, 96), **how)]
    elif asked.batch is not None:
        if not (asked.peer and len(asked.peer) == 1 and asked.shape):
            parser.error("--batch is of one setting: name its --peer and its --shape too")
        [peer] = asked.peer
        listed = [each for each in SETTINGS if (each.peer, each.shape, each.batch) == (peer, asked.shape, asked.batch)]
        recompute = asked.recompute if asked.recompute is not None else listed[0].recompute if listed else True
        setting = Setting(peer, asked.shape, asked.batch, recompute, asked.packed, asked.length)
        results = [timed(setting, **how)]
    else:
        chosen = [
            setting
            for setting in SETTINGS
            if setting.peer in (asked.peer or PEERS) and asked.shape in (None, setting.shape)
        ]
        results = [apart(setting, **how) for setting in chosen]
    for found in results:
        print(found.as_json() if asked.json else row_of(found), flush=True)
    return 0 if any(found.tokens_per_second for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
