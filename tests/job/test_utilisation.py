"""Promise: MFU is what the definition says, for models and GPUs that are known, and nothing for others."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from job.batches import Ledger, StepMeter
from job.tiny import FEED_FORWARD, HEADS, HIDDEN, LAYERS
from job.utilisation import Cost, Utilisation, cost_of, pairs, peak_of, utilisation
from job.weights import Base
from launch.cards import CARDS
from tests.job.stack import adapted, tiny_recipe

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_a_frozen_llama_8b_costs_four_flops_a_parameter_and_twelve_a_pair() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_8B).requires_grad_(False)
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14_336)
    assert cost_of(model) == Cost(4 * (32 * layer + 4096 * 128_256), 12 * 32 * 4096)


def test_trained_weights_cost_what_they_cost_in_the_paper() -> None:
    """PaLM, appendix B: 6 N + 12 L H Q T a token, where each of T tokens is seen by all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_8B)
    found = cost_of(model)
    assert found is not None
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    assert found.of(2048, 2048**2) == 2048 * (6 * matrices + 12 * 32 * 32 * 128 * 2048)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_weight_in_four_bits_costs_what_it_stands_for(base: Base, method: str) -> None:
    model = adapted(tiny_recipe(method=method), base)
    config = model.config
    of_kv = config.num_key_value_heads * HIDDEN // HEADS
    frozen = LAYERS * HIDDEN * (2 * HIDDEN + 2 * of_kv + 3 * FEED_FORWARD) + HIDDEN * config.vocab_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost_of(model) == Cost(4 * frozen + 6 * trained, 12 * LAYERS * HIDDEN)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("mixtral", {"num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("mamba", {"state_size": 8}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_decoder_is_not_guessed(kind: str, config: dict[str, int]) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2} | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    assert cost_of(model) is None
    assert utilisation(model, "NVIDIA H200") is None


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIE"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_the_peak_is_the_datasheets(name: str, card: str) -> None:
    assert peak_of(name) == CARDS[card].tflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["CPU AVX512", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA A100X", ""],
)
def test_no_peak_is_guessed(base: Base, name: str) -> None:
    assert peak_of(name) is None
    assert utilisation(adapted(tiny_recipe(), base), name) is None


def test_pairs_are_those_that_a_causal_mask_leaves() -> None:
    lengths = [1, 5, 12]
    assert pairs(lengths) == sum(int(torch.ones(n, n).tril().sum()) for n in lengths)


def test_the_meter_tells_the_share_of_the_peak_that_was_used() -> None:
    meter = StepMeter(Utilisation(Cost(of_token=1000, of_pair=10), peak=1e4))
    meter._started -= 2.0  # so long ago
    meter.add(Ledger(rows=(1,), tokens=8, trained=3, pairs=36))
    meter.add(Ledger(rows=(2,), tokens=2, trained=1, pairs=3))
    found = meter.take()
    assert found.mfu == pytest.approx((10 * 1000 + 39 * 10) / 2.0 / 1e4, rel=0.01)
    assert found.tokens_per_second == pytest.approx(5.0, rel=0.01)
    assert meter.take().mfu is None  # nothing was trained
    unknown = StepMeter()
    unknown.add(Ledger(rows=(1,), tokens=8, trained=3, pairs=36))
    assert unknown.take().mfu is None
