"""Promise: the fast path computes what the modules compute: loss and every gradient, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from job.contract.errors import TrainingFailed
from job.contract.fast_path import Keep
from job.fast import pointwise
from job.fast.attention import Documents, attend
from job.fast.dropout import Dropout
from job.fast.kernels import in_torch
from job.fast.linear import Group, refresh
from job.fast.model import FastModel, why_not

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WIDE_HEADS = SMALL | {"head_dim": 24}
COUNT = 7.0
"""What losses are divided by: not the number of this batch's tokens, which are a part of a step."""
CLOSE = 4e-6
"""transformers normalises in fp32 whatever the weights are in."""


def made(config: Any, **lora: Any) -> Any:
    """A model in float64 with an adapter that does something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().requires_grad_(False)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**(settings | lora)))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or "norm" in name or "bias" in name:
            parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).double()
    return adapted


def a_batch(lengths: list[int]) -> tuple[Tensor, Documents, Tensor, Tensor]:
    """Tokens, and every third of them untrained."""
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (sum(lengths),))
    last = set(torch.tensor(lengths).cumsum(0).sub(1).tolist())
    positions = torch.tensor([at for at in range(len(tokens)) if at % 3 and at not in last])
    return tokens, Documents.of(lengths, tokens.device), positions, tokens[positions + 1]


def by_modules(model: Any, tokens: Tensor, documents: Documents, positions: Tensor, targets: Tensor) -> Tensor:
    """The same loss, each document alone through transformers' and PEFT's own modules."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length in documents.lengths:
        logits = model(input_ids=tokens[start : start + length][None]).logits[0].double()
        inside = (positions >= start) & (positions < start + length)
        log = torch.log_softmax(logits[positions[inside] - start], dim=-1)
        total = total - log.gather(1, targets[inside][:, None]).sum()
        start += length
    return total / COUNT


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= CLOSE * tensor.abs().max(), name
        assert tensor.abs().max() > 0, name


def rotated_by(kind: str, **how: float) -> LlamaConfig:
    return LlamaConfig(**SMALL, rope_parameters={"rope_type": kind, "rope_theta": 10000.0} | how)


