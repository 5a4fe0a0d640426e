"""Promise: the fast path computes what the modules compute: loss and every gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen3Config

from job.contract.fast_path import Keep
from job.fast.attention import Documents, attend
from job.fast.dropout import Dropout
from job.fast.linear import Group, refresh
from job.fast.model import FastModel, why_not
from tests.job.llamas import (
    CLOSE,
    COUNT,
    MODELS,
    SMALL,
    VOCABULARY,
    WIDE_HEADS,
    a_batch,
    assert_same,
    by_modules,
    gradients,
    made,
)


@pytest.mark.parametrize("lengths", [[5, 9, 3], [8, 8], [20]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_modules(name: str, lengths: list[int]) -> None:
    model, batch = MODELS[name](), a_batch(lengths)
    assert why_not(model, dora=False, longest=20) is None
    expected = by_modules(model, *batch)
    found = FastModel(model).loss(*batch, COUNT)
    assert found.item() == pytest.approx(expected.item(), rel=CLOSE)
    assert_same(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("keep", ["no gate and up", "input", "input on the host"])
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen3Config(**WIDE_HEADS)], ids=["Llama", "Qwen 3"])
def test_what_is_kept_changes_no_bit(config: Any, keep: Keep) -> None:
    model, batch = made(config), a_batch([5, 9, 3])
    whole = gradients(model, FastModel(model).loss(*batch, COUNT))
    mixed: list[Keep] = ["all", keep, keep]
    again = gradients(model, FastModel(model, keep=mixed).loss(*batch, COUNT))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_weights_that_are_held_dequantised_change_no_bit() -> None:
    model, batch = MODELS["Llama"](), a_batch([8, 8])
    fast = FastModel(model)
    before = gradients(model, fast.loss(*batch, COUNT))
    fast.keep_dequantised()
    after = gradients(model, fast.loss(*batch, COUNT))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Masked(torch.nn.Module):
    """Dropout as a module, of which it is known what it drops."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x.flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("keep", ["all", "no gate and up", "input"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_dropout_is_what_modules_with_the_same_masks_do(keep: Keep, targets: Any) -> None:
    model, batch = made(LlamaConfig(**SMALL), lora_dropout=0.3, target_modules=targets).train(), a_batch([20])
    torch.manual_seed(5)
    drawn = Dropout(0.3, int(torch.randint(2**31, ())))
    torch.manual_seed(5)
    found = FastModel(model, keep=keep).loss(*batch, COUNT)
    ours = gradients(model, found)
    groups = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
    for number, layer in enumerate(model.get_base_model().model.layers):
        for name, module in layer.named_modules():
            if hasattr(module, "lora_dropout"):
                [at] = [at for at, group in enumerate(groups) if name.rpartition(".")[2] in group]
                module.lora_dropout["default"] = Masked(drawn.of(4 * number + at))
    expected = by_modules(model, *batch)
    assert found.item() == pytest.approx(expected.item(), rel=CLOSE)
    assert_same(ours, gradients(model, expected))


def test_dropout_is_drawn_anew_for_each_batch_by_the_generator_that_checkpoints_hold_and_not_in_an_evaluation() -> None:
    model, batch = made(LlamaConfig(**SMALL), lora_dropout=0.3).train(), a_batch([20])
    fast = FastModel(model)
    before = torch.get_rng_state()
    first, second = fast.loss(*batch, COUNT), fast.loss(*batch, COUNT)
    assert first.item() != second.item()
    torch.set_rng_state(before)
    assert torch.equal(fast.loss(*batch, COUNT), first)
    assert torch.equal(fast.loss(*batch, COUNT), second)
    model.eval()
    assert fast.loss(*batch, COUNT).item() == pytest.approx(by_modules(model, *batch).item(), rel=CLOSE)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.999])
def test_what_is_dropped_has_the_probability_and_no_pattern(probability: float) -> None:
    drawn = Dropout(probability, 77)
    dropped = ~torch.stack([drawn.of(number).kept(400, 500, torch.device("cpu")) for number in range(3)])
    spread = (probability * (1 - probability)) ** 0.5

    def is_near(share: Tensor, of: float, deviation: float, count: int) -> bool:
        return bool(((share - of).abs() < 6 * deviation / count**0.5).all())

    whole = dropped.double()
    assert is_near(whole.mean(), probability, spread, 600_000)
    assert is_near(whole.mean((0, 1)), probability, spread, 1200)  # each column
    assert is_near(whole.mean((0, 2)), probability, spread, 1500)  # each row
    other = whole - probability
    for a, b in (
        (other[:, :, 1:], other[:, :, :-1]),
        (other[:, 1:], other[:, :-1]),
        (other[1:], other[:-1]),
        (other[:, ::2], other[:, 1::2].flip(-1)),
    ):
        assert is_near((a * b).mean(), 0.0, spread**2, a.numel())
    x = torch.ones(400, 500)
    assert drawn(x).mean().item() == pytest.approx(1, abs=6 * spread / (1 - probability) / 200_000**0.5)


