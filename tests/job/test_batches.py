"""Promise: every row is trained once an epoch, whole, alone, in an order that depends on nothing but seed and epoch."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.batches import Collator, EpochOrder, Ledger, to_dataset
from job.dataset.render import IGNORED, RenderedRow
from job.fast.attention import Documents
from job.fast.model import FastModel
from job.weights import Base
from tests.job.stack import adapted, lengths, row, tiny_recipe

PAD = 255
MAX = 24


def of_lengths(found: list[int]) -> list[RenderedRow]:
    return [row(number, length) for number, length in enumerate(found, start=1)]


def pieces(example: dict[str, Any]) -> list[RenderedRow]:
    """The rows in one packed example, cut where `seq_lengths` says."""
    ends = list(accumulate(example["seq_lengths"], initial=0))
    assert ends[-1] == len(example["input_ids"]) == len(example["labels"]) == len(example["line"])
    cut = []
    for start, end in pairwise(ends):
        [line] = set(example["line"][start:end])
        cut.append(RenderedRow(line, tuple(example["input_ids"][start:end]), tuple(example["labels"][start:end])))
    return cut


def collate(rows: list[RenderedRow], *, packing: bool, max_length: int = MAX) -> dict[str, Any]:
    """All the rows as one batch."""
    dataset = to_dataset(rows, packing=packing, max_length=max_length)
    batch: dict[str, Any] = Collator(pad_token_id=PAD, padding_free=packing)(list(dataset))
    return batch


@given(st.integers(0, 50), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch(length: int, seed: int, epoch: int) -> None:
    order, again = EpochOrder(length, seed), EpochOrder(length, seed)
    list(again)  # another epoch was asked for first
    again.set_epoch(epoch + 1)
    list(again)
    order.set_epoch(epoch)
    again.set_epoch(epoch)
    found = list(order)
    assert found == list(order) == list(again)
    assert sorted(found) == list(range(length))
    assert len(order) == length


def test_the_order_changes_with_the_seed_and_with_the_epoch() -> None:
    orders = set()
    for seed in range(4):
        order = EpochOrder(20, seed)
        for epoch in range(4):
            order.set_epoch(epoch)
            orders.add(tuple(order))
    assert len(orders) == 16


def test_the_order_moves_no_global_generator_and_does_not_depend_on_it() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(EpochOrder(9, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert list(EpochOrder(9, 4)) == first


@given(lengths)
@settings(deadline=None, max_examples=40)
def test_packing_keeps_rows_whole_and_loses_and_doubles_none(found: list[int]) -> None:
    rows = of_lengths(found)
    packed = [pieces(example) for example in to_dataset(rows, packing=True, max_length=MAX)]
    assert Counter(piece for example in packed for piece in example) == Counter(rows)
    assert all(sum(len(piece.ids) for piece in example) <= MAX for example in packed)


def test_packing_packs() -> None:
    rows = of_lengths([8] * 9)
    assert len(to_dataset(rows, packing=True, max_length=24)) == 3
    assert len(to_dataset(rows, packing=False, max_length=24)) == 9


@given(lengths)
@settings(deadline=None, max_examples=20)
def test_packing_is_the_same_every_time(found: list[int]) -> None:
    rows = of_lengths(found)
    assert to_dataset(rows, packing=True, max_length=MAX)[:] == to_dataset(rows, packing=True, max_length=MAX)[:]


@given(lengths)
@settings(deadline=None, max_examples=20)
def test_unpacked_rows_stay_in_order_one_an_example(found: list[int]) -> None:
    rows = of_lengths(found)
    dataset = to_dataset(rows, packing=False, max_length=MAX)
    assert [RenderedRow(e["line"][0], tuple(e["input_ids"]), tuple(e["labels"])) for e in dataset] == rows


@pytest.mark.parametrize("packing", [True, False])
@given(found=lengths)
@settings(deadline=None, max_examples=30)
def test_the_ledger_names_the_rows_and_counts_their_tokens(packing: bool, found: list[int]) -> None:
    rows = of_lengths(found)
    ledger = collate(rows, packing=packing)["ledger"]
    assert ledger == Ledger(
        rows=tuple(range(1, len(rows) + 1)),
        tokens=sum(found),
        trained=sum(one.trained_tokens for one in rows),
        pairs=sum(n * (n + 1) // 2 for n in found),
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_first_token_is_never_counted_as_trained(packing: bool) -> None:
    rows = [row(1, 6, trained=range(6)), row(2, 5, trained=range(5)), row(3, 4, trained=[0])]
    assert collate(rows, packing=packing)["ledger"].trained == 5 + 4


def test_what_is_told_beside_the_tensors_leaves_them_alone() -> None:
    batch = collate(of_lengths([5, 9]), packing=False)
    assert {name for name, value in batch.items() if not torch.is_tensor(value)} == {"ledger", "route"}
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 9)
    assert batch["labels"][0, 5:].tolist() == [IGNORED] * 4  # padding is not trained


@pytest.mark.parametrize("packing", [True, False])
@given(found=lengths)
@settings(deadline=None, max_examples=30)
def test_the_route_predicts_every_trained_token_from_the_one_before_it(packing: bool, found: list[int]) -> None:
    rows = of_lengths(found)
    batch = collate(rows, packing=packing)
    route, flat = batch["route"], batch["input_ids"].flatten()
    assert sum(route.documents) == len(flat)
    assert sorted(route.documents) == (sorted(found) if packing else [max(found)] * len(found))
    starts = list(accumulate(route.documents, initial=0))
    assert torch.equal(flat[route.positions + 1], route.targets)
    assert len(route.targets) == sum(one.trained_tokens for one in rows)
    ends = {start - 1 for start in starts[1:]}
    assert not ends & set(route.positions.tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_the_fast_path_has_the_loss_of_the_modules_on_every_batch(base: Base, packing: bool) -> None:
    model = adapted(tiny_recipe(), base).eval()
    batch = collate(of_lengths([9, 7, 8, 20, 4]), packing=packing)
    route, labels = batch["route"], batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("ledger", "route", "labels")}
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        documents = Documents.of(route.documents, labels.device)
        fast = FastModel(model)
        found = fast.loss(batch["input_ids"].flatten(), documents, route.positions, route.targets, len(route.targets))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_label_crosses_from_one_packed_row_into_the_next() -> None:
    """The first token of a row would be predicted from the end of the row before it."""
    rows = [row(number, length, trained=range(length)) for number, length in enumerate([9, 7, 5], start=1)]
    dataset = to_dataset(rows, packing=True, max_length=24)
    batch = Collator(pad_token_id=PAD, padding_free=True)(list(dataset))
    [labels] = batch["labels"].tolist()
    [ids] = batch["input_ids"].tolist()
    order = pieces(dataset[0])
    assert len(order) == 3
    starts = list(accumulate((len(piece.ids) for piece in order), initial=0))[:-1]
    assert [at for at, label in enumerate(labels) if label == IGNORED] == starts
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_row_packed_between_others_is_computed_as_if_it_were_alone(base: Base, method: str) -> None:
    model = adapted(tiny_recipe(method=method), base).eval()
    rows = of_lengths([9, 7, 8, 20, 4])
    dataset = to_dataset(rows, packing=True, max_length=24)
    inputs = Collator(pad_token_id=PAD, padding_free=True)(list(dataset))
    [inputs.pop(name) for name in ("ledger", "route", "labels")]
    order = [piece for example in dataset for piece in pieces(example)]
    assert len(order) == len(rows) > len(dataset) > 1
    blind = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        together, smeared = model(**inputs).logits[0], model(**blind).logits[0]
        start = 0
        for number, piece in enumerate(order):
            end = start + len(piece.ids)
            alone = model(input_ids=torch.tensor([piece.ids])).logits[0]
            torch.testing.assert_close(together[start:end], alone, rtol=0, atol=1e-4)
            if number:  # without what the collator says of the rows, they see each other
                assert (smeared[start:end] - alone).abs().max() > 1e-2
            start = end
    assert start == together.shape[0]
