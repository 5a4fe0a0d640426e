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

Curves: see bench/curves.py. bench/passes.py has the paths.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from curves import SETTING, curves, shape_of, svg
from passes import AGAIN, EXACT, FAST, FP8, PLAIN, Pass, adapted, paths
from torch import Tensor
from workload import Deviation, keeps_variance

from job.contract.recipe import Recipe
from job.logs import configure
from job.model import hardware
from launch.shape import LLAMA_8B, TINY_SHAPE, Shape

LAYERS: Final = 4
BATCH: Final = (4, 512)
SMOKE_BATCH: Final = (4, 48)
"""Rows, and tokens of each."""
CHUNK: Final = 512
"""Tokens whose logits are compared at a time."""
AGAINST: Final = {EXACT: (PLAIN, *AGAIN, FAST, FP8, "fp8, all products", "fp8, gradients only"), PLAIN: (*AGAIN, FAST)}
"""What is compared with what."""


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
