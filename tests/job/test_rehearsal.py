"""Promise: the costliest batch goes through the model before the first step, and nothing can tell afterwards."""

from __future__ import annotations

import copy
import random
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.callbacks import Reason, Steering
from job.contract.errors import ModelInvalid, TrainingFailed
from job.contract.metrics import MetricLine, Step
from job.memory import is_out_of_memory, loading, out_of_memory_is
from job.notice import Notice
from job.randomness import random_state
from job.rehearsal import Costliest, costliest_drawn, costliest_in_order, rehearse
from job.shortage import Footprint, out_of_memory
from job.tensors import freeze
from job.train import Rows, Training
from job.weights import Base
from tests.job.stack import adapted, row, same_tensors, tiny_recipe

ROWS = [row(number, length) for number, length in enumerate([4, 30, 7, 25, 12, 3, 18, 9], start=1)]
some_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=9)

# Which batch.


def cost(lengths: Sequence[int], packed: bool) -> int:
    return sum(lengths) if packed else max(lengths) * len(lengths)


@pytest.mark.parametrize("packed", [True, False])
@given(found=some_lengths, size=st.integers(1, 4))
def test_no_batch_that_can_be_drawn_is_costlier(found: list[int], size: int, packed: bool) -> None:
    drawn = costliest_drawn(found, size, packed=packed)
    every = [cost(some, packed) for some in combinations(found, min(size, len(found)))]
    assert drawn.tokens == max(every) == cost([found[at] for at in drawn.examples], packed)
    assert len(set(drawn.examples)) == min(size, len(found))


@pytest.mark.parametrize("packed", [True, False])
@given(found=some_lengths, size=st.integers(1, 4))
def test_no_batch_of_an_evaluation_is_costlier(found: list[int], size: int, packed: bool) -> None:
    judged = costliest_in_order(found, size, packed=packed)
    batches = [found[start : start + size] for start in range(0, len(found), size)]
    assert judged.tokens == max(cost(batch, packed) for batch in batches)
    assert [found[at] for at in judged.examples] in batches


# What is left of it.


def made(
    base: Base,
    tokenizer: Any,
    workdir: Path,
    *,
    rows: Rows | None = None,
    notice: Notice | None = None,
    max_length: int = 32,
    **how: Any,
) -> Training:
    training = {"batch_size": 2, "gradient_accumulation": 1, "epochs": 1, "max_length": max_length} | how
    recipe = tiny_recipe(lora={"rank": 4, "alpha": 8, "dropout": 0.3}, training=training)
    model = adapted(recipe, base)
    held_out = Rows(ROWS[:6], ROWS[6:])
    return Training(recipe, model, tokenizer, rows or held_out, workdir=workdir, notice=notice or Notice())


class Watched(Steering):
    """Writes down what it is told."""

    def __init__(self, training: Training, notice: Notice) -> None:
        self.lines: list[MetricLine] = []
        self.saved: list[Reason] = []
        super().__init__(
            training,
            notice,
            save=self._note,
            write=self.lines.append,
            interval=3600.0,
            upload_seconds=lambda: 0.0,
        )

    def _note(self, reason: Reason) -> float:
        self.saved.append(reason)
        return 0.0


