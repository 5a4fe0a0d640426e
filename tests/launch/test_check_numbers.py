"""What a check says of lengths, and of base models that cannot pack, whatever they are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.histogram import BARS, histogram, percentile
from launch.isolation import leak_of


@given(st.lists(st.integers(1, 10**6) | st.integers(1, 50), min_size=1, max_size=300))
def test_every_length_is_in_one_bar_and_in_the_right_one(lengths: list[int]) -> None:
    found = histogram(lengths)
    assert sum(found.counts) == len(lengths)
    for (low, high), count in zip(pairwise(found.edges), found.counts, strict=True):
        assert low < high
        assert count == sum(low < length <= high for length in lengths)
    assert len(found.counts) <= BARS + 2
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert found.shortest <= found.median <= found.p95 <= found.longest


def test_a_few_long_rows_do_not_flatten_all_others() -> None:
    found = histogram([*range(1, 101)] * 10 + [1_000_000])
    assert found.edges[:3] == (0, 10, 20)
    assert found.edges[-1] == 1_000_000
    assert found.counts == (100,) * 10 + (1,)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 5), (0.51, 6), (0.95, 10), (1.0, 10)])
def test_a_percentile_is_a_value_that_is_there(share: float, value: int) -> None:
    assert percentile(range(1, 11), share) == value


QWEN3_NEXT = {"model_type": "qwen3_next", "layer_types": ["linear_attention"] * 3 + ["full_attention"]}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (QWEN3_NEXT, "linear_attention layers"),
        ({"model_type": "qwen3_next"}, "layers of the type qwen3_next"),
        ({"model_type": "mamba"}, "layers of the type mamba"),
        ({"model_type": "jamba"}, "layers of the type jamba"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "conv layers"),
        ({"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid"]}, "hybrid, mamba layers"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, "layers of the type qwen3_5"),
        ({"model_type": "new", "text_config": {"layer_types": ["linear_attention"]}}, "linear_attention layers"),
        ({"model_type": "llama"}, None),
        ({"model_type": "gemma3", "text_config": {"layer_types": ["sliding_attention", "full_attention"]}}, None),
        # A dense model of a family that has others: its own word counts.
        ({"model_type": "qwen3_next", "layer_types": ["full_attention"]}, None),
        ({"model_type": "nobody-knows"}, None),
        ({}, None),
        ({"model_type": ["mamba"], "layer_types": [1, None], "text_config": "?"}, None),
    ],
)
def test_layers_that_carry_a_state_are_told(config: dict[str, Any], told: str | None) -> None:
    assert leak_of(config) == told
