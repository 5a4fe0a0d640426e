"""What is known of a base model without its weights: its config.json, its shape, and its tokenizer's files.

What cannot be had is said, with its reason; it is never invented, and a plan goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from job.contract.base_model import INDEX, TOKENIZER_FILES, WHOLE, refuse_weights
from job.contract.errors import FtjobError, ModelInvalid
from job.contract.recipe import TINY_MODEL
from job.dataset.control import control_tokens
from launch.base_model import read_file
from launch.hub import Hub, Pinned
from launch.quote import Facts
from launch.shape import TINY_SHAPE, Shape, shape_of
from launch.steps import Lengths

TINY_CONTROL_TOKENS: Final = frozenset({"<|pad|>", "<|im_start|>", "<|im_end|>"})
"""Of the built-in model. A test holds it to what the job writes."""
_DECIDE: Final = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
"""Any of these is a tokenizer."""
_WANTED: Final = (*TOKENIZER_FILES, "config.json", "generation_config.json")


@dataclass(frozen=True)
class ModelFacts:
    """A base model as far as its small files tell.

    Args:
        config: its config.json, or why it is not known.
        tokenizer: folder of its small files, or the built-in model's id; None where there is none.
        why: the reason then.
        refused: why it cannot be trained at all.
        control_tokens: texts that no row may hold.
    """

    base_model: Pinned
    config: Mapping[str, Any] | str
    tokenizer: str | None = None
    why: str = ""
    refused: ModelInvalid | None = None
    control_tokens: frozenset[str] = frozenset()

    @property
    def shape(self) -> Shape | str:
        if self.base_model.ref.id == TINY_MODEL:
            return TINY_SHAPE
        return self.config if isinstance(self.config, str) else shape_of(self.config)

    def quoted(self, train: Lengths, held_out: Lengths | None) -> Facts:
        """What a quote rests on."""
        size = 0 if self.base_model.ref.id == TINY_MODEL else self.base_model.bytes or None
        return Facts(self.shape, size, train, held_out)


def look_at(base_model: Pinned, *, hub: Hub, variables: Mapping[str, str], folder: Path) -> ModelFacts:
    """Fetch what there is: some megabytes at most.

    Args:
        variables: the environment: HF_HOME and HF_HUB_CACHE tell where the hub's files may be already.
        folder: for files that have to be brought here, and are found there the next time.
    """
    if base_model.ref.id == TINY_MODEL:
        return ModelFacts(base_model, {}, TINY_MODEL, control_tokens=TINY_CONTROL_TOKENS)
    config = _config(base_model, hub)
    if base_model.files and not any(name in _DECIDE for name in base_model.files):
        no_tokenizer = ModelInvalid(
            f"base model {base_model.ref.id} has no tokenizer among its files",
            hint=f"add one of {', '.join(sorted(_DECIDE))}: tokenizer.save_pretrained writes it",
        )
        return ModelFacts(base_model, config, why=no_tokenizer.message, refused=no_tokenizer)
    if (refused := _unfindable(base_model, config, hub)) is not None:
        return ModelFacts(base_model, config, why=refused.message, refused=refused)
    try:
        tokenizer = _tokenizer(base_model, hub, folder, variables)
        if isinstance(tokenizer, str):
            return ModelFacts(base_model, config, why=tokenizer)
        return ModelFacts(base_model, config, str(tokenizer), control_tokens=control_tokens(tokenizer))
    except ModelInvalid as error:
        return ModelFacts(base_model, config, why=error.message, refused=error)
    except FtjobError as error:
        return ModelFacts(base_model, config, why=error.message)
    except OSError as error:
        return ModelFacts(base_model, config, why=f"{folder} cannot be written: {error.strerror or error}")


def _unfindable(base_model: Pinned, config: Mapping[str, Any] | str, hub: Hub) -> ModelInvalid | None:
    """Why the weights cannot be loaded, as far as the names of their files tell: the job would bring them first."""
    files = base_model.files
    if not files or WHOLE in files or (not isinstance(config, str) and config.get("transformers_weights")):
        return None
    try:
        index = read_file(base_model.ref, INDEX, hub=hub) if INDEX in files else None
    except FtjobError:
        return None  # out of reach now; the job looks again
    return refuse_weights(files, index, model=base_model.ref.id)


def _config(base_model: Pinned, hub: Hub) -> Mapping[str, Any] | str:
    try:
        config = json.loads(read_file(base_model.ref, "config.json", hub=hub))
    except FtjobError as error:
        return error.message
    except ValueError:
        return "its config.json is not JSON"
    return config if isinstance(config, dict) else "its config.json is not an object"


def _tokenizer(base_model: Pinned, hub: Hub, folder: Path, variables: Mapping[str, str]) -> Path | str:
    """A folder with the tokenizer's files, or why there is none. Raises FtjobError: they cannot be fetched."""
    ref, names = base_model.ref, [name for name in base_model.files if name in _WANTED]
    if not ref.is_on_hub and not ref.is_in_bucket:
        return Path(ref.id)
    commit = (ref.revision or "") if ref.is_on_hub else ""
    if commit and (cached := _cached(ref.id, commit, names, variables)) is not None:
        return cached
    name = hashlib.sha256(f"{ref.id}@{commit}".encode()).hexdigest()[:32]
    if (folder / name).is_dir():
        return folder / name
    if not names:
        return "the base model's files are not known"
    staged = folder / f".{name}.{uuid.uuid4().hex}"
    staged.mkdir(parents=True)
    for each in names:
        (staged / each).write_bytes(read_file(ref, each, hub=hub))
    try:
        return staged.rename(folder / name)
    except OSError:  # another launcher was faster
        return folder / name


def _cached(name: str, commit: str, names: list[str], variables: Mapping[str, str]) -> Path | None:
    """Where Hugging Face's own tools keep a commit's files, if all of these are among them (huggingface_hub 1.16,
    "Understand caching")."""
    home = variables.get("HF_HOME") or f"{variables.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = Path(variables.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    wanted = names or ["tokenizer.json", "tokenizer_config.json", "config.json"]
    return snapshot if all((snapshot / each).is_file() for each in wanted) else None
