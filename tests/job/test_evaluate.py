"""Promise: the held-out loss is the mean over all held-out tokens, and measuring it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from job.batches import Collator, to_dataset
from job.dataset.render import IGNORED, RenderedRow
from job.evaluate import held_out_loss
from job.notice import Notice
from job.train import Rows, Training
from job.weights import Base
from tests.job.stack import adapted, row, tiny_recipe

ROWS = [row(number, length) for number, length in enumerate([4, 30, 7, 25, 12, 3, 18], start=1)]
"""Batches of two have unequal numbers of trained tokens, and the last holds a single row."""


def training(base: Base, tokenizer: Any, workdir: Path, *, packing: bool, notice: Notice | None = None) -> Training:
    recipe = tiny_recipe(
        lora={"rank": 4, "alpha": 8, "dropout": 0.5},
        training={"packing": packing, "max_length": 32, "batch_size": 2},
    )
    model = adapted(recipe, base)
    return Training(recipe, model, tokenizer, Rows(ROWS[:2], ROWS), workdir=workdir, notice=notice or Notice())


def batches(*, packing: bool) -> DataLoader[Any]:
    collator = Collator(pad_token_id=0, padding_free=packing)
    dataset: Any = to_dataset(ROWS, packing=packing, max_length=32)
    return DataLoader(dataset, batch_size=2, collate_fn=collator)


def token_losses(model: Any, rows: list[RenderedRow]) -> list[float]:
    """Nats of each trained token in float64, row by row, from nothing but the logits of each row alone."""
    found = []
    for one in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.ids])).logits[0].double()
        for at in range(1, len(one.ids)):
            if one.labels[at] != IGNORED:
                scores = logits[at - 1]
                found.append(float(torch.logsumexp(scores, 0) - scores[one.labels[at]]))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_it_is_the_mean_over_all_trained_tokens(base: Base, tokenizer: Any, tmp_path: Path, packing: bool) -> None:
    made = training(base, tokenizer, tmp_path, packing=packing)
    losses = token_losses(made.model.eval(), ROWS)
    assert len(losses) == sum(one.trained_tokens for one in ROWS)
    expected = sum(losses) / len(losses)
    found = held_out_loss(made._trainer, batches(packing=packing), Notice())
    assert found == pytest.approx(expected, rel=1e-5)
    assert made.evaluate() == found
    counts = [batch["ledger"].trained for batch in batches(packing=packing)]
    assert len(set(counts)) > 1, "equal batches: the mean of means would pass too"


@pytest.mark.parametrize("training_mode", [True, False])
def test_it_leaves_the_mode_and_the_random_state_alone(
    base: Base, tokenizer: Any, tmp_path: Path, training_mode: bool
) -> None:
    made = training(base, tokenizer, tmp_path, packing=True)
    made.model.train(training_mode)
    modes = [module.training for module in made.model.modules()]
    weights = [parameter.detach().clone() for parameter in made.model.parameters()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = (random.random(), float(np.random.random()), torch.rand(2).tolist())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    loss = made.evaluate()
    assert (random.random(), float(np.random.random()), torch.rand(2).tolist()) == first
    assert [module.training for module in made.model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, made.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in made.model.parameters())
    made.model.train(not training_mode)
    assert made.evaluate() == loss  # dropout is off either way


def test_a_notice_before_it_begins_gives_none(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    notice = Notice()
    made = training(base, tokenizer, tmp_path, packing=True, notice=notice)
    assert made.evaluate() is not None
    notice.give("SIGTERM")
    made.model.train()
    assert made.evaluate() is None
    assert made.model.training


def test_a_notice_in_the_middle_gives_none_and_ends_it_there(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    made = training(base, tokenizer, tmp_path, packing=False)
    notice, asked = Notice(), 0

    def interrupted() -> Iterator[dict[str, Any]]:
        nonlocal asked
        for batch in batches(packing=False):
            asked += 1
            if asked == 2:
                notice.give("SIGTERM")
            yield batch

    made.model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert held_out_loss(made._trainer, interrupted(), notice) is None
    assert asked == 2 < len(batches(packing=False))
    assert made.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_without_held_out_rows_there_is_no_loss(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset={"train": "rows.jsonl", "held_out": None})
    made = Training(recipe, adapted(recipe, base), tokenizer, Rows(ROWS, []), workdir=tmp_path, notice=Notice())
    assert made.evaluate() is None
    assert not made.evaluates
