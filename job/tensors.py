"""Trees of tensors on the disk: safetensors for the tensors, JSON for the rest. Never pickle.

A tree is what torch's state_dicts and RNG states are made of: dicts with string or integer keys, lists, tuples,
tensors, and None, bool, int, float, str. Floats survive JSON exactly: Python writes the shortest text that reads back
as the same double.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_TENSOR: Final = "$tensor"
_TUPLE: Final = "$tuple"
_ITEMS: Final = "$items"


@dataclass(frozen=True)
class FrozenTree:
    """A tree copied to the CPU: the original may go on changing while this is written."""

    encoded: Any
    tensors: dict[str, torch.Tensor]

    def save(self, stem: Path) -> None:
        """Write it as `stem`.safetensors and `stem`.json. Raises OSError."""
        write_tensors(self.tensors, stem.with_name(stem.name + ".safetensors"))
        stem.with_name(stem.name + ".json").write_text(json.dumps(self.encoded) + "\n", encoding="utf-8")


def freeze(tree: Any) -> FrozenTree:
    """Copy a tree.

    Raises:
        TypeError: it holds something else than a tree may.
    """
    tensors: dict[str, torch.Tensor] = {}
    return FrozenTree(_encode(tree, "", tensors), tensors)


def frozen(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError, whatever the library calls it (a full disk, mostly)."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def load_tree(stem: Path) -> Any:
    """Read what `FrozenTree.save` wrote; tensors come to the CPU."""
    tensors = load_file(stem.with_name(stem.name + ".safetensors"))
    return _decode(json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8")), tensors)


def _encode(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    match tree:
        case None | bool() | int() | float() | str():
            return tree
        case torch.Tensor():
            name = path
            while name in tensors:  # the keys 1 and "1", "a/b" and a's "b" have equal paths
                name += "'"
            tensors[name] = frozen(tree)
            return {_TENSOR: name}
        case list():
            return [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(tree)]
        case tuple():
            return {_TUPLE: [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(tree)]}
        case dict():
            for key in tree:
                if not isinstance(key, str | int):
                    raise TypeError(f"{path or 'the tree'} has the key {key!r}, which is not saved")
            # As pairs: JSON would turn integer keys into texts.
            return {_ITEMS: [[key, _encode(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
        case _:
            raise TypeError(f"{path or 'the tree'} is a {type(tree).__name__}, which is not saved")


def _decode(encoded: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(encoded, list):
        return [_decode(item, tensors) for item in encoded]
    if isinstance(encoded, dict):
        if _TENSOR in encoded:
            return tensors[encoded[_TENSOR]]
        if _TUPLE in encoded:
            return tuple(_decode(item, tensors) for item in encoded[_TUPLE])
        return {key: _decode(value, tensors) for key, value in encoded[_ITEMS]}
    return encoded
