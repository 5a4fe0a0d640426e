"""What the benchmarks train: Llama-like models of known shapes, with random weights made on the GPU, since 70B of them
fit on few disks.

torch and transformers are imported where they are used: Unsloth has to be imported before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from launch.shape import LLAMA_8B, LLAMA_70B, TINY_SHAPE, Shape

SHAPES: Final = {"tiny": TINY_SHAPE, "8B": LLAMA_8B, "70B": LLAMA_70B}
ROWS_PACKED: Final = 5
"""In each sequence of a packed setting, equally long: 409 tokens at a length of 2048. With rows of many lengths hardly
two micro-batches are equally long, and cuDNN plans its attention anew for each length that it has not met in the
process: 0.2 s where it is causal, 0.8 s where rows are masked (H200, torch 2.11, 2026-11-23), which would be most of
a short measurement."""

Deviation = Callable[[str, Sequence[int]], float]
"""The standard deviation of a weight's values, by its module's name and its shape."""


def keeps_variance(_name: str, shape: Sequence[int]) -> float:
    """What comes out of a linear varies as what goes in."""
    return float(shape[-1]) ** -0.5


def llama_config(shape: Shape, **more: Any) -> Any:
    """transformers' configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=shape.tied,
        **more,
    )


def random_model(config: Any, *, dtype: Any = None, deviation: Deviation = keeps_variance) -> Any:
    """A model as transformers loads one with bitsandbytes, NF4 with double quantisation, without any weights in a file.

    transformers' own quantiser puts bitsandbytes' layers in place, and bitsandbytes quantises them.

    Args:
        dtype: of the weights before they are quantised, and of what is computed; bf16 on a GPU, else fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    compute = dtype or (torch.bfloat16 if cuda else torch.float32)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    quantiser = Bnb4BitHfQuantizer(quantisation, pre_quantized=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=compute)
    quantiser.preprocess_model(model, dtype=compute, device_map={"": device})
    for name, module in model.named_modules():
        _fill(name, module, device, compute, deviation)
    with device:  # its frequencies are no weights: they are computed when it is made
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.hf_quantizer = quantiser
    model.config.quantization_config = quantisation
    quantiser.postprocess_model(model)
    model.config.use_cache = False
    model.eval()
    return model


def _fill(name: str, module: Any, device: Any, dtype: Any, deviation: Deviation) -> None:
    """Give a module's own weights random values: ones in norms, normal ones elsewhere.

    In `dtype`, as a checkpoint has them, whatever the empty ones have: bitsandbytes gives weights back in the dtype
    that it quantised, and Axolotl's kernels multiply them by activations as they are.
    """
    import torch
    from torch import nn

    for key, empty in list(module.named_parameters(recurse=False)):
        if empty.ndim == 1:
            value = torch.ones(empty.shape, dtype=dtype, device=device)
        else:
            value = torch.randn(empty.shape, dtype=dtype, device=device) * deviation(name, empty.shape)
        if type(empty) is nn.Parameter:
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        else:  # bitsandbytes' own, which quantises what is moved
            setattr(module, key, type(empty)(value, requires_grad=False, **empty.__dict__).to(device))
