"""Products with a narrow side, an adapter's: the reference for job/fast/triton_narrow.py, and what runs where Triton
does not.

Shapes: M tokens, K or N features, R ranks (tens). Sums are in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from job.fast.dropout import Dropout

Widened = tuple[Tensor, Tensor]
"""What an adapter adds to (M, N), unmultiplied: (M, R) and (R, N)."""


def narrow(x: Tensor, down: Tensor, dropout: Dropout | None) -> Tensor:
    """x down^T, of what is kept of x; (M, K), (R, K) -> (M, R)."""
    return (dropout(x) if dropout else x) @ down.T


def narrow_gradient(inner: Tensor, x: Tensor, dropout: Dropout | None) -> Tensor:
    """inner^T x, of what is kept of x: the gradient of `down`; (M, R), (M, K) -> (R, K)."""
    return inner.T @ (dropout(x) if dropout else x)


def widen(pair: Widened, onto: Sequence[Tensor], dropout: Dropout | None, *, over: bool = False) -> Tensor:
    """The product of the pair, of which only what `narrow` read is kept, and the sum with `onto`: (M, N).

    Args:
        onto: (M, N) each, none to two of them.
        over: write over the first of them.
    """
    found = pair[0] @ pair[1]
    if dropout:
        found = dropout(found)
    for more in onto:
        found = found + more
    return onto[0].copy_(found) if over else found


def widened(pair: Widened | None, wide: Tensor, dropout: Dropout | None = None) -> Tensor:
    """`wide`, in fp32 or more, and what the adapter adds."""
    if pair is None:
        return wide
    found = pair[0].to(wide.dtype) @ pair[1].to(wide.dtype)
    return wide + (dropout(found) if dropout else found)
