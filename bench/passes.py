"""Every way to compute a batch's loss, logits and gradients that bench/precision.py compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from steps import build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear
from workload import Deviation

from job.contract.recipe import Recipe
from job.fast.attention import Documents
from job.fast.kernels import in_torch, in_triton
from job.fast.model import FastModel
from launch.shape import Shape

EXACT, PLAIN, FAST, FP8 = "fp32", "plain", "fast", "fp8"
AGAIN: Final = ("plain, another attention", "plain, one row at a time", "plain, features shuffled")
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Pass:
    """What a path makes of a batch.

    Args:
        loss: mean, in nats.
        gradients: by parameter.
        logits: (tokens, vocabulary).
    """

    loss: float
    gradients: Gradients
    logits: Tensor


def adapted(shape: Shape, recipe: Recipe, deviation: Deviation) -> Any:
    """A model whose adapter adds something, with fp32 masters; the same at every call."""
    torch.manual_seed(3)
    model = build(shape, recipe, deviation)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data += 0.01 * torch.randn_like(parameter.data)
    if not torch.cuda.is_available():
        _as_on_a_gpu(model)
    return model


def _as_on_a_gpu(model: Any) -> None:
    """Frozen weights in bf16, which are fp32 on a CPU."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = torch.bfloat16


def by_modules(
    model: Any, tokens: Tensor, *, bf16: bool, kernel: SDPBackend | None = None, rows: int | None = None
) -> Pass:
    """Through PEFT's and transformers' own modules, so many rows at a time; gradients are added up in fp32."""
    model.zero_grad()
    loss, logits = 0.0, []
    for part in tokens.split(rows or len(tokens)):
        with ExitStack() as within:
            within.enter_context(torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16))
            if kernel is not None:
                within.enter_context(sdpa_kernel(kernel))
            found = model(input_ids=part).logits
        summed = cross_entropy(found[:, :-1].float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        mean = summed / (len(tokens) * (tokens.shape[1] - 1))
        mean.backward()
        loss += mean.item()
        logits.append(found.detach().flatten(0, 1))
    return Pass(loss, _gradients(model), torch.cat(logits))


def by_fast(model: Any, tokens: Tensor, *, fp8: bool = False, forward: bool | None = None) -> Pass:
    """`forward`: whether fp8 multiplies forward as well; None for where the job has it."""
    model.zero_grad()
    fast = FastModel(model, kernels=in_triton() if tokens.is_cuda else in_torch())
    if fp8:
        fast.use_fp8()
    if forward is not None:
        for group in (group for layer in fast.layers for group in layer.groups):
            group.fp8_forward = forward
    flat, documents = tokens.flatten(), Documents.of([tokens.shape[1]] * len(tokens), tokens.device)
    places = torch.arange(len(flat), device=tokens.device)
    positions = places[(places + 1) % tokens.shape[1] != 0]
    loss = fast.loss(flat, documents, positions, flat[positions + 1], float(len(positions)))
    loss.backward()
    inner = model.get_base_model()
    with torch.no_grad():
        logits = inner.lm_head(inner.model.norm(fast.states(flat, documents)))
    return Pass(loss.item(), _gradients(model), logits)


def _gradients(model: Any) -> Gradients:
    """Of every tensor of the adapter; zeros where a path found none."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained}


def paths(model: Any, tokens: Tensor) -> dict[str, Callable[[], Pass]]:
    """Everything that is compared, by name."""
    # On Hopper the default is cuDNN's kernel, on a CPU a fused one.
    another = SDPBackend.FLASH_ATTENTION if tokens.is_cuda else SDPBackend.MATH

    def exact() -> Pass:
        with in_fp32(model):
            return by_modules(model, tokens, bf16=False, kernel=SDPBackend.MATH, rows=1)

    def in_another_order() -> Pass:
        with multiplied(model, shuffled):
            return by_modules(model, tokens, bf16=True)

    return {
        EXACT: exact,
        PLAIN: lambda: by_modules(model, tokens, bf16=True),
        AGAIN[0]: lambda: by_modules(model, tokens, bf16=True, kernel=another),
        AGAIN[1]: lambda: by_modules(model, tokens, bf16=True, rows=1),
        AGAIN[2]: in_another_order,
        FAST: lambda: by_fast(model, tokens),
        FP8: lambda: by_fast(model, tokens, fp8=True),
        "fp8, all products": lambda: by_fast(model, tokens, fp8=True, forward=True),
        "fp8, gradients only": lambda: by_fast(model, tokens, fp8=True, forward=False),
    }


@contextmanager
def multiplied(model: Any, by: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """The quantised linears multiply by what they dequantise to as `by` of it does."""
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in linears:
        module.forward = by(dequantize_4bit(module.weight.data, module.weight.quant_state))
    try:
        yield
    finally:
        for module in linears:
            del module.forward


def shuffled(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x W^T with the features of both sides in another order: other sums of the same numbers, in both passes."""
    rows, columns = (torch.randperm(size, device=weight.device) for size in weight.shape)
    weight, back = weight[rows][:, columns], rows.argsort()
    return lambda x: linear(x.index_select(-1, columns), weight).index_select(-1, back)


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Every weight is fp32: the quantised ones as they dequantise."""
    halves = [parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        with multiplied(model, lambda weight: partial(linear, weight=weight.float())):
            yield
    finally:
        for parameter in halves:
            parameter.data = parameter.data.bfloat16()