class Before(Watched):
    """Sees the training as the first step will: after the rehearsal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        raise Seen(known["model"], known["optimizer"])


class Seen(Exception):
    def __init__(self, model: Any, optimizer: Any) -> None:
        super().__init__("the first step would begin")
        self.model = model
        self.optimizer = optimizer


@pytest.mark.parametrize("packing", [True, False])
def test_everything_is_put_back(base: Base, tokenizer: Any, tmp_path: Path, packing: bool) -> None:
    training = made(base, tokenizer, tmp_path, packing=packing)
    weights = {name: value.detach().clone() for name, value in training.model.state_dict().items()}
    modes = [module.training for module in training.model.modules()]
    trainer = training._trainer
    inner = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    torch.manual_seed(3)
    random.seed(3)
    state = freeze(random_state())
    with pytest.raises(Seen) as seen:
        training.run(Before(training, Notice()))
    assert trainer.under_way is not None, "nothing went through the model"
    after = freeze(random_state())
    assert after.encoded == state.encoded
    assert same_tensors(after.tensors, state.tensors)
    assert same_tensors(dict(training.model.state_dict()), weights)
    assert [module.training for module in training.model.modules()] == modes
    assert all(weight.grad is None for weight in training.model.parameters())
    assert not seen.value.optimizer.state
    assert (trainer._metrics, trainer._total_train_tokens) == inner
    metered = training.take_meter()
    assert (metered.rows, metered.tokens, metered.trained) == ((), 0, 0)
    assert training.step_seconds == 0.0


def test_it_is_the_costliest_batch_and_the_costliest_evaluation_where_that_is_larger(
    base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    played: list[list[int]] = []
    judged: list[list[int]] = []

    class Told(Training):
        def play(self, examples: Sequence[int]) -> int:
            played.append([len(self._trainer.train_dataset[at]["input_ids"]) for at in examples])
            return super().play(examples)

        def judge(self, examples: Sequence[int]) -> None:
            judged.append([ROWS[at].line for at in examples])
            super().judge(examples)

    recipe = tiny_recipe(training={"batch_size": 2, "packing": False, "max_length": 32})
    for train, held_out in ((ROWS, ROWS[:1]), (ROWS[:1], ROWS)):
        model = adapted(recipe, base)
        told = Told(recipe, model, tokenizer, Rows(train, held_out), workdir=tmp_path, notice=Notice())
        with pytest.raises(Seen):
            told.run(Before(told, Notice()))
    assert played == [[30, 25], [4]]
    assert judged == [[1, 2]]  # 2 x 30 tokens; the evaluation of a single short row is not worth a rehearsal


def test_a_notice_given_meanwhile_stops_before_the_first_step(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    notice = Notice()

    class Noticed(Training):
        def play(self, examples: Sequence[int]) -> int:
            tokens = super().play(examples)
            notice.give("SIGTERM")
            return tokens

    recipe = tiny_recipe(training={"max_length": 32})
    training = Noticed(
        recipe, adapted(recipe, base), tokenizer, Rows(ROWS[:6], ROWS[6:]), workdir=tmp_path, notice=notice
    )
    steering = Watched(training, notice)
    training.run(steering)
    assert (steering.lines, steering.saved, training.progress.step, training.progress.finished) == ([], [], 0, None)


def test_the_first_steps_seconds_and_tokens_are_its_own(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    class Slow(Training):
        def play(self, examples: Sequence[int]) -> int:
            self._trainer.meter._started -= 1000.0  # as if it had taken so long
            return super().play(examples)

    recipe = tiny_recipe(training={"packing": False, "gradient_accumulation": 3, "batch_size": 2, "epochs": 1})
    model = adapted(recipe, base)
    training = Slow(recipe, model, tokenizer, Rows(ROWS[:6], ROWS[6:]), workdir=tmp_path, notice=Notice())
    steering = Watched(training, Notice())
    training.run(steering)
    [step] = [line for line in steering.lines if isinstance(line, Step)]
    assert 0 <= step.seconds < 100
    assert step.tokens == sum(len(one.ids) for one in ROWS[:6])
    assert sorted(step.rows) == [1, 2, 3, 4, 5, 6]


# Out of memory.


class Full:
    """A stage on a GPU that is full: raises what torch raises there."""

    def __init__(self, model: Any, at: str) -> None:
        self.model = model
        self._at = at

    def play(self, examples: Sequence[int]) -> int:
        for weight in self.model.parameters():
            weight.grad = torch.ones_like(weight)
        self.model.train()
        torch.rand(3)
        self._fill("play")
        return 1

    def judge(self, examples: Sequence[int]) -> None:
        self._fill("judge")

    def _fill(self, where: str) -> None:
        if where == self._at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total ...")


@pytest.mark.parametrize("at", ["play", "judge"])
def test_out_of_memory_in_a_rehearsal_is_told_and_everything_put_back_all_the_same(at: str) -> None:
    model = torch.nn.Linear(3, 3).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    before = torch.get_rng_state()

    def describe(request: str) -> TrainingFailed:
        return out_of_memory("here", request, tiny_recipe(), Footprint("GPU", 1, 1, 1, 1), [])

    with pytest.raises(TrainingFailed, match=r"the last request was for 2\.50 GiB"), out_of_memory_is(describe):
        rehearse(Full(model, at), Costliest((0,), 1), Costliest((0,), 2), optimizer=optimizer, state_bytes=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """This process may take so many bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_run_that_runs_out_of_memory_does_so_in_the_rehearsal_and_says_with_which_batch(
    base: Base, tokenizer: Any, tmp_path: Path
) -> None:
    """For real: the process has too little address space for the two long rows together."""
    rows = Rows([*ROWS, row(9, 2000), row(10, 1900)], [])
    how: dict[str, Any] = {"max_length": 2048, "batch_size": 2, "packing": False, "gradient_accumulation": 2}
    training = made(base, tokenizer, tmp_path, rows=rows, **how)
    steering = Watched(training, Notice())
    with pytest.raises(TrainingFailed) as raised, little_memory(16 * 2**20):
        training.run(steering)
    assert (
        "out of memory in the rehearsal of the costliest batch, 2 rows x 2,000 tokens = 4,000" in raised.value.message
    )
    assert "the last request was for" in raised.value.message
    assert "training.batch_size 2 -> 1 with training.gradient_accumulation 2 -> 4" in raised.value.hint
    assert "training.max_length 2048 -> 1000 (cuts 2 of 10 rows)" in raised.value.hint
    assert steering.lines == []


def test_what_no_allocator_can_give_is_out_of_memory_and_a_bug_is_not() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(other.value)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_is(lambda _: TrainingFailed("no")):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.parametrize("wrapped", [None, ModelInvalid("cannot be loaded"), TrainingFailed("does not fit")])
def test_a_base_that_does_not_fit_is_told_with_its_size_however_its_loading_ended(wrapped: Exception | None) -> None:
    def load() -> None:
        try:
            torch.empty(2**60, dtype=torch.uint8)
        except RuntimeError as error:
            if wrapped is None:
                raise
            raise wrapped from error

    with pytest.raises(TrainingFailed) as raised, loading(tiny_recipe(method="lora"), 140 * 2**30):
        load()
    assert "out of memory while base model builtin:tiny was loaded" in raised.value.message
    assert "its weights are 140.0 GiB on the disk" in raised.value.message
    assert raised.value.hint.startswith('a new run with method "qlora"')
    with pytest.raises(ModelInvalid, match="no such"), loading(tiny_recipe(), 1):
        raise ModelInvalid("no such thing")


def test_a_batch_without_a_trained_token_is_named_by_its_lines(base: Base, tokenizer: Any, tmp_path: Path) -> None:
    training = made(base, tokenizer, tmp_path, packing=False)
    batch = training._trainer.data_collator(
        [{"input_ids": [1, 2, 3], "labels": [1, -100, -100], "line": [line] * 3} for line in (17, 23)]
    )
    with pytest.raises(TrainingFailed, match="step 1: no token of the batch of lines 17, 23 is trained"):
        training._trainer.training_step(training.model, batch)
