"""What the fast path and fp8 cost in exactness, on a GPU: gradients beside fp32's, and loss curves side by side.

    python bench/precision.py [--steps 200] [--json FILE] [--svg FILE]      needs an NVIDIA GPU
    python bench/precision.py --gradients-only [--layers 4]                 no curves
    python bench/precision.py --smoke                                       the tiny shape, on any machine, in seconds

Gradients: a few layers of the 8B shape (`--layers 32` is all of them) with random weights and an adapter that does
something, one batch of rows. Each path's logits and its gradient of every LoRA tensor are compared with those of fp32
arithmetic on the same dequantised weights (PEFT's and transformers' own modules). The modules in bf16, "plain", are
compared as well; and with them the fast path, and they themselves with nothing changed but the order of sums: another
kernel for attention, one row at a time, or the features of every frozen product shuffled. That is how near to plain a
path can be that rounds where plain rounds. One that rounds elsewhere, or less, is as near as its own error and plain's
allow: where these have nothing to do with each other, the root of the sum of their squares apart.

Two initialisations, for errors grow with what each layer adds to the residual stream: see INITIALISATIONS. fp8 is taken
apart: as the job has it (all gradients, and gate, up and down forward), in all products, and in gradients only.

Columns: a cosine of 1 is no error; `at` is the tensor of the lowest one; `error` is the norm of the difference over
that of the reference, `norms` the lowest and the highest |found| over |reference| of a tensor.

Curves: the job itself trains eight layers of the 8B shape on rows that can be learnt (walks on a random graph of 64
words, five rows packed to a sequence), by PEFT's modules, by the fast path, and in fp8. Bits: some steps by the fast
path twice, and twice more with `reproducible`, of which the last two have to be equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from steps import NEVER, Deviation, Setting, build, keeps_variance
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear

from job.callbacks import Steering
from job.contract.metrics import MetricLine, Step
from job.contract.recipe import TINY_MODEL, BaseModelRef, Recipe
from job.dataset.reader import LineNumber
from job.dataset.render import RenderedRow
from job.fast.attention import Documents
from job.fast.kernels import in_torch, in_triton
from job.fast.model import FastModel
from job.logs import configure
from job.model import hardware, load_tokenizer
from job.notice import Notice
from job.speed import speed_up
from job.train import Rows, Training
from job.weights import locate
from launch.shape import LLAMA_8B, TINY_SHAPE, Shape

LAYERS: Final = 4
REPEATED: Final = 30
"""Steps of the runs whose bits are compared."""
BATCH: Final = (4, 512)
SMOKE_BATCH: Final = (4, 48)
"""Rows, and tokens of each."""
CHUNK: Final = 512
"""Tokens whose logits are compared at a time."""
WORDS: Final = 64
SETTING: Final = Setting("8B", 2, 1, True, max_length=2048)
EXACT, PLAIN, FAST, FP8 = "fp32", "plain", "fast", "fp8"
AGAIN: Final = ("plain, another attention", "plain, one row at a time", "plain, features shuffled")
AGAINST: Final = {EXACT: (PLAIN, *AGAIN, FAST, FP8, "fp8, all products", "fp8, gradients only"), PLAIN: (*AGAIN, FAST)}
"""What is compared with what."""

Gradients = dict[str, Tensor]


def as_published(name: str, _shape: Sequence[int]) -> float:
    """As models are initialised: 0.02, and what is added to the residual stream less by the root of how often it is.

    Source: Radford et al. 2019 (GPT-2), section 2.3; Shoeybi et al. 2019, arXiv:1909.08053, section 3.

    The embedding's is 1, not 0.02, beside which each of the first layer's branches would be four times the stream.
    In trained models neighbouring blocks' activations often have cosines above 0.99 (Liu et al. 2023, arXiv:2310.17157,
    OPT), and the stream's norm grows by 4.5 % a layer (GPT-2 XL; Heimersheim and Turner 2023, "Residual stream norms
    grow exponentially over the forward pass"): 0.1 to 0.3 of the stream, where branch and stream are orthogonal.
    """
    if name.endswith("embed_tokens"):
        return 1.0
    return 0.02 / (2 * LLAMA_8B.layers) ** 0.5 if name.endswith(("o_proj", "down_proj")) else 0.02


INITIALISATIONS: Final[dict[str, Deviation]] = {"as published": as_published, "variance kept": keeps_variance}
"""How models are, and the worst case: there the stream begins at 1/64 while layers add about 1, so that a layer reads
little but what the layers before it wrote, rounding errors included."""


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


def branches(model: Any, tokens: Tensor) -> dict[str, list[float]]:
    """|branch| / |residual stream that it is added to|, mean of all tokens, by layer."""
    streams: list[Tensor] = []
    found: dict[str, list[float]] = {"attention": [], "feed-forward": []}

    def enters(_module: Any, arguments: Any) -> None:
        streams.append(arguments[0])

    def leaves(name: str, branch: Tensor) -> None:
        of_tokens = branch.float().norm(dim=-1) / streams.pop().float().norm(dim=-1)
        found[name].append(of_tokens.mean().item())

    hooks = []
    for layer in model.get_base_model().model.layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        hooks += [norm.register_forward_pre_hook(enters) for norm in norms]
        hooks.append(layer.self_attn.register_forward_hook(lambda _m, _i, out: leaves("attention", out[0])))
        hooks.append(layer.mlp.register_forward_hook(lambda _m, _i, out: leaves("feed-forward", out)))
    with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


def compared_paths(ways: Mapping[str, Callable[[], Pass]]) -> dict[str, Any]:
    """Each path once, compared with the references that AGAINST names."""
    references: dict[str, Pass] = {}
    losses: dict[str, float] = {}
    found: dict[str, Any] = {name: {} for name in AGAINST}
    for name, way in ways.items():
        result = way()
        losses[name] = result.loss
        for reference in (each for each in references if name in AGAINST[each]):
            found[reference][name] = compared(result, references[reference])
        if name in AGAINST:
            references[name] = result
        del result
        _free()
    return {"losses": losses, **{f"against {name}": by_path for name, by_path in found.items()}}


def _free() -> None:
    """On a GPU, where memory is short."""
    if torch.cuda.is_available():
        gc.collect()  # weights in e4m3 and their group refer to each other
        torch.cuda.empty_cache()


class Angle(NamedTuple):
    """Between what was found and a reference: of two vectors, their cosine, |found| / |reference|, |difference| /
    |reference|."""

    cosine: float
    norm: float
    error: float

    @classmethod
    def of(cls, sums: Tensor) -> Angle:
        """From `_sums` of a vector. What is zero or not finite points nowhere: its cosine is 0."""
        product, found, reference, difference = sums.tolist()
        cosine = product / math.sqrt(found * reference) if found * reference > 0 else 0.0
        return cls(
            cosine if math.isfinite(cosine) else 0.0,
            math.sqrt(found / reference) if reference > 0 else math.inf,
            math.sqrt(difference / reference) if reference > 0 else math.inf,
        )


def _sums(found: Tensor, reference: Tensor) -> Tensor:
    """(..., n) twice -> (..., 4) in float64: found * reference, and the squares of both and of their difference."""
    parts = (found * reference, found.square(), reference.square(), (found - reference).square())
    return torch.stack([part.sum(-1, dtype=torch.float64) for part in parts], dim=-1)


def compared(found: Pass, reference: Pass) -> dict[str, Any]:
    """Logits and gradients of one path beside another's."""
    sums = {
        name: _sums(found.gradients[name].double().flatten(), tensor.double().flatten())
        for name, tensor in reference.gradients.items()
    }
    tensors = {name: Angle.of(each) for name, each in sums.items()}
    cosines = {name: angle.cosine for name, angle in tensors.items()}
    norms = [angle.norm for angle in tensors.values()]
    by_module: dict[str, float] = {}
    for name, cosine in cosines.items():
        module = name.split(".")[-4]
        by_module[module] = min(by_module.get(module, 1.0), cosine)
    together = Angle.of(torch.stack(list(sums.values())).sum(0))
    chunks = zip(found.logits.split(CHUNK), reference.logits.split(CHUNK), strict=True)
    of_tokens = torch.cat([_sums(a.float(), b.float()) for a, b in chunks]).cpu()
    logits = Angle.of(of_tokens.sum(0))
    return {
        "lowest cosine": min(cosines.values()),
        "at": min(cosines, key=lambda name: cosines[name]),
        "mean cosine": statistics.fmean(cosines.values()),
        "cosine of all together": together.cosine,
        "error of all together": together.error,
        "relative norms": [min(norms), max(norms)],
        "lowest by module": by_module,
        "by tensor": {name: {"cosine": angle.cosine, "relative norm": angle.norm} for name, angle in tensors.items()},
        "logits": {
            "cosine": logits.cosine,
            "lowest cosine of a token": min(Angle.of(each).cosine for each in of_tokens),
            "relative norm": logits.norm,
            "error": logits.error,
        },
    }


