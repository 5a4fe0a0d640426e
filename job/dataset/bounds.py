"""What the base model of a row can take at all, told by its config.json: which tokens it knows, and how many of them
in a row; and what its tokenizer does not know. Without a look at the weights, which are dear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from job.dataset.control import read_object
from job.dataset.refused import RowRefused

_POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len")
_TABLES: Final = frozenset({"gpt2", "gpt_neo", "gptj", "gpt_bigcode", "codegen", "opt", "biogpt", "mpt", "openai-gpt"})
"""Values of `model_type` (transformers 5.17) of models that look positions up in a table, and fail beyond its end.
Rotary ones go on, with angles that they have never met."""


@dataclass(frozen=True)
class Bounds:
    """What is not told is None.

    Args:
        tokens: how many of them have an embedding.
        positions: how many a row may have.
        hard: the model fails beyond them.
    """

    tokens: int | None = None
    positions: int | None = None
    hard: bool = False

    def passed(self, length: int) -> bool:
        """Whether a row is longer than the model was made for. Raises RowRefused: it would fail."""
        if self.positions is None or length <= self.positions:
            return False
        if self.hard:
            raise RowRefused(
                "beyond-context",
                f"{length} tokens of it would be trained, and the base model has {self.positions} positions",
                hint=f"set training.max_length to {self.positions} or less",
            )
        return True

    def no_embedding(self, token: int, tokenizer: Any) -> RowRefused:
        """The refusal of a row with a token that is none of the model's."""
        return RowRefused(
            "no-embedding",
            f"it holds {tokenizer.decode([token])!r}, token {token} of the tokenizer, but the base model has "
            f"embeddings for {self.tokens} (vocab_size of its config.json), counted from 0",
            hint="tokenizer and model do not belong together: take both from one place",
        )


def unknown_tokens(tokenizer: Any) -> frozenset[int]:
    """What a tokenizer writes for a character that it does not know; nothing where it falls back on bytes."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    named = getattr(model, "unk_token", None)
    ids = (
        getattr(tokenizer, "unk_token_id", None),
        getattr(model, "unk_id", None),
        model.token_to_id(named) if model is not None and named is not None else None,
    )
    return frozenset(each for each in ids if each is not None)


def unknown_character(text: str, token: str) -> RowRefused:
    """The refusal of a row with an answer that holds it."""
    return RowRefused(
        "unknown-character",
        f"the base model's tokenizer does not know {text[:20]!r}, which stands in an answer: the model would be "
        f"trained to say {token}",
        hint="write it otherwise, remove the row, or use a base model that knows it",
    )


def bounds_of(folder: Path) -> Bounds:
    """What a base model's config.json tells.

    Raises:
        ModelInvalid: the file is not JSON.
    """
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    text = config.get("text_config")  # of a model that sees, too
    parts = [text, config] if isinstance(text, dict) else [config]
    return Bounds(tokens=_number(parts, ("vocab_size",)), positions=_number(parts, _POSITIONS), hard=kind in _TABLES)


def _number(parts: list[dict[str, Any]], keys: tuple[str, ...]) -> int | None:
    found = (part.get(key) for part in parts for key in keys)
    return next((value for value in found if type(value) is int and value > 0), None)
