"""Promise: bench/steps.py times the job. Its model is the one that the job would load, and its steps are the job's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from job.contract.recipe import TINY_MODEL, BaseModelRef
from job.model import load
from job.weights import locate
from launch.cards import CARDS
from launch.measured import OWN
from tests.benchmarks import load_bench
from tests.job.stack import bits

SCRIPT = Path(__file__).parents[1] / "bench" / "steps.py"

bench = load_bench("steps")


def anatomy(model: Any) -> dict[str, Any]:
    """What each module of a model is, and each of its own weights and buffers; values left out."""
    return {
        name: (
            type(module),
            module.training,
            [
                (key, type(value), value.dtype, value.shape, value.device, value.requires_grad)
                for key, value in module.named_parameters(recurse=False)
            ],
            [(key, bits(value)) for key, value in module.named_buffers(recurse=False)],
            getattr(module, "support_avx512bf16_for_cpu", None),
        )
        for name, module in model.named_modules()
    }


def quantised(model: Any) -> list[Any]:
    """How each 4-bit weight is stored."""
    states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    return [
        (s.shape, s.dtype, s.blocksize, s.quant_type, s.absmax.dtype, s.absmax.shape, s.state2.absmax.dtype)
        for s in states
    ]


def test_the_model_in_memory_is_made_as_the_one_that_the_job_loads(tmp_path: Path) -> None:
    recipe = bench.SMOKE[0].recipe()
    loaded = load(recipe, locate(BaseModelRef(id=TINY_MODEL), tmp_path))
    built = bench.build(bench.SHAPES["tiny"], recipe)
    assert anatomy(built) == anatomy(loaded)
    assert quantised(built) == quantised(loaded)
    assert len(quantised(built)) == 14
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(built, name) == getattr(loaded, name)


@pytest.mark.parametrize("setting", bench.SMOKE, ids=lambda setting: str(setting.name))
def test_a_setting_is_trained_for_its_steps_and_all_its_tokens_are_counted(setting: Any) -> None:
    found = bench.timed(setting, steps=2, warm_up=1)
    assert len(found.seconds) == 2
    rows = bench.ROWS_PACKED if setting.packing else 1
    assert found.batch_tokens == setting.batch_size * rows * (setting.max_length // rows)
    step = found.batch_tokens * setting.gradient_accumulation
    assert found.tokens_per_second == pytest.approx((step / found.seconds[0] + step / found.seconds[1]) / 2)
    assert found.losses[0] != found.losses[1]
    assert all(math.isfinite(loss) for loss in found.losses)
    assert found.evaluation > 0
    assert found.allocated is None
    assert bench.row_of(found).count("-") >= 4


def test_an_object_a_line_is_printed_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    [name] = [setting.name for setting in bench.SMOKE if setting.packing]
    bench.main(["--smoke", "--json", "--steps", "1", "--warm-up", "0", "--settings", name])
    [found] = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"setting"')]
    assert found["setting"] == name
    assert found["predicted_tokens_per_second"] > 0


@pytest.mark.parametrize("arguments", [["--smoke", "--settings", "9B"], ["--settings", "8B"]])
def test_what_cannot_be_timed_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["--settings", "8B"] and bench.this_card() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "tiny 2x2" in said if "--smoke" in arguments else "needs an NVIDIA GPU" in said


def test_every_row_of_our_own_can_be_measured_again() -> None:
    names = {setting.name for setting in bench.SETTINGS}
    assert {row.what for row in OWN} <= names
    assert {row.card for row in OWN} <= set(CARDS)
