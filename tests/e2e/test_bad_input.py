"""Promise: bad input gets one clear message, a hint and exit code 2, and nothing is created anywhere.

Each case is a whole world: a folder with a recipe and its dataset, an empty home, an empty bucket. What may exist
afterwards is what existed before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from job.contract.layout import RunLayout, Uri
from job.storage import open_store
from launch.cli import cli

ROW = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


@dataclass
class World:
    """One person's files, and how they are changed before `ftjob` is started."""

    root: Path
    recipe: dict[str, Any] = field(
        default_factory=lambda: {"base_model": {"id": "builtin:tiny"}, "dataset": {"train": "rows.jsonl"}}
    )
    bucket: str = ""

    def __post_init__(self) -> None:
        self.bucket = (self.root / "bucket").as_uri()
        self.write("rows.jsonl", f"{json.dumps(ROW)}\n" * 4)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def launch(self, *options: str, recipe: str | None = None) -> list[str]:
        path = self.write("recipe.json", json.dumps(self.recipe) if recipe is None else recipe)
        return ["launch", "--bucket", self.bucket, *options, str(path)]

    @property
    def variables(self) -> dict[str, str]:
        return {"FTJOB_HOME": str(self.root / "home")}

    def everything(self) -> dict[str, bytes]:
        """Every file and folder; a folder's bytes are none."""
        paths = sorted(self.root.rglob("*"))
        return {str(p.relative_to(self.root)): p.read_bytes() if p.is_file() else b"" for p in paths}


Case = Callable[[World], list[str]]


def recipe(**sections: Any) -> Case:
    """With other sections in the recipe."""

    def arrange(world: World) -> list[str]:
        world.recipe |= sections
        return world.launch()

    return arrange


def text(content: str) -> Case:
    return lambda world: world.launch(recipe=content)


def rows(content: str | bytes, name: str = "rows.jsonl") -> Case:
    def arrange(world: World) -> list[str]:
        world.write(name, content)
        world.recipe["dataset"] = {"train": name}
        return world.launch()

    return arrange


def a_folder_as_dataset(world: World) -> list[str]:
    world.write("folder/rows.jsonl", "{}")
    world.recipe["dataset"] = {"train": "folder"}
    return world.launch()


def pickles(world: World) -> list[str]:
    world.write("model/config.json", "{}")
    world.write("model/pytorch_model.bin", b"\x80\x04.")
    world.recipe["base_model"] = {"id": "./model"}
    return world.launch()


def bucket_below_a_file(world: World) -> list[str]:
    world.bucket = (world.write("a-file", "") / "bucket").as_uri()
    return world.launch()


def bucket(uri: str) -> Case:
    def arrange(world: World) -> list[str]:
        world.bucket = uri
        return world.launch()

    return arrange


def home_that_is_a_file(world: World) -> list[str]:
    (world.root / "home").write_text("")
    return world.launch()


def bad_settings(world: World) -> list[str]:
    (world.root / "home").mkdir()
    (world.root / "home" / "settings.toml").write_text('buckets = "s3://mine"\n')
    return world.launch()


def run_that_exists(world: World) -> list[str]:
    """Of another machine, so that only the bucket knows it."""
    launched = world.launch("--name", "mine")
    open_store(world.bucket).put_new(RunLayout("mine").recipe, b"{}\n")
    return launched


