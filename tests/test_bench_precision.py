"""Promise: bench/precision.py tells how far a path's gradients and logits are from fp32's, and a wrong one is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.shape import LLAMA_8B
from tests.benchmarks import load_bench
from tests.test_bench_steps import bench as steps

bench, passes = load_bench("precision"), load_bench("passes")


def made(initialisation: str = "variance kept") -> tuple[Any, Tensor]:
    """A tiny model, and a batch."""
    recipe = bench.SETTING.recipe()
    model = passes.adapted(bench.TINY_SHAPE, recipe, bench.INITIALISATIONS[initialisation])
    return model, torch.randint(0, bench.TINY_SHAPE.vocabulary, (2, 24))


def a_tensor_of(model: Any, module: str) -> tuple[str, Tensor]:
    """The adapter's first one of that module."""
    name: str = next(n for n, p in model.named_parameters() if p.requires_grad and module in n)
    return name, model.get_parameter(name)


def test_the_report_of_a_tiny_model_holds_every_path_and_every_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["--smoke", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    said = capsys.readouterr().out
    for initialisation in ("as published", "variance kept"):
        report = found["gradients"][initialisation]
        assert f"weights: {initialisation}" in said
        assert [len(ratios) for ratios in report["branches"].values()] == [2, 2]
        for reference, paths in bench.AGAINST.items():
            beside = report[f"against {reference}"]
            assert tuple(beside) == paths
            for path, told in beside.items():
                assert f"  {path} " in said
                assert len(told["by tensor"]) == 2 * 7 * 2
                assert 0.9 < told["lowest cosine"] <= told["mean cosine"] < 1 + 1e-9, path
                assert 0.95 < told["logits"]["lowest cosine of a token"] <= told["logits"]["cosine"] < 1 + 1e-9, path
                assert report["losses"][path] == pytest.approx(report["losses"]["fp32"], abs=0.05)
        exact = report["against fp32"]
        # What makes the report worth reading: bf16 is nearer than fp8, and less of fp8 is nearer than more of it.
        error = [exact[path]["error of all together"] for path in ("fast", "fp8, gradients only", "fp8, all products")]
        assert 0 < error[0] < error[1] < error[2] < 0.3
        assert exact["fp8"]["error of all together"] < error[2]


def test_fp32_is_itself_and_leaves_the_model_as_it_was() -> None:
    model, tokens = made()
    ways = passes.paths(model, tokens)
    before, exact, after, again = ways["plain"](), ways["fp32"](), ways["plain"](), ways["fp32"]()
    assert exact.logits.dtype == torch.float32
    itself = bench.compared(again, exact)
    assert itself["lowest cosine"] == pytest.approx(1, abs=1e-12)
    assert itself["error of all together"] == 0
    assert itself["logits"] == pytest.approx(
        {"cosine": 1, "lowest cosine of a token": 1, "relative norm": 1, "error": 0}, abs=1e-12
    )
    assert all(torch.equal(after.gradients[name], tensor) for name, tensor in before.gradients.items())
    assert torch.equal(before.logits, after.logits)
    assert not any("forward" in vars(module) for module in model.modules())  # which would hold the weights in fp32


def test_another_order_of_sums_is_the_same_to_fp32() -> None:
    """Else it would be no yardstick: nothing but rounding may differ."""
    model, tokens = made()

    def exact(**how: Any) -> Any:
        return passes.by_modules(model, tokens, bf16=False, **how)

    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.dtype == torch.bfloat16 else parameter.data
    with passes.multiplied(model, lambda weight: passes.shuffled(weight.float())):
        shuffled = exact()
    with passes.in_fp32(model):
        together, apart = exact(), exact(rows=1)
    for other in (shuffled, apart):
        told = bench.compared(other, together)
        assert other.loss == pytest.approx(together.loss, rel=1e-6)
        assert told["lowest cosine"] > 1 - 1e-9
        assert told["logits"]["error"] < 1e-5


@pytest.mark.parametrize(
    ("broken", "cosine"),
    [
        (lambda g: -g, -1),
        (torch.zeros_like, 0),
        (lambda g: g * float("nan"), 0),
        (lambda g: g + float("inf"), 0),
        (lambda g: g.flip(0), 0),
    ],
    ids=["negative", "zero", "not a number", "infinite", "rows in another order"],
)
def test_one_broken_gradient_is_seen_and_named(broken: Callable[[Tensor], Tensor], cosine: float) -> None:
    model, tokens = made("as published")
    name, parameter = a_tensor_of(model, "v_proj.lora_B")
    ways = passes.paths(model, tokens)

    def wrong() -> Any:
        hook = parameter.register_hook(broken)  # type: ignore[no-untyped-call]
        try:
            return ways["fast"]()
        finally:
            hook.remove()

    report = bench.compared_paths({"fp32": ways["fp32"], "plain": ways["plain"], "fast": wrong})
    for reference in ("fp32", "plain"):
        told = report[f"against {reference}"]["fast"]
        assert told["at"] == name
        assert told["lowest cosine"] == pytest.approx(cosine, abs=0.5 if cosine == 0 else 0.01)
        assert told["by tensor"][name]["cosine"] == told["lowest cosine"] == told["lowest by module"]["v_proj"]
        assert sorted(each["cosine"] for each in told["by tensor"].values())[1] > 0.999
    assert report["against fp32"]["plain"]["lowest cosine"] > 0.999


def test_a_gradient_of_another_length_is_seen_although_its_cosine_is_1() -> None:
    model, tokens = made("as published")
    exact = passes.paths(model, tokens)["fp32"]()
    doubled = passes.Pass(exact.loss, {n: t * 2 for n, t in exact.gradients.items()}, exact.logits + 1)
    told = bench.compared(doubled, exact)
    assert told["lowest cosine"] == pytest.approx(1)
    assert told["relative norms"] == pytest.approx([2, 2])
    assert told["error of all together"] == pytest.approx(1)
    assert told["logits"]["error"] > 0.1


def test_branches_are_measured_beside_the_stream_that_they_are_added_to() -> None:
    """Ten times the weights that write to the stream are ten times the ratio in the first layer, and less than that in
    the second, whose stream has grown."""
    shape, recipe = bench.TINY_SHAPE, bench.SETTING.recipe()
    tokens = torch.randint(0, shape.vocabulary, (2, 24))

    def ratios(factor: float) -> dict[str, list[float]]:
        def deviation(name: str, sizes: Any) -> float:
            writes = name.endswith(("o_proj", "down_proj"))
            return float(1.0 if name.endswith("embed_tokens") else sizes[-1] ** -0.5 * (factor if writes else 1))

        torch.manual_seed(0)
        found: dict[str, list[float]] = bench.branches(steps.build(shape, recipe, deviation), tokens)
        return found

    small, large = ratios(0.1), ratios(1.0)
    assert small["attention"][0] * 10 == pytest.approx(large["attention"][0], rel=0.01)
    for name, (first, second) in large.items():
        assert second / first < small[name][1] / small[name][0], name


def test_published_models_have_small_branches() -> None:
    """0.02 everywhere, and what writes to the stream less: of the whole model's layers, however few are computed."""
    wide = [LLAMA_8B.hidden, LLAMA_8B.hidden]
    assert bench.as_published("model.layers.0.self_attn.q_proj", wide) == 0.02
    assert bench.as_published("model.layers.0.self_attn.o_proj", wide) == 0.02 / 8
    assert bench.as_published("model.layers.0.mlp.down_proj", wide) == 0.02 / 8
    assert bench.as_published("lm_head", wide) == 0.02


@pytest.mark.parametrize("arguments", [["--smoke", "--layers", "33"], ["--gradients-only"]])
def test_what_cannot_be_compared_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["--gradients-only"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert ("1 to 32" if "--layers" in arguments else "needs an NVIDIA GPU") in capsys.readouterr().err
