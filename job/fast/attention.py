"""Causal attention within documents that lie end to end, by the fastest kernel that torch has for them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

_SAYS_GROUPED: Final = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""From torch 2.12 on; before, grouped heads are seen by their numbers."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the GPU has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Documents:
    """How long each is. They share a batch and never see each other."""

    lengths: tuple[int, ...]
    starts: Tensor
    """(documents + 1), int32, on the device of the batch."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), ends))
        return cls(tuple(lengths), to_device(starts, device))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def positions(self) -> Tensor:
        """(tokens), on the CPU: each document's begin at 0."""
        return torch.cat([torch.arange(length) for length in self.lengths])


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """(M, heads, D), (M, kv heads, D) twice -> (M, heads, D).

    Documents of one length are a batch of the dense kernel (cuDNN on Hopper); others go through the kernel for ragged
    ones (FlashAttention), and on a CPU one after another.
    """
    if len(set(documents.lengths)) == 1:
        return _dense(query, key, value, len(documents.lengths))
    if query.is_cuda:
        return _ragged(query, key, value, documents)
    each = [torch.split(t, list(documents.lengths)) for t in (query, key, value)]
    parts = [_dense(q, k, v, 1) for q, k, v in zip(*each, strict=True)]
    return torch.cat(parts)


def _dense(query: Tensor, key: Tensor, value: Tensor, batch: int) -> Tensor:
    q, k, v = (torch.unflatten(t, 0, (batch, -1)).transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)


def _ragged(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    longest, starts = max(documents.lengths), documents.starts
    grouped: dict[str, Any] = {"enable_gqa": True} if _SAYS_GROUPED and query.shape[1] != key.shape[1] else {}
    found = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0), **grouped)
    assert isinstance(found, Tensor)  # noqa: S101 - the rest comes only when it is asked for
    return found
