"""Loss curves of the job by PEFT's modules, by the fast path and in fp8, side by side, for bench/precision.py.

The job itself trains eight layers of the 8B shape on rows that can be learnt: walks on a random graph of 64 words, five
rows packed to a sequence. Some steps it trains by the fast path twice, and twice more with `reproducible`, of which the
last two have to be equal to the bit.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from steps import NEVER, Setting, build

from job.callbacks import Steering
from job.contract.metrics import MetricLine, Step
from job.contract.recipe import TINY_MODEL, BaseModelRef, Recipe
from job.dataset.reader import LineNumber
from job.dataset.render import RenderedRow
from job.model import load_tokenizer
from job.notice import Notice
from job.speed import speed_up
from job.train import Rows, Training
from job.weights import locate
from launch.shape import LLAMA_8B, Shape

REPEATED: Final = 30
"""Steps of the runs whose bits are compared."""
WORDS: Final = 64
SETTING: Final = Setting("8B", 2, 1, True, max_length=2048)


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