MODELS = {
    "Llama": lambda: made(LlamaConfig(**SMALL)),
    "Mistral": lambda: made(MistralConfig(**SMALL, sliding_window=None)),
    "Qwen 2, with biases": lambda: made(Qwen2Config(**SMALL)),
    "Qwen 3, heads that are normed, and wider together than the stream": lambda: made(Qwen3Config(**WIDE_HEADS)),
    "Qwen 3, with biases, v and up only": lambda: made(
        Qwen3Config(**WIDE_HEADS, attention_bias=True), target_modules=["v_proj", "up_proj"]
    ),
    "q and v only": lambda: made(LlamaConfig(**SMALL), target_modules=["q_proj", "v_proj"]),
    "k and down only": lambda: made(LlamaConfig(**SMALL), target_modules=["k_proj", "down_proj"]),
    "ranks that differ": lambda: made(LlamaConfig(**SMALL), rank_pattern={"k_proj": 2, "up_proj": 6}),
    "rank 1": lambda: made(LlamaConfig(**SMALL), r=1),
    "gate only, rank 5, scaled by its root": lambda: made(
        LlamaConfig(**SMALL), r=5, lora_alpha=7, use_rslora=True, target_modules=["gate_proj"]
    ),
    "one linear each of two layers, and none of the first": lambda: made(
        LlamaConfig(**SMALL), target_modules=["layers.1.self_attn.o_proj", "layers.2.mlp.down_proj"]
    ),
    "biases everywhere, as many heads of k as of q": lambda: made(
        LlamaConfig(**(SMALL | {"num_key_value_heads": 4}), attention_bias=True, mlp_bias=True)
    ),
    "one head of k, and the embedding is the head": lambda: made(
        Qwen2Config(**(SMALL | {"num_key_value_heads": 1}), tie_word_embeddings=True)
    ),
    "Llama 3's rotation": lambda: made(
        rotated_by("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
    ),
    "YaRN, whose rotation is no rotation alone": lambda: made(
        rotated_by("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "linear positions": lambda: made(rotated_by("linear", factor=4.0)),
}


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


class TestPointwise:
    """Each gradient against autograd's."""

    def test_rms_norm(self) -> None:
        torch.manual_seed(0)
        x, weight = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64)
        found, scale, _ = pointwise.rms_norm(x, weight, 1e-6, quantise=False)
        expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
        assert torch.allclose(found, expected)
        gradient, beside = torch.randn(2, 5, 16, dtype=torch.float64)
        [autograd] = torch.autograd.grad(expected, x, gradient)
        ours, _ = pointwise.rms_norm_gradient(gradient, x.detach(), weight, scale.detach(), beside, quantise=False)
        assert torch.allclose(ours, autograd + beside)
        assert torch.equal(pointwise.normed(x, weight, scale), found)

    def test_swiglu(self) -> None:
        torch.manual_seed(0)
        gate_up = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
        found, _ = pointwise.swiglu(gate_up, None, quantise=False)
        gradient = torch.randn(5, 12, dtype=torch.float64)
        [autograd] = torch.autograd.grad(found, gate_up, gradient)
        ours, act, _ = pointwise.swiglu_gradient(gradient, gate_up.detach(), None, None, None, quantise=False)
        assert torch.allclose(ours, autograd)
        assert torch.equal(act, found)

    def test_rotation_turns_back(self) -> None:
        torch.manual_seed(0)
        states = torch.randn(5, 4, 8, dtype=torch.float64)
        angle = torch.randn(5, 4, dtype=torch.float64)
        turned = pointwise.rotate(states.clone(), angle.cos(), angle.sin(), 3)
        assert torch.equal(turned[:, 3], states[:, 3])
        assert not torch.allclose(turned[:, :3], states[:, :3])
        back = pointwise.rotate_gradient(turned[:, :2], turned[:, 2:3], turned[:, 3:], angle.cos(), angle.sin())
        assert torch.allclose(back, states)

    def test_norm_and_rotation_of_heads(self) -> None:
        torch.manual_seed(0)
        heads, kv_heads = 3, 2
        states = torch.randn(5, heads + 2 * kv_heads, 8, dtype=torch.float64, requires_grad=True)
        of_query, of_key = torch.randn(2, 8, dtype=torch.float64)
        norms = pointwise.HeadNorms(of_query, of_key, 1e-6)
        norms.query[3] = 0.0  # what a weight of zero hides cannot be seen in the rotated values
        angle = torch.randn(5, 4, dtype=torch.float64)
        cos, sin = angle.cos(), angle.sin()
        found = (
            *pointwise.norm_and_rotate(states, norms, cos, sin, heads, kv_heads),
            states[:, heads + kv_heads :],
        )
        normed = [
            torch.nn.functional.rms_norm(part, (8,), weight, norms.epsilon)
            for part, weight in ((states[:, :heads], norms.query), (states[:, heads : heads + kv_heads], norms.key))
        ]
        for ours, alone in zip(found, normed, strict=False):
            assert torch.allclose(ours, pointwise.rotate(alone, cos, sin, alone.shape[1]))
        query, key, value = (torch.randn_like(part) for part in found)
        [autograd] = torch.autograd.grad(found, states, (query, key, value))
        back = pointwise.norm_and_rotate_gradient(query, key, value, states.detach(), norms, cos, sin)
        assert torch.allclose(back, autograd)

    def test_heads_are_rounded_where_the_modules_round_them(self) -> None:
        torch.manual_seed(0)
        states, weight = torch.randn(65, 4, 16).bfloat16(), torch.randn(16).bfloat16()
        theirs = Qwen3RMSNorm(16, eps=1e-6)
        theirs.weight.data = weight
        still = torch.ones(65, 8), torch.zeros(65, 8)
        query, key = pointwise.norm_and_rotate(states, pointwise.HeadNorms(weight, weight, 1e-6), *still, 2, 1)
        assert torch.equal(torch.cat((query, key), dim=1), theirs(states[:, :3]))

    def test_cross_entropy(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(0, 11, (5,))
        expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss, gradient = pointwise.cross_entropy(logits.detach(), targets)
        assert loss.item() == pytest.approx(expected.item())
        assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0])

    def test_a_row_in_e4m3_is_within_half_a_step_of_itself(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
        small, scale = pointwise.to_fp8(x)
        error = (small.float() * scale - x).abs()
        # 3 bits of mantissa: 2^-4 of the value; below the smallest normal, 2^-6, steps are 2^-9 of the scale.
        assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all()


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
    exact = residual.double() + x.double() @ group.weight(torch.float64).T + x.double() @ down.T @ up.T
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
