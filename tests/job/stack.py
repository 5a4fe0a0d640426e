"""What the tests that compute share. Importing this imports the training stack, and sets one torch thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import torch
import transformers
from hypothesis import strategies as st

from job.contract.recipe import Recipe
from job.dataset.reader import LineNumber
from job.dataset.render import IGNORED, RenderedRow
from job.model import load, raise_adapter_to_fp32
from job.weights import Base
from tests.contract.examples import recipe_data

torch.set_num_threads(1)  # two on two busy cores are slower, and sums depend on it
transformers.utils.logging.disable_progress_bar()
datasets.utils.logging.disable_progress_bar()


def tiny_recipe(**sections: Any) -> Recipe:
    """A recipe for the built-in model, with a small adapter."""
    small = {"base_model": {"id": "builtin:tiny"}, "lora": {"rank": 4, "alpha": 8}}
    return Recipe.model_validate(recipe_data() | small | sections)


def adapted(recipe: Recipe, base: Base) -> Any:
    """The model with an adapter that does something: a fresh one adds zero."""
    model = load(recipe, base)
    raise_adapter_to_fp32(model)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def row(line: int, length: int, *, trained: Iterable[int] | None = None) -> RenderedRow:
    """Tokens that tell row and place; trained is the second half, unless told."""
    ids = tuple((31 * line + 7 * at) % 250 for at in range(length))
    said = set(range(length // 2, length) if trained is None else trained)
    return RenderedRow(LineNumber(line), ids, tuple(t if at in said else IGNORED for at, t in enumerate(ids)))


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, so that NaNs and the sign of zero are compared too."""
    data: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_tensor(a[name], b[name]) for name in a)


lengths = st.lists(st.integers(2, 24), min_size=1, max_size=30)
"""Of rows, in tokens."""