def gradients_report(shape: Shape, recipe: Recipe, batch: tuple[int, int]) -> dict[str, Any]:
    """Every path, by initialisation."""
    report: dict[str, Any] = {}
    for name, deviation in INITIALISATIONS.items():
        model = adapted(shape, recipe, deviation)
        device = next(model.parameters()).device
        tokens = torch.randint(0, shape.vocabulary, batch, device=device)
        found = report[name] = {"branches": branches(model, tokens), **compared_paths(paths(model, tokens))}
        print("\n".join(table(name, found)), flush=True)
        del model
        _free()
    return report


def table(initialisation: str, found: Mapping[str, Any]) -> list[str]:
    """Lines for a human. Columns: see the top of this file."""
    lines = ["", f"weights: {initialisation}; |branch| / |residual stream| by layer"]
    for name, ratios in found["branches"].items():
        lines.append(f"  {name:14} {' '.join(f'{ratio:.3g}' for ratio in ratios)}")
    titles = f"{'lowest':>9} {'mean':>9} {'all':>9} {'error':>8} {'norms':>13}  {'at':16}"
    for reference in AGAINST:
        name = f"against {reference}"
        lines.append(f"{name:31} {'loss':>8}  gradients: {titles} logits: {'cosine':>9} {'lowest':>9} {'error':>8}")
        if reference == EXACT:
            lines.append(f"  {reference:29} {found['losses'][reference]:8.4f}")
        lines += [_row(path, found["losses"][path], beside) for path, beside in found[name].items()]
    return lines


