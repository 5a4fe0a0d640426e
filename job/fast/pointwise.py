"""What lies between the matrix multiplications: the reference for triton_pointwise, triton_heads and triton_swiglu in
job/fast/, and what runs where Triton does not.

Shapes: M tokens, K features; sums are in fp32 (or wider), values in the dtype of the activations. A function says which
of its arguments it uses up: a kernel may write its result over them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from job.fast.dropout import Dropout
from job.fast.narrow import Widened, narrow, widened

FP8: Final = torch.float8_e4m3fn
FP8_LARGEST: Final = 448.0
"""Largest finite e4m3 (Micikevicius et al. 2022, arXiv:2209.05433)."""

Small = tuple[Tensor, Tensor]
"""A matrix in e4m3, (M, K), and what its rows are to be multiplied by, (M, 1) in fp32."""


class HeadNorms(NamedTuple):
    """Weights of the norms over each head's features of q and of k, (D), and their epsilon. As Qwen 3 has them."""

    query: Tensor
    key: Tensor
    epsilon: float


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, quantise: bool) -> tuple[Tensor, Tensor, Small | None]:
    """(x / rms(x) * weight, 1 / rms(x), the first in e4m3 if that is asked for); (M, K) -> (M, K), (M, 1).

    Rounded where transformers' LlamaRMSNorm rounds.
    """
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    found = normed(x, weight, scale)
    return found, scale, to_fp8(found) if quantise else None


def rms_norm_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor, *, quantise: bool
) -> tuple[Tensor, Small | None]:
    """Gradient of x, of which `beside` is what comes by the residual; and in e4m3 if that is asked for. Uses up
    `gradient`."""
    unit = _wide(x) * scale
    inner = _wide(gradient) * _wide(weight)
    own = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    found = (own + _wide(beside)).to(x.dtype)
    return found, to_fp8(found) if quantise else None


def normed(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """rms_norm again, from its scale."""
    return weight * (_wide(x) * scale).to(x.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary position embedding of the first `heads` heads; (M, all heads, D), cos and sin (M, D/2) in fp32 or wider.

    The rest, the values, stays. Source: Su et al. 2021, arXiv:2104.09864, halves paired as in Llama. A negative sin
    gives the gradient; also the inverse, unless cos and sin are scaled (YaRN). Uses up `states`.
    """
    rotated = _turned(_wide(states[:, :heads]), cos, sin).to(states.dtype)
    return torch.cat((rotated, states[:, heads:]), dim=1)


def _turned(wide: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = wide.chunk(2, dim=-1)
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def rotate_gradient(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of the three, turned back and beside one another: (M, all heads, D)."""
    states = torch.cat((query, key, value), dim=1)
    return rotate(states, cos, -sin, query.shape[1] + key.shape[1])


def norm_and_rotate(
    states: Tensor, norms: HeadNorms, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """q and k of `states`, each head normed and then rotated: (M, all heads, D) -> (M, heads, D), (M, kv heads, D).

    Rounded where transformers' Qwen3RMSNorm rounds. `states` stay: their gradient is made from them.
    """
    query, key = states[:, :heads], states[:, heads : heads + kv_heads]
    found = [
        _turned(_wide(rms_norm(part, weight, norms.epsilon, quantise=False)[0]), cos, sin).to(states.dtype)
        for part, weight in ((query, norms.query), (key, norms.key))
    ]
    return found[0], found[1]


def norm_and_rotate_gradient(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, norms: HeadNorms, cos: Tensor, sin: Tensor
) -> Tensor:
    """Gradient of `states` from those of the three: (M, all heads, D). Uses up `states`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    found = []
    for gradient, part, weight in (
        (query, states[:, :heads], norms.query),
        (key, states[:, heads : heads + kv_heads], norms.key),
    ):
        back = _turned(_wide(gradient), cos, -sin)
        _, scale, _ = rms_norm(part, weight, norms.epsilon, quantise=False)
        found.append(rms_norm_gradient(back, part, weight, scale, back.new_zeros(()), quantise=False)[0])
    return torch.cat((*found, value), dim=1)


def swiglu(
    gate_up: Tensor, adapter: Widened | None, *, quantise: bool, gate_ranks: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """(silu(gate) * up, once the adapter is added to both, its largest number in each row); (M, 2F) -> (M, F), (M).

    Args:
        quantise: whether the second is wanted.
        gate_ranks: so many of the adapter's ranks add to gate alone, and the others to up alone: elsewhere there are
            zeros, which need not be multiplied.
    """
    gate, up = widened(adapter, _wide(gate_up)).chunk(2, dim=-1)
    act = (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
    return act, _largest(act) if quantise else None


def swiglu_gradient(
    gradient: Tensor,
    gate_up: Tensor,
    adapter: Widened | None,
    more: Widened | None,
    dropout: Dropout | None,
    *,
    quantise: bool,
    gate_ranks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of gate_up, swiglu(gate_up) again, the gradient's largest number in each row). Uses up the first two.

    Args:
        quantise: whether the last is wanted.
        adapter, gate_ranks: as `swiglu` has them.
        more: what is to be added to `gradient`, (M, F), by the adapter that reads the result through `dropout`.
    """
    gate, up = widened(adapter, _wide(gate_up)).chunk(2, dim=-1)
    wide = widened(more, _wide(gradient), dropout)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    of_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    found = torch.cat((of_gate, wide * silu), dim=-1).to(gate_up.dtype)
    return found, (silu * up).to(gate_up.dtype), _largest(found) if quantise else None


def _largest(x: Tensor) -> Tensor:
    return x.float().abs().amax(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss in nats, gradient of the logits); (P, V), (P,) -> (), (P, V). Uses up `logits`."""
    wide = _wide(logits)
    log_sum = torch.logsumexp(wide, dim=-1, keepdim=True)
    loss = (log_sum.squeeze(-1) - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).sum()
    hit = torch.arange(logits.shape[-1], device=logits.device).unsqueeze(0) == targets.unsqueeze(-1)
    return loss, (torch.exp(wide - log_sum) - hit.to(wide.dtype)).to(logits.dtype)


def to_fp8(x: Tensor) -> Small:
    """x in e4m3, a scale for each row; (M, K)."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
    return (wide / scale).to(FP8), scale


def narrow_quantised(x: Tensor, down: Tensor, dropout: Dropout | None, largest: Tensor) -> tuple[Tensor, Small]:
    """(narrow(x, down, dropout), x in e4m3); the largest number of each of its rows is known, (M)."""
    del largest  # of use to those who read x once
    return narrow(x, down, dropout), to_fp8(x)
