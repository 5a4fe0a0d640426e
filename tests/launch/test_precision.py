"""Promise: a precision that cannot be had is refused before anything is bought, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from job.contract.errors import BadInput
from job.contract.recipe import BaseModelRef, Recipe
from job.contract.submission import Offer, Way
from launch.cli import cli
from launch.facts import ModelFacts
from launch.hub import Pinned
from launch.plan import Place
from launch.precision import check_precision, with_fp8
from tests.launch.kit import backend_maker, make_recipe
from tests.launch.test_launch_cloud import Desk
from tests.launch.test_quote_speeds import LLAMA_8B_CONFIG, recipe_of

FP8 = recipe_of(precision="fp8")


def model(**config: Any) -> ModelFacts:
    return ModelFacts(Pinned(BaseModelRef(id="org/model")), LLAMA_8B_CONFIG | config)


def place(gpu: str) -> Place:
    return Place(offer=Offer(cloud="nebius", gpu=gpu, gpus=1, spot=False, usd_per_hour=2.0), way=Way.DOCKER)


@pytest.mark.parametrize(
    ("config", "lora", "why", "instead"),
    [
        ({"model_type": "phi3"}, {}, "phi3", "base model"),
        ({"model_type": "mixtral"}, {}, "mixtral", "base model"),  # whose shape is not known either
        ({}, {"dora": True}, "DoRA", "lora.dora to false"),
        ({}, {"target_modules": ["lm_head"]}, "lm_head", "target_modules"),
    ],
)
def test_fp8_is_refused_where_the_job_would_go_through_the_modules(
    config: dict[str, Any], lora: dict[str, Any], why: str, instead: str
) -> None:
    data = FP8.model_dump(exclude={"output"}) | {"lora": lora}
    recipe = Recipe.model_validate(data)
    with pytest.raises(BadInput, match=why) as refused:
        check_precision(recipe, model(**config))
    assert 'training.precision to "bf16"' in refused.value.hint
    assert instead in refused.value.hint
    bf16 = recipe.model_copy(update={"training": recipe_of().training})
    check_precision(bf16, model(**config))


def test_what_is_not_known_of_a_model_is_left_to_the_job() -> None:
    check_precision(FP8, model())
    check_precision(FP8, None)
    check_precision(FP8, ModelFacts(Pinned(BaseModelRef(id="org/model")), "the hub is out of reach"))
    with pytest.raises(BadInput, match="DoRA"):
        check_precision(Recipe.model_validate(FP8.model_dump(exclude={"output"}) | {"lora": {"dora": True}}), None)


def test_places_without_fp8_are_left_out_and_said_to_be() -> None:
    found, notes = with_fp8(FP8, [place("A100-80GB"), place("H100"), place("Quantum")])
    assert [each.offer.gpu for each in found] == ["H100", "Quantum"]
    assert notes == ("A100-80GB is left out: it does not multiply in fp8",)
    assert with_fp8(recipe_of(), [place("A100")]) == ((place("A100"),), ())
    with pytest.raises(BadInput, match="A100 does not multiply in fp8") as refused:
        with_fp8(FP8, [place("A100")])
    assert "--gpu H100" in refused.value.hint


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_gpu_without_fp8_is_refused_before_anything_is_bought(tmp_path: Path, command: str) -> None:
    desk = Desk(tmp_path)
    recipe = make_recipe(tmp_path / "fp8", training={"precision": "fp8"})
    buy = ("--yes", "--detach", "--anyway") if command == "launch" else ()
    done = desk.ftjob(command, "--infra", "slurm", "--gpu", "A100", *buy, recipe)
    assert done.exit_code == 2, done.stdout + str(done.exception)
    assert "A100 does not multiply in fp8" in done.stderr
    assert 'set training.precision to "bf16"' in done.stderr
    assert desk.sky.launched() == []
    assert not (tmp_path / "bucket").exists()
    done = desk.ftjob(command, "--infra", "slurm", "--gpu", "H100", *buy, recipe)
    assert done.exit_code == 0, done.stderr + str(done.exception)


def test_what_cannot_have_fp8_is_refused_on_a_gpu_that_has_it(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    recipe = make_recipe(tmp_path / "fp8", training={"precision": "fp8"}, lora={"dora": True})
    done = desk.ftjob("launch", "--infra", "slurm", "--gpu", "H100", "--yes", "--detach", "--anyway", recipe)
    assert done.exit_code == 2, done.stdout + str(done.exception)
    assert "cannot be had: DoRA" in done.stderr
    assert "lora.dora to false" in done.stderr
    assert desk.sky.launched() == []
    assert not (tmp_path / "bucket").exists()


def test_this_machine_without_a_gpu_is_refused_too(tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is one")
    recipe = make_recipe(tmp_path / "fp8", training={"precision": "fp8"})
    bucket = (tmp_path / "bucket").as_uri()
    done = CliRunner(mix_stderr=False).invoke(
        cli,
        ["plan", "--bucket", bucket, str(recipe)],
        obj=backend_maker("{}"),
        env={"FTJOB_HOME": str(tmp_path / "home")},
    )
    assert done.exit_code == 2, done.stdout + str(done.exception)
    assert "this machine has no GPU" in done.stderr