GOOD = json.dumps(ROW)
# What is wrong, what is typed, what the message says, what the hint says.
CASES: dict[str, tuple[Case, str, str]] = {
    # the recipe
    "unknown key": (recipe(lora={"rnak": 8}), "lora.rnak is not a key", "ftjob schema"),
    "unknown section": (recipe(optimiser={}), "optimiser", "ftjob schema"),
    "wrong type": (recipe(training={"epochs": "three"}), "training.epochs", "ftjob schema"),
    "a list for a section": (recipe(lora=[8]), "lora", "ftjob schema"),
    "below its bound": (recipe(lora={"rank": 0}), "lora.rank", "ftjob schema"),
    "above its bound": (recipe(training={"learning_rate": 2}), "training.learning_rate", "ftjob schema"),
    "not a number": (text('{"training": {"learning_rate": NaN}}'), "recipe.json", ""),
    "a missing key": (recipe(dataset={}), "dataset.train", "ftjob schema"),
    "no JSON": (text('{"base_model": {"id": "builtin:tiny"},}'), "line 1", "ftjob schema"),
    "no object": (text("[]"), "recipe.json", ""),
    "an empty recipe": (text(""), "recipe.json", ""),
    "early stopping without held-out rows": (
        recipe(dataset={"train": "rows.jsonl", "held_out": None}, training={"early_stopping": {}}),
        "early_stopping needs held-out rows",
        "ftjob schema",
    ),
    # the dataset
    "no such dataset": (recipe(dataset={"train": "no.jsonl"}), "no.jsonl does not exist", "relative to the recipe"),
    "no such held-out dataset": (
        recipe(dataset={"train": "rows.jsonl", "held_out": "no.jsonl"}),
        "no.jsonl does not exist",
        "relative to the recipe",
    ),
    "a folder as dataset": (a_folder_as_dataset, "folder", ""),
    "no text": (rows(b"PAR1\xff\xfe\x00\x01"), "rows.jsonl line 1", ""),
    "an empty dataset": (rows(""), "rows.jsonl: it has no rows", ""),
    "only empty lines": (rows("\n \n\n"), "rows.jsonl: it has no rows", ""),
    "a malformed line": (rows(f'{GOOD}\n{GOOD}\n{{"messages": [\n{GOOD}\n'), "rows.jsonl line 3", ""),
    "a malformed line behind empty ones": (rows(f"{GOOD}\n\n\nnonsense\n"), "rows.jsonl line 4", ""),
    "a row without an answer": (
        rows(f'{GOOD}\n{{"messages": [{{"role": "user", "content": "Hi"}}]}}\n'),
        "rows.jsonl line 2: no assistant turn",
        "add the answer",
    ),
    "a row of another format": (rows(f'{GOOD}\n{{"text": "Once upon a time"}}\n'), "rows.jsonl line 2", ""),
    "a dataset in no known place": (recipe(dataset={"train": "ftp://x/rows.jsonl"}), "ftp://x/rows.jsonl", "s3://"),
    # the model
    "no such model folder": (recipe(base_model={"id": "./no-model"}), "./no-model", "relative to the recipe"),
    "no such built-in model": (recipe(base_model={"id": "builtin:huge"}), "builtin:huge", "builtin:tiny"),
    "a model of pickles": (pickles, "pickles only", "safe_serialization"),
    # the bucket
    "a bucket below a file": (bucket_below_a_file, "cannot be written", "choose another folder"),
    "a bucket in no known place": (bucket("ftp://x"), "ftp://x", "s3://"),
    "a bucket without a scheme": (bucket("my-bucket"), "my-bucket", "s3://"),
    # the run
    "a run id that is none": (lambda w: w.launch("--name", "My Run"), "'My Run' is not a run id", "a-z"),
    "a run id that leaves its folder": (lambda w: w.launch("--name", "../up"), "'../up' is not a run id", "a-z"),
    "a run that exists": (run_that_exists, "run mine exists already", "ftjob launch --run mine"),
    "no such run to go on with": (
        lambda w: ["launch", "--bucket", w.bucket, "--run", "nobody"],
        "there is no run nobody",
        "ftjob list",
    ),
    "no such run to see": (lambda w: ["status", "--bucket", w.bucket, "nobody"], "no run nobody", "ftjob list"),
    "no such run to fetch": (lambda w: ["fetch", "--bucket", w.bucket, "nobody"], "no run nobody", "ftjob list"),
    "no such run to cancel": (lambda w: ["cancel", "--bucket", w.bucket, "nobody"], "no run nobody", "ftjob list"),
    "no such run to read": (lambda _: ["logs", "nobody"], "no run nobody", "ftjob list"),
    # the person's own folder
    "a home that is a file": (home_that_is_a_file, "is not a folder", "FTJOB_HOME"),
    "an unknown key of the settings": (bad_settings, "buckets", "bucket"),
    "an unknown backend": (lambda w: w.launch("--infra", "moon"), "'moon'", "local"),
}