def test_documents_do_not_see_each_other() -> None:
    model, (tokens, documents, positions, targets) = MODELS["Llama"](), a_batch([6, 7])
    second = positions >= 6
    fast = FastModel(model)
    before = fast.loss(tokens, documents, positions[second], targets[second], COUNT)
    changed = torch.cat(((tokens[:6] + 1) % VOCABULARY, tokens[6:]))
    after = fast.loss(changed, documents, positions[second], targets[second], COUNT)
    assert torch.equal(before, after)
    assert not torch.equal(
        before, fast.loss(changed, Documents.of([13], tokens.device), positions[second], targets[second], COUNT)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_reaches_the_copies_that_multiply(fused: bool) -> None:
    model, batch = MODELS["Llama"](), a_batch([8, 8])
    fast = FastModel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
    for _ in range(3):
        loss = fast.loss(*batch, COUNT)
        assert loss.item() == pytest.approx(by_modules(model, *batch).item(), rel=CLOSE)
        gradients_ = gradients(model, loss)
        assert gradients_
        optimizer.step()


def test_an_adapter_that_is_put_back_reaches_the_copies_that_multiply() -> None:
    model, batch = MODELS["Llama"](), a_batch([8, 8])
    fast = FastModel(model)
    fast.loss(*batch, COUNT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter * 1.5)
    assert fast.loss(*batch, COUNT).item() == pytest.approx(by_modules(model, *batch).item(), rel=CLOSE)


def test_without_gradients_nothing_is_kept() -> None:
    model, batch = MODELS["Llama"](), a_batch([8, 8])
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = FastModel(model).loss(*batch, COUNT)
    assert not saved  # not by attention either
    assert loss.grad_fn is None
    assert loss.item() == pytest.approx(by_modules(model, *batch).item(), rel=CLOSE)


def test_a_loss_is_differentiated_once() -> None:
    """What it kept is used up by then: a second pass over it is an error that says so, and no other gradient."""
    model = MODELS["Llama"]()
    loss = FastModel(model).loss(*a_batch([8, 8]), COUNT)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(AssertionError, match="once"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_what_it_cannot_compute_is_named() -> None:
    llama = MODELS["Llama"]()
    assert why_not(llama, dora=True, longest=20) == "DoRA"
    assert "another layer" in (why_not(made(GemmaConfig(**SMALL)), dora=False, longest=20) or "")
    dropping = made(LlamaConfig(**SMALL, attention_dropout=0.1))
    assert why_not(dropping, dora=False, longest=20) == "its attention has dropout"
    embedding = made(LlamaConfig(**SMALL), target_modules=["q_proj", "embed_tokens"])
    assert "embed_tokens" in (why_not(embedding, dora=False, longest=20) or "")
    sliding = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0}
    assert "10 tokens" in (why_not(made(Qwen3Config(**SMALL, **sliding)), dora=False, longest=11) or "")
    window = made(MistralConfig(**SMALL, sliding_window=10))
    assert why_not(window, dora=False, longest=10) is None
    assert "10 tokens" in (why_not(window, dora=False, longest=11) or "")
    gelu = made(LlamaConfig(**SMALL, hidden_act="gelu"))
    assert "gelu" in (why_not(gelu, dora=False, longest=20) or "")
    head = made(LlamaConfig(**SMALL), target_modules=["q_proj", "lm_head"])
    assert "lm_head" in (why_not(head, dora=False, longest=20) or "")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_stored_with_scales_of_their_own_are_left_to_their_modules(dtype: torch.dtype) -> None:
    """As bitsandbytes' 8 bits are, or a checkpoint in fp8: without the scales they would be other weights."""
    model = MODELS["Llama"]()
    linear = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    linear.weight = torch.nn.Parameter((100 * linear.weight).to(dtype), requires_grad=False)
    assert why_not(model, dora=False, longest=20) == "its weights are stored as Linear has them"


def test_attention_is_causal_within_a_document() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    documents = Documents.of([4, 5], q.device)
    before = attend(q, k, v, documents)
    for at in range(9):
        changed = v.clone()
        changed[at] += 1
        differs = (attend(q, k, changed, documents) != before).flatten(1).any(1)
        assert differs.tolist() == [at <= token < (4 if at < 4 else 9) for token in range(9)]


def test_fp8_is_near_in_every_gradient() -> None:
    """What e4m3 costs, on a model of three layers with random weights: the worst case, since nothing is learnt."""
    config = LlamaConfig(**(SMALL | {"hidden_size": 64, "intermediate_size": 128}))
    model = made(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16() if not parameter.requires_grad else parameter.data.float()
    batch = a_batch([16, 16])
    fast = FastModel(model)
    exact = gradients(model, fast.loss(*batch, COUNT))
    fast.use_fp8()
    rough = gradients(model, fast.loss(*batch, COUNT))
    for name, tensor in exact.items():
        cosine = torch.nn.functional.cosine_similarity(rough[name].flatten(), tensor.flatten(), dim=0)
        assert 0.95 < cosine < 1, name


def test_a_small_branch_is_rounded_at_its_own_size_before_it_meets_a_large_residual() -> None:
    group = FastModel(made(LlamaConfig(**SMALL))).layers[0].o
    refresh([group], torch.bfloat16)
    torch.manual_seed(0)
    x, residual = torch.randn(64, 32).bfloat16(), (torch.randn(64, 32) + 100).bfloat16()
    found, _ = group.forward(x, onto=residual)
    down, up = (copy.double() for copy in group.adapter)
    exact = residual.double() + x.double() @ group.frozen.dense(torch.float64).T + x.double() @ down.T @ up.T
    # Numbers of 64 to 128 lie 0.5 apart in bf16. Rounded there twice, some would be almost that far off.
    assert (found.double() - exact).abs().max() < 0.27


def test_a_group_without_an_adapter_has_no_parameters() -> None:
    torch.manual_seed(0)
    linears = [torch.nn.Linear(8, 6).double(), torch.nn.Linear(8, 4).double()]
    group = Group(linears)
    x = torch.randn(3, 8, dtype=torch.float64)
    y, inner = group.forward(x)
    assert inner is None
    assert group.copies(torch.float64) == []
    assert group.parameters == []
    assert torch.allclose(y, torch.cat([linear(x) for linear in linears], dim=1))
    dx, _ = group.input_gradient(y)
    assert torch.allclose(dx, y @ torch.cat([linear.weight for linear in linears]))
