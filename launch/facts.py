"""What a quote rests on, fetched: the base model's shape, its size, and the lengths of the dataset's rows.

What cannot be had is said, with its reason; it is never invented, and a plan goes on without it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from job.contract.base_model import TOKENIZER_FILES
from job.contract.errors import FtjobError
from job.contract.recipe import TINY_MODEL
from launch.base_model import read_file
from launch.hub import Hub, Pinned
from launch.quote import Facts
from launch.shape import TINY_SHAPE, Shape, shape_of
from launch.tokens import Sample, can_count, measure

_DECIDE: Final = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
"""Any of these is a tokenizer."""


def find_facts(
    base_model: Pinned, train: Sample, held_out: Sample | None, *, hub: Hub, variables: Mapping[str, str]
) -> Facts:
    """Fetch what there is: some megabytes at most, and some seconds where transformers is installed.

    Args:
        variables: the environment: HF_HOME and HF_HUB_CACHE tell where the hub's files may be already.
    """
    name = base_model.ref.id
    if name == TINY_MODEL:
        lengths = [measure(each, base_model=name, tokenizer="") for each in (train, held_out) if each is not None]
        return Facts(TINY_SHAPE, 0, lengths[0], lengths[1] if held_out is not None else None)
    with tempfile.TemporaryDirectory(prefix="ftjob-") as folder:
        tokenizer = _tokenizer(base_model, hub, Path(folder), variables)
        first = measure(train, base_model=name, tokenizer=tokenizer)
        second = measure(held_out, base_model=name, tokenizer=tokenizer) if held_out is not None else None
    return Facts(_shape(base_model, hub), base_model.bytes or None, first, second)


def _shape(base_model: Pinned, hub: Hub) -> Shape | str:
    try:
        config = json.loads(read_file(base_model.ref, "config.json", hub=hub))
    except FtjobError as error:
        return error.message
    except ValueError:
        return "its config.json is not JSON"
    return shape_of(config) if isinstance(config, dict) else "its config.json is not an object"


def _tokenizer(base_model: Pinned, hub: Hub, folder: Path, variables: Mapping[str, str]) -> Path | str:
    """A folder with the tokenizer's files, or why there is none."""
    if not can_count():
        return "transformers is not installed beside ftjob"
    ref = base_model.ref
    if not any(name in _DECIDE for name in base_model.files):
        return "the base model has no tokenizer among its files" if base_model.files else "its files are not known"
    if not ref.is_on_hub and not ref.is_in_bucket:
        return Path(ref.id)
    if ref.is_on_hub and (cached := _cached(ref.id, ref.revision or "", variables)) is not None:
        return cached
    names = [name for name in base_model.files if name in (*TOKENIZER_FILES, "config.json")]
    try:
        for name in names:
            (folder / name).write_bytes(read_file(ref, name, hub=hub))
    except FtjobError as error:
        return error.message
    return folder


def _cached(name: str, commit: str, variables: Mapping[str, str]) -> Path | None:
    """Where Hugging Face's own tools keep a commit's files, if its tokenizer is among them (huggingface_hub 1.16,
    "Understand caching")."""
    home = variables.get("HF_HOME") or f"{variables.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = Path(variables.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    return snapshot if commit and (snapshot / "tokenizer.json").is_file() else None