def assert_refused(code: int, stdout: str, stderr: str, said: str, hint: str) -> None:
    assert code == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    told = [line for line in stderr.splitlines() if line.startswith(("ftjob: ", "hint: "))]
    assert stderr.endswith("\n".join(told) + "\n")  # nothing behind it
    assert told[0].startswith("ftjob: ")
    assert said in told[0]
    assert len(told) == 2, stderr
    assert len(told[1]) > len("hint: ") + 10
    assert hint in told[1]


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_a_hint_and_nothing_is_created(tmp_path: Path, case: str) -> None:
    arrange, said, hint = CASES[case]
    world = World(tmp_path)
    arguments = arrange(world)
    before = world.everything()
    # No stand-in: the backend is the real one.
    result = CliRunner(mix_stderr=False).invoke(cli, arguments, env=world.variables)
    assert_refused(result.exit_code, result.stdout, result.stderr, said, hint)
    assert world.everything() == before


def test_the_world_of_these_tests_is_good_but_for_the_fault(tmp_path: Path) -> None:
    """Keeps them honest: what each of them changes is what is refused."""
    world = World(tmp_path)
    launched = CliRunner(mix_stderr=False).invoke(cli, world.launch("--detach", "--json"), env=world.variables)
    assert launched.exit_code == 0, launched.stderr
    run_id = json.loads(launched.stdout)["run_id"]
    assert RunLayout(run_id).recipe in {info.key for info in open_store(world.bucket).list("")}
    cancelled = CliRunner(mix_stderr=False).invoke(cli, ["cancel", "--json", run_id], env=world.variables)
    assert json.loads(cancelled.stdout)["status"] == "cancelled", cancelled.stderr


@pytest.mark.parametrize("case", ["a malformed line", "a bucket below a file", "a run that exists"])
def test_it_is_the_same_for_the_command_itself(tmp_path: Path, case: str) -> None:
    arrange, said, hint = CASES[case]
    world = World(tmp_path)
    arguments = arrange(world)
    before = world.everything()
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=os.environ | world.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(done.returncode, done.stdout, done.stderr, said, hint)
    assert world.everything() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize(("path", "mode"), [("mine/rows.jsonl", 0o000), ("bucket", 0o555)])
def test_what_permissions_forbid_is_refused(tmp_path: Path, path: str, mode: int) -> None:
    world = World(tmp_path)
    arguments = world.launch()
    (tmp_path / "bucket").mkdir()
    (tmp_path / path).chmod(mode)
    try:
        result = CliRunner(mix_stderr=False).invoke(cli, arguments, env=world.variables)
    finally:
        (tmp_path / path).chmod(0o755)
    assert_refused(result.exit_code, result.stdout, result.stderr, Path(path).name, "")
    assert not (tmp_path / "home").exists()
    assert list((tmp_path / "bucket").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- s3://


def in_s3(world: World, uri: str, case: str) -> tuple[list[str], str, str]:
    match case:
        case "a bucket that is not there":
            world.bucket = "s3://there-is-no-such-bucket/here"
            return world.launch(), "there-is-no-such-bucket", "create it"
        case "a dataset that is not there":
            world.recipe["dataset"] = {"train": f"{uri}/no.jsonl"}
            return world.launch(), "no.jsonl does not exist", "check the uri"
        case "a malformed line":
            data = world.write("bad.jsonl", f"{GOOD}\n{{\n")
            store = open_store(Uri(uri))
            store.put_new(RunLayout("x").recipe, data.read_bytes())  # any key will do
            world.recipe["dataset"] = {"train": f"{uri}/{RunLayout('x').recipe}"}
            return world.launch(), "line 2", ""
        case _:
            world.bucket = uri
            open_store(Uri(uri)).put_new(RunLayout("mine").recipe, b"{}\n")
            return world.launch("--name", "mine"), "run mine exists already", "ftjob launch --run mine"


@pytest.mark.parametrize(
    "case", ["a bucket that is not there", "a dataset that is not there", "a malformed line", "a run that exists"]
)
def test_it_is_the_same_in_s3(tmp_path: Path, s3_uri: str, case: str) -> None:
    world = World(tmp_path)
    arguments, said, hint = in_s3(world, s3_uri, case)
    before = world.everything(), [info.key for info in open_store(s3_uri).list("")]
    result = CliRunner(mix_stderr=False).invoke(cli, arguments, env=world.variables)
    assert_refused(result.exit_code, result.stdout, result.stderr, said, hint)
    assert (world.everything(), [info.key for info in open_store(s3_uri).list("")]) == before
