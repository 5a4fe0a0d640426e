"""A base model as a recipe names it -> one that means the same from anywhere, with its files known and their size."""

from __future__ import annotations

import os
from pathlib import Path

from job.contract.base_model import model_files
from job.contract.errors import AccessRefused, BadInput, FtjobError, ModelInvalid, NotFound
from job.contract.layout import Key
from job.contract.recipe import TINY_MODEL, BaseModelRef
from job.dataset.source import local_path
from job.storage import Store, open_store
from launch.home import from_home
from launch.hub import Hub, Pinned


def pin(ref: BaseModelRef, *, folder: Path, hub: Hub) -> Pinned:
    """What a reference means.

    Args:
        folder: the recipe's own, which a relative folder starts from.

    Raises:
        ModelInvalid: it is missing, may not be had, or has no safetensors.
        Unreachable: the hub or the bucket is out of reach for now.
    """
    if ref.id == TINY_MODEL:
        return Pinned(ref)
    if ref.id.startswith("builtin:"):
        raise ModelInvalid(f"base_model.id {ref.id!r} is not built in", hint=f"the built-in model is {TINY_MODEL!r}")
    if ref.is_on_hub:
        try:
            return hub.pin(ref)
        except FtjobError as error:
            if (folder / ref.id).is_dir():
                error.hint = f"for the folder beside the recipe write ./{ref.id}"
            raise
    try:
        if ref.is_in_bucket:
            return _in_bucket(ref)
        return _on_this_machine(ref, folder)
    except AccessRefused as error:
        raise ModelInvalid(f"base model {ref.id} cannot be read: {error.message}", hint=error.hint) from error


def read_file(ref: BaseModelRef, name: str, *, hub: Hub) -> bytes:
    """A small file of a pinned base model, that is not the built-in one.

    Raises:
        ModelInvalid: it is not there, or may not be read.
        Unreachable: its place is out of reach for now.
    """
    if ref.is_on_hub:
        return hub.file(ref, name)
    try:
        if ref.is_in_bucket:
            return _store(ref).get(Key(name))
        return (_path(ref, Path("/")) / name).read_bytes()
    except (NotFound, OSError) as error:
        raise ModelInvalid(f"base model {ref.id} has no {name} that can be read", hint="check its folder") from error
    except AccessRefused as error:
        raise ModelInvalid(f"base model {ref.id} cannot be read: {error.message}", hint=error.hint) from error


def _in_bucket(ref: BaseModelRef) -> Pinned:
    store = _store(ref)
    sizes = {str(info.key): info.size for info in store.list("")}
    if not sizes:
        raise ModelInvalid(f"base model {ref.id} does not exist: nothing is stored there", hint="check the uri")
    return _pinned(ref, str(store.uri), sizes)


def _on_this_machine(ref: BaseModelRef, folder: Path) -> Pinned:
    path = _path(ref, folder)
    try:
        if not path.is_dir():
            raise ModelInvalid(f"base model {ref.id} is not a folder ({path})", hint="paths are relative to the recipe")
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    except OSError as error:
        raise ModelInvalid(f"base model {ref.id} cannot be read: {error.strerror or error}") from error
    return _pinned(ref, str(path), sizes)


def _path(ref: BaseModelRef, folder: Path) -> Path:
    path = local_path(str(_store(ref).uri)) if "://" in ref.id else None
    if path is not None:
        return path
    return Path(os.path.normpath(folder.absolute() / from_home(ref.id)))


def _store(ref: BaseModelRef) -> Store:
    try:
        return open_store(ref.id)
    except BadInput as error:
        raise ModelInvalid(f"base model {ref.id}: {error.message}", hint=error.hint) from error


def _pinned(ref: BaseModelRef, absolute: str, sizes: dict[str, int]) -> Pinned:
    files = model_files(sizes, where=absolute)
    pinned = ref.model_copy(update={"id": absolute})
    return Pinned(pinned, files=tuple(files), bytes=sum(sizes[name] for name in files))
