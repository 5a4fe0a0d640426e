"""Promise: inputs of layers that wait in the host's memory come back as they went, in time, and none is mixed up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from job.contract.errors import TrainingFailed
from job.contract.fast_path import Keep
from job.fast import pointwise
from job.fast.kernels import in_torch
from job.fast.model import FastModel
from tests.job.llamas import COUNT, MODELS, SMALL, a_batch, assert_same, by_modules, gradients, made

HOST: Keep = "input on the host"


@pytest.mark.parametrize(
    "keeps",
    [
        [HOST, HOST, HOST, HOST],
        [HOST, HOST, "input", "all"],
        ["all", HOST, "no gate and up", HOST],
        [HOST, "input", HOST, "input"],
    ],
    ids=str,
)
def test_inputs_on_the_host_change_no_bit_in_batches_of_any_size(keeps: list[Keep]) -> None:
    model = made(LlamaConfig(**(SMALL | {"num_hidden_layers": 4})))
    fast, whole = FastModel(model, keep=keeps), FastModel(model)
    for lengths in ([5, 9, 3], [8, 8], [20, 11], [3], [20, 11]):
        batch = a_batch(lengths)
        expected = gradients(model, whole.loss(*batch, COUNT))
        loss = fast.loss(*batch, COUNT)
        with torch.no_grad():
            fast.loss(*a_batch([30, 30]), COUNT)  # without gradients nothing goes to the host
        again = gradients(model, loss)
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
        assert fast.host.arriving == frozenset()
    assert fast.host.numbers == keeps.count(HOST) * 31 * SMALL["hidden_size"], "that of the largest batch trained on"


def test_the_hosts_memory_is_taken_once() -> None:
    model = MODELS["Llama"]()
    fast = FastModel(model)
    fast.keep([HOST, HOST, "input"], tokens=20)
    taken, where = fast.host.numbers, fast.host.place(0, torch.Size([1])).data_ptr()
    assert taken == 2 * 20 * SMALL["hidden_size"]
    for lengths in ([20], [3, 9], [10, 10]):
        fast.loss(*a_batch(lengths), COUNT).backward()  # type: ignore[no-untyped-call]
        assert (fast.host.numbers, fast.host.place(0, torch.Size([1])).data_ptr()) == (taken, where)
    fast.keep(["all", "all", "input"], tokens=20)
    fast.loss(*a_batch([40]), COUNT).backward()  # type: ignore[no-untyped-call]
    assert fast.host.numbers == taken


def test_an_input_comes_back_while_the_layer_after_it_works_and_no_earlier() -> None:
    model = made(LlamaConfig(**(SMALL | {"num_hidden_layers": 5})))
    seen: list[frozenset[int]] = []

    def swiglu_gradient(*arguments: Any, **how: Any) -> Any:
        """Once in each layer's backward pass, before its last multiplications."""
        seen.append(fast.host.arriving)
        return pointwise.swiglu_gradient(*arguments, **how)

    kernels = replace(in_torch(), swiglu_gradient=swiglu_gradient)
    fast = FastModel(model, kernels=kernels, keep=[HOST, HOST, HOST, "input", "all"])
    fast.loss(*a_batch([8, 8]), COUNT).backward()  # type: ignore[no-untyped-call]
    assert seen == [frozenset(), {2}, {1}, {0}, frozenset()]


def test_inputs_of_a_batch_that_another_has_overwritten_are_refused() -> None:
    model = MODELS["Llama"]()
    fast = FastModel(model, keep=HOST)
    first = fast.loss(*a_batch([8, 8]), COUNT)
    second = fast.loss(*a_batch([9, 7]), COUNT)
    with pytest.raises(AssertionError, match="another batch"):
        first.backward()  # type: ignore[no-untyped-call]
    found = gradients(model, second)
    assert_same(found, gradients(model, by_modules(model, *a_batch([9, 7]))))


def test_a_backward_pass_that_broke_off_leaves_nothing_to_the_next_batch() -> None:
    model = MODELS["Llama"]()
    broken = True

    def swiglu_gradient(*arguments: Any, **how: Any) -> Any:
        if broken and fast.host.arriving == {0}:
            raise MemoryError
        return pointwise.swiglu_gradient(*arguments, **how)

    fast = FastModel(model, kernels=replace(in_torch(), swiglu_gradient=swiglu_gradient), keep=[HOST, HOST, "all"])
    with pytest.raises(MemoryError):
        fast.loss(*a_batch([8, 8]), COUNT).backward()  # type: ignore[no-untyped-call]
    assert fast.host.arriving == {0}
    broken = False
    batch = a_batch([3, 6])
    found = gradients(model, fast.loss(*batch, COUNT))
    assert_same(found, gradients(model, by_modules(model, *batch)))


def test_more_memory_than_the_host_has_is_refused_before_it_is_taken() -> None:
    fast = FastModel(MODELS["Llama"]())
    with pytest.raises(TrainingFailed, match=r"need [\d.]+ GiB of this machine's memory.* GiB are free") as refused:
        fast.keep([HOST, HOST, "input"], tokens=10**12)
    assert "training.max_length" in refused.value.hint
    assert fast.host.numbers == 0
