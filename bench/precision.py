"""What the fast path and fp8 cost in exactness, on a GPU: gradients beside fp32's, and loss curves side by side.

    python bench/precision.py [--steps 200] [--json FILE] [--svg FILE]      needs an NVIDIA GPU

Gradients: a few layers of the 8B shape with random weights and an adapter that does something, one batch of packed
rows. Each path's gradient of every LoRA tensor is compared with that of fp32 arithmetic on the same dequantised weights
(PEFT's and transformers' own modules): cosine, and relative norm. Likewise the plain path's, which is the yardstick:
nobody's bf16 is nearer to another bf16 than both are to fp32.

Curves: the job itself trains eight layers of the 8B shape on rows that can be learnt (walks on a random graph of 64
words, five rows packed to a sequence), by PEFT's modules, by the fast path, and in fp8. Bits: some steps by the fast
path twice, and twice more with `reproducible`, of which the last two have to be equal.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from steps import NEVER, Setting, build
from torch import Tensor

from job.callbacks import Steering
from job.contract.metrics import MetricLine, Step
from job.contract.recipe import TINY_MODEL, BaseModelRef, Recipe
from job.dataset.reader import LineNumber
from job.dataset.render import RenderedRow
from job.fast.attention import Documents
from job.fast.kernels import in_triton
from job.fast.model import FastModel
from job.logs import configure
from job.model import hardware, load_tokenizer
from job.notice import Notice
from job.speed import speed_up
from job.train import Rows, Training
from job.weights import locate
from launch.shape import LLAMA_8B, Shape

LAYERS: Final = 4
REPEATED: Final = 30
"""Steps of the runs whose bits are compared."""
LENGTH: Final = 512
WORDS: Final = 64
SETTING: Final = Setting("8B", 2, 1, True, max_length=2048)

Gradients = dict[str, Tensor]


def gradients_report() -> dict[str, Any]:
    """Cosine and relative norm of every LoRA gradient against fp32's, by path."""
    model = build(shape_of(LAYERS), SETTING.recipe())
    generator = torch.Generator(device="cuda").manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                parameter.data += 0.01 * torch.randn(parameter.shape, device="cuda", generator=generator)
    tokens = torch.randint(0, LLAMA_8B.vocabulary, (4, LENGTH), device="cuda", generator=generator)

    def collected(loss: Tensor) -> tuple[float, Gradients]:
        model.zero_grad()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def by_modules() -> Tensor:
        logits = model(input_ids=tokens).logits.float()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    flat, documents = tokens.flatten(), Documents.of([LENGTH] * len(tokens), tokens.device)
    positions = torch.tensor([at for at in range(len(flat)) if (at + 1) % LENGTH], device="cuda")

    def by_fast(fast: FastModel) -> Tensor:
        return fast.loss(flat, documents, positions, flat[positions + 1], float(len(positions)))

    with torch.autocast("cuda", torch.bfloat16):
        plain = collected(by_modules())
    fast = FastModel(model, kernels=in_triton())
    ours = collected(by_fast(fast))
    fast.use_fp8()
    fp8 = collected(by_fast(fast))
    exact = _in_fp32(model, lambda: collected(by_modules()))
    found: dict[str, Any] = {"loss": {"fp32": exact[0], "plain": plain[0], "fast": ours[0], "fp8": fp8[0]}}
    for name, path, reference in (
        ("plain against fp32", plain, exact),
        ("fast against fp32", ours, exact),
        ("fp8 against fp32", fp8, exact),
        ("fast against plain", ours, plain),
    ):
        found[name] = _compared(path[1], reference[1])
    return found


def _in_fp32(model: Any, act: Callable[[], Any]) -> Any:
    """Act while every weight is fp32: the quantised ones as they dequantise."""
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for linear in linears:
        weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
        linear.forward = lambda x, *_, weight=weight, **__: torch.nn.functional.linear(x, weight)
    halves = [parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16]
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return act()
    finally:
        for parameter in halves:
            parameter.data = parameter.data.bfloat16()
        for linear in linears:
            del linear.forward


def _compared(found: Gradients, reference: Gradients) -> dict[str, Any]:
    cosines = {
        name: torch.nn.functional.cosine_similarity(found[name].flatten(), tensor.flatten(), dim=0).item()
        for name, tensor in reference.items()
    }
    norms = [(found[name].norm() / tensor.norm()).item() for name, tensor in reference.items()]
    whole = (
        torch.cat([found[name].flatten() for name in reference]),
        torch.cat([tensor.flatten() for tensor in reference.values()]),
    )
    by_module: dict[str, float] = {}
    for name, cosine in cosines.items():
        module = name.split(".")[-4]
        by_module[module] = min(by_module.get(module, 1.0), cosine)
    return {
        "lowest cosine": min(cosines.values()),
        "at": min(cosines, key=lambda name: cosines[name]),
        "mean cosine": statistics.fmean(cosines.values()),
        "cosine of all together": torch.nn.functional.cosine_similarity(*whole, dim=0).item(),
        "relative norms": [min(norms), max(norms)],
        "lowest by module": by_module,
    }


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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE", help="the curves as a drawing")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    print(f"{hardware().name}, torch {torch.__version__}")
    report = gradients_report()
    print(json.dumps(report, indent=1))
    torch.cuda.empty_cache()
    found = curves(asked.steps)
    if asked.json:
        Path(asked.json).write_text(json.dumps({"gradients": report, "curves": found}) + "\n", encoding="utf-8")
    if asked.svg:
        Path(asked.svg).write_text(svg(found), encoding="utf-8")


if __name__ == "__main__":
    configure()
    main()
