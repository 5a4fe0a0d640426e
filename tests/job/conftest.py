"""The built-in model and its tokenizer, once for all tests that need the training stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from job.weights import Base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    from job.contract.recipe import TINY_MODEL, BaseModelRef
    from job.weights import locate

    return locate(BaseModelRef(id=TINY_MODEL), tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(base: Base) -> Any:
    """A fresh one: tests may change its template."""
    from job.model import load_tokenizer

    return load_tokenizer(base)
