"""The base model and the adapter on it: located, digested, loaded in 4 bits, saved and put back."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from job.checkpoints import digest_file
from job.contract.errors import Damaged, ModelInvalid, TrainingFailed
from job.contract.recipe import TINY_MODEL, BaseModelRef, Recipe
from job.contract.records import FileDigest, Hardware
from job.dataset.render import TOKENIZER_FILES
from job.tensors import frozen, write_tensors
from job.tiny import write_tiny_model

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"

_READ_FROM_HUB: Final = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


@dataclass(frozen=True)
class Base:
    """The base model's files on this machine."""

    folder: Path
    files: dict[str, FileDigest]

    @property
    def digest(self) -> str:
        """Sha256 over the names and digests of all files."""
        listed = json.dumps({name: digest.sha256 for name, digest in self.files.items()}, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def chat_template_digest(self) -> str:
        """Sha256 of the chat template's text: a file of its own, or a key of tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
        config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return hashlib.sha256(json.dumps(config.get("chat_template")).encode()).hexdigest()

    def digest_of(self, *names: str) -> str:
        """The same over some of the files; absent ones count as absent."""
        listed = json.dumps({name: self.files[name].sha256 for name in names if name in self.files}, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()


def locate(ref: BaseModelRef, workdir: Path) -> Base:
    """Bring the base model's files to this machine and digest them.

    Raises:
        ModelInvalid: it is missing, or has no safetensors weights (pickled weights can run code and are never loaded).
    """
    if ref.id == TINY_MODEL:
        folder = workdir / "base"
        write_tiny_model(folder)
    elif ref.is_on_hub:
        folder = _download(ref)
    else:
        folder = Path(ref.id).expanduser()
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise ModelInvalid(
            f"base model {ref.id} has no config.json and *.safetensors in {folder}",
            hint="a model's folder is what save_pretrained(..., safe_serialization=True) writes",
        )
    names = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)
    files = [*(folder / name for name in names if (folder / name).is_file()), *weights]
    return Base(folder, {path.name: digest_file(path) for path in files})


def _download(ref: BaseModelRef) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(ref.id, revision=ref.revision, allow_patterns=[*_READ_FROM_HUB, *TOKENIZER_FILES])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelInvalid(
            f"base model {ref.id} cannot be downloaded: {error}",
            hint="check the id and the revision; for a gated model set HF_TOKEN and accept its licence on its page",
        ) from error


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
        ModelInvalid: the weights cannot be loaded, or the recipe's target_modules name nothing in it.
        TrainingFailed: they do not fit into the GPU.
    """
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
            quantization_config=quantisation if recipe.method == "qlora" else None,
            device_map={"": 0} if cuda else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            f"base model {recipe.base_model.id} does not fit into the memory of this GPU: {error}",
            hint='choose a larger GPU, or method "qlora"',
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelInvalid(f"base model {recipe.base_model.id} cannot be loaded: {error}") from error
    _keep_weights_as_quantised(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    set_seed(recipe.training.seed)  # the adapter's initialisation is random
    try:
        return get_peft_model(model, _lora_config(recipe))
    except ValueError as error:
        raise ModelInvalid(
            f"lora.target_modules fits nothing in {recipe.base_model.id}: {error}",
            hint='leave lora.target_modules out for "all-linear"',
        ) from error


def _keep_weights_as_quantised(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation.

    On CPUs with AVX512-BF16 it converts them for an inference kernel that rounds to bf16, and training goes on with the
    converted ones: a run that evaluated and one that has not yet would compute different losses.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def parameters(model: Any) -> int:
    """Number of parameters of the base model, as published: 4-bit weights are packed two to a byte."""
    return sum(
        parameter.numel() * (2 if parameter.__class__.__name__ == "Params4bit" else 1)
        for parameter in model.get_base_model().parameters()
        if not parameter.requires_grad
    )


def _lora_config(recipe: Recipe) -> LoraConfig:
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