def _row(path: str, loss: float, beside: Mapping[str, Any]) -> str:
    low, high = beside["relative norms"]
    parts, logits = beside["at"].split("."), beside["logits"]
    at = f"{parts[parts.index('layers') + 1]} {parts[-4]} {parts[-3].removeprefix('lora_')}"
    return (
        f"  {path:29} {loss:8.4f} {beside['lowest cosine']:21.6f} {beside['mean cosine']:9.6f} "
        f"{beside['cosine of all together']:9.6f} {beside['error of all together']:8.5f} {low:6.3f} {high:6.3f}  "
        f"{at:16} {logits['cosine']:17.6f} {logits['lowest cosine of a token']:9.6f} {logits['error']:8.5f}"
    )


def shape_of(layers: int) -> Shape:
    """The 8B shape with fewer layers."""
    return LLAMA_8B.model_copy(update={"layers": layers})


def learnable_rows(count: int, length: int) -> list[RenderedRow]:
    """Walks on a graph in which every word is followed by one of four."""
    draw = random.Random(11)
    words = draw.sample(range(LLAMA_8B.vocabulary), WORDS)
    after = {word: draw.sample(words, 4) for word in words}
    rows = []
    for line in range(1, count + 1):
        ids = [draw.choice(words)]
        while len(ids) < length:
            ids.append(draw.choice(after[ids[-1]]))
        rows.append(RenderedRow(LineNumber(line), tuple(ids), tuple(ids)))
    return rows


def curve(recipe: Recipe, steps: int, *, plain: bool = False) -> tuple[list[float], float, str]:
    """(losses, median seconds of a step, a digest of the adapter's bits)."""
    rows = learnable_rows(steps * 2 * 5, 409)
    lines: list[MetricLine] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = load_tokenizer(locate(BaseModelRef(id=TINY_MODEL), folder))
        training = Training(
            recipe,
            build(shape_of(8), recipe),
            tokenizer,
            Rows(rows, []),
            workdir=folder,
            notice=Notice(),
            accelerate=(lambda *_, **__: None) if plain else speed_up,
        )
        steering = Steering(
            training, Notice(), save=lambda _: 0.0, write=lines.append, interval=NEVER, upload_seconds=lambda: 0.0
        )
        training.run(steering)
        bits = torch.cat(
            [p.detach().flatten().view(torch.int32) for p in training.model.parameters() if p.requires_grad]
        )
        digest = f"{int(bits.long().sum()):x}-{int((bits.long() * torch.arange(len(bits), device='cuda')).sum()):x}"
    taken = [line for line in lines if isinstance(line, Step)]
    del training
    torch.cuda.empty_cache()
    return [line.loss for line in taken], statistics.median(line.seconds for line in taken[5:]), digest


