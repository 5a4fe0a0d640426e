"""Packed rows must not see each other: proved on the loaded model itself before it trains.

Attention keeps rows apart by their positions. A layer that carries a state along the sequence (linear attention, a
state space, a convolution), or an attention that ignores positions, does not, and training says nothing: it learns to
answer from its neighbours in the pack.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from job.batches import Collator, to_dataset
from job.contract.errors import ModelInvalid
from job.dataset.reader import LineNumber
from job.dataset.render import RenderedRow
from job.fast.attention import Documents
from job.fast.model import FastModel
from job.logs import get_logger
from job.memory import is_out_of_memory
from job.randomness import undisturbed

LENGTHS: Final = (12, 10, 8)
"""Tokens of the three documents; packing lays the longest first."""
IDS: Final = 256
"""Below it ids are bytes or words with every tokenizer, and not an image's placeholder."""
NOISE: Final = 4
"""How many times the change by what follows, which is rounding alone, the change by what goes before may be."""

_ADVICE: Final = "set training.packing to false"


def prove_isolation(
    model: Any, *, autocast: Callable[[], AbstractContextManager[Any]], fast: FastModel | None = None
) -> None:
    """Pack three short documents as `job.batches` packs rows, and see whether the second depends on the first.

    Masked tokens contribute exact zeros, so that nothing at all should change; but experts that get other shares of the
    tokens round otherwise. How much is seen from a change of the third document, which no causal model looks ahead to.
    Changes neither random state nor mode.

    Args:
        autocast: the context that the training computes in.
        fast: computes in place of the model's modules.

    Raises:
        ModelInvalid: it depends on it, or the model cannot be asked.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with undisturbed(), torch.no_grad(), autocast():
            as_it_is, before, behind = (_second(model, fast, changed) for changed in (None, 0, 2))
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelInvalid(f"the base model cannot compute packed rows: {error}", hint=_ADVICE) from error
    finally:
        for module, mode in modes:
            module.training = mode
    seen, noise, largest = _change(as_it_is, before), _change(as_it_is, behind), float(as_it_is.abs().max())
    # Half precision in one place rounds as half precision in all.
    coarsest = max(torch.finfo(weight.dtype).eps for weight in model.parameters() if weight.is_floating_point())
    allowed = max(NOISE * noise, coarsest / 2 * largest)
    isolated = seen <= allowed  # not so for NaN, which proves nothing
    get_logger().info("isolation.proved" if isolated else "isolation.refuted", change=seen, noise=noise)
    if not isolated:
        raise ModelInvalid(
            f"packed rows would see each other in this base model: a row's output changes by {seen:.2g} (of "
            f"{largest:.2g}) with the row packed before it",
            hint=_ADVICE,
        )


def _second(model: Any, fast: FastModel | None, changed: int | None) -> torch.Tensor:
    """Logits of the second document, or what the fast path makes them of: (tokens, features), fp32. Every token of the
    document `changed` is another."""
    rows = [
        _document(line, length, shift=IDS // 2 if line - 1 == changed else 0)
        for line, length in enumerate(LENGTHS, start=1)
    ]
    dataset = to_dataset(rows, packing=True, max_length=sum(LENGTHS))
    batch = Collator(pad_token_id=0, padding_free=True)(list(dataset))
    if batch["input_ids"].tolist() != [[token for row in rows for token in row.ids]]:
        raise AssertionError("packing has changed: the documents do not lie as they should")
    device = next(model.parameters()).device
    inputs = {name: _to(value, device) for name, value in batch.items() if name not in ("ledger", "route", "labels")}
    found: torch.Tensor
    if fast is None:
        [found] = model(**inputs, use_cache=False).logits
    else:
        found = fast.states(inputs["input_ids"].flatten(), Documents.of(batch["route"].documents, device))
    start, length, _ = LENGTHS
    return found[start : start + length].float()


def _change(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _document(line: int, length: int, *, shift: int) -> RenderedRow:
    ids = tuple((7 * at + 31 * line + shift) % IDS for at in range(length))
    return RenderedRow(LineNumber(line), ids, ids)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if torch.is_tensor(value) else value
