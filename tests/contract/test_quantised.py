"""Promise: the codes of a quantised model are never taken for its weights."""

from __future__ import annotations

from typing import Any

import pytest

from job.contract.quantised import refuse_quantised

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        ({}, "lora", None),
        ({"quantization_config": None}, "lora", None),
        ({"quantization_config": {}}, "qlora", None),
        ({"quantization_config": NF4}, "qlora", None),
        ({"quantization_config": {"_load_in_4bit": True}}, "qlora", None),  # of before there were others
        ({"quantization_config": NF4}, "lora", "published in 4 bits"),
        ({"quantization_config": INT8}, "lora", "8 bits by bitsandbytes"),
        ({"quantization_config": INT8}, "qlora", "8 bits by bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "lora", "quantised (fp8)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "qlora", "quantised (fp8)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "qlora", "quantised (gptq)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "qlora", "quantised (mxfp4)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "lora", "quantised (compressed-tensors)"),
        ({"quantization_config": {"bits": 3}}, "lora", "published quantised"),
    ],
)
def test_only_four_bits_of_bitsandbytes_are_trained_and_by_qlora(
    config: dict[str, Any], method: str, said: str | None
) -> None:
    refused = refuse_quantised(config, method, model="org/mine")
    if said is None:
        assert refused is None
    else:
        assert refused is not None
        assert said in refused.message
        assert "org/mine" in refused.message
        assert "the model that it was made from" in refused.hint