def curves(steps: int) -> dict[str, Any]:
    """Loss by step of each path."""
    recipe = SETTING.recipe()

    def changed(**keys: Any) -> Recipe:
        return recipe.model_copy(update={"training": recipe.training.model_copy(update=keys)})

    runs: dict[str, tuple[Recipe, bool, int]] = {
        "plain": (recipe, True, steps),
        "fast": (recipe, False, steps),
        "fp8": (changed(precision="fp8"), False, steps),
        "fast, some steps": (recipe, False, REPEATED),
        "fast, again": (recipe, False, REPEATED),
        "reproducible": (changed(reproducible=True), False, REPEATED),
        "reproducible, again": (changed(reproducible=True), False, REPEATED),
    }
    found = {}
    for name, (how, plain, count) in runs.items():
        began = time.perf_counter()
        losses, seconds, digest = curve(how, count, plain=plain)
        found[name] = {"losses": losses, "seconds": seconds, "digest": digest}
        print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds:.3f} s a step, bits {digest}", flush=True)
        print(f"   in all {time.perf_counter() - began:.0f} s", flush=True)
    return found


COLOURS: Final = {"plain": "#777777", "fast": "#1f77b4", "fp8": "#d62728"}


def svg(found: dict[str, Any]) -> str:
    """The curves as a drawing."""
    wide, high, left = 720, 360, 50
    top = max(max(found[name]["losses"]) for name in COLOURS if name in found)
    said = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif">']
    said.append(f'<rect width="{wide}" height="{high}" fill="white"/>')
    for tick in range(0, int(top) + 1, 2):
        y = high - 30 - tick / top * (high - 60)
        said.append(f'<line x1="{left}" x2="{wide - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        said.append(f'<text x="{left - 25}" y="{y + 4:.1f}" font-size="12">{tick}</text>')
    for index, (name, colour) in enumerate((n, c) for n, c in COLOURS.items() if n in found):
        losses = found[name]["losses"]
        points = " ".join(
            f"{left + at / max(1, len(losses) - 1) * (wide - left - 10):.1f},{high - 30 - loss / top * (high - 60):.1f}"
            for at, loss in enumerate(losses)
        )
        said.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        said.append(f'<text x="{wide - 200}" y="{30 + 18 * index}" font-size="13" fill="{colour}">{name}</text>')
    steps = len(next(iter(found.values()))["losses"])
    said.append(f'<text x="{wide // 2 - 60}" y="{high - 8}" font-size="12">step (1 to {steps}); loss in nats</text>')
    return "\n".join([*said, "</svg>\n"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model whose gradients are compared")
    parser.add_argument("--gradients-only", action="store_true", help="no curves")
    parser.add_argument("--smoke", action="store_true", help="the tiny shape; no curves")
    parser.add_argument("--steps", type=int, default=200, help="of the curves")
    parser.add_argument("--json", metavar="FILE", help="all that was found")
    parser.add_argument("--svg", metavar="FILE", help="the curves as a drawing")
    asked = parser.parse_args(arguments)
    if not 1 <= asked.layers <= LLAMA_8B.layers:
        parser.error(f"--layers: 1 to {LLAMA_8B.layers}")
    if not (asked.smoke or torch.cuda.is_available()):
        parser.error("this needs an NVIDIA GPU; --smoke does not")
    shape, batch = (TINY_SHAPE, SMOKE_BATCH) if asked.smoke else (shape_of(asked.layers), BATCH)
    machine = {"machine": hardware().name, "torch": torch.__version__, "layers": shape.layers, "batch": batch}
    print(
        f"{machine['machine']}, torch {torch.__version__}; {shape.layers} layers, {batch[0]} rows of {batch[1]} tokens"
    )
    found = {**machine, "gradients": gradients_report(shape, SETTING.recipe(), batch)}
    if not (asked.smoke or asked.gradients_only):
        found["curves"] = curves(asked.steps)
        if asked.svg:
            Path(asked.svg).write_text(svg(found["curves"]), encoding="utf-8")
    if asked.json:
        Path(asked.json).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    configure()
    main()
