"""Commands as people type them: answers on stdout, everything else on stderr, exit codes as documented."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from job.contract.errors import BadInput
from job.contract.layout import Key, RunLayout, Uri
from job.contract.metrics import Heartbeat, dump_lines
from job.storage import open_store
from launch.backend import DEFAULT_MAX_RESTARTS
from launch.cli import cli
from launch.here import Here
from launch.home import Remembered, RunFolder, forget, remember
from launch.launching import prepare, start
from launch.local import LocalBackend
from launch.process import is_locked
from launch.restart import RestartPolicy
from launch.runs import newest_submission
from launch.wish import Wish
from tests.contract import examples
from tests.launch.fake_job import ADAPTER_FILES
from tests.launch.kit import Desk, backend_maker, make_recipe
from tests.watching import wait_for

FTJOB = [sys.executable, "-m", "launch.cli"]


def tree(desk: Desk) -> list[Path]:
    """Every file of the person's, but for the recipe."""
    root = desk.home.parent
    return sorted(path for path in root.rglob("*") if path.is_file() and "recipes" not in path.parts)


# ------------------------------------------------------------------------------------------------------- bad input

Breaker = Callable[[Desk], list[str]]


def recipe(**changes: Any) -> Breaker:
    def breaker(desk: Desk) -> list[str]:
        return ["launch", str(make_recipe(desk.recipe.parent, **changes))]

    return breaker


def rows(text: bytes) -> Breaker:
    def breaker(desk: Desk) -> list[str]:
        (desk.recipe.parent / "rows.jsonl").write_bytes(text)
        return ["launch", str(desk.recipe)]

    return breaker


def unwritable(desk: Desk) -> list[str]:
    (desk.home.parent / "a-file").write_text("")
    return ["launch", "--bucket", (desk.home.parent / "a-file/bucket").as_uri(), str(desk.recipe)]


BAD_INPUT: dict[str, tuple[Breaker, str]] = {
    "unknown key": (recipe(rank=8), "rank"),
    "unknown key inside": (recipe(lora={"ranks": 8}), "lora.ranks"),
    "wrong type": (recipe(training={"epochs": "three"}), "training.epochs"),
    "out of bounds": (recipe(lora={"rank": 0}), "lora.rank"),
    "no such recipe": (lambda _: ["launch", "/nowhere/recipe.json"], "/nowhere/recipe.json does not exist"),
    "no such dataset": (recipe(dataset={"train": "no.jsonl"}), "no.jsonl does not exist"),
    "empty dataset": (rows(b""), "it has no rows"),
    "malformed line": (rows(b'{"prompt": "a", "completion": "b"}\n\n{"prompt"\n'), "rows.jsonl line 3"),
    "dataset of nobody": (recipe(dataset={"train": "~no-such-user/rows.jsonl"}), "does not exist"),
    "dataset with an endless name": (recipe(dataset={"train": "a" * 5000}), "cannot be read"),
    "model of nobody": (recipe(base_model={"id": "~no-such-user/model"}), "is not a folder"),
    "model with an endless name": (recipe(base_model={"id": "./" + "a" * 5000}), "cannot be read"),
    "moment without a year": (lambda d: ["launch", "--by", "9999-12-31T23:59:59-14:00", str(d.recipe)], "is no moment"),
    "endless budget": (lambda d: ["launch", "--budget", "9" * 400, str(d.recipe)], "is no sum of dollars"),
    "missing model": (recipe(base_model={"id": "./no-model"}), "./no-model"),
    "unwritable bucket": (unwritable, "cannot be written"),
    "no bucket": (lambda d: ["launch", "--bucket", "ftp://x", str(d.recipe)], "ftp://x"),
    "bad run id": (lambda d: ["launch", "--name", "../up", str(d.recipe)], "'../up' is not a run id"),
    "bad run id of a command": (lambda _: ["status", "No"], "'No' is not a run id"),
    "unknown run": (lambda _: ["launch", "--run", "nobody"], "there is no run nobody"),
    "unknown run of status": (lambda _: ["status", "nobody"], "there is no run nobody"),
    "unknown run of cancel": (lambda _: ["cancel", "nobody"], "there is no run nobody"),
    "unknown run of logs": (lambda _: ["logs", "nobody"], "nobody"),
    "unknown run of fetch": (lambda _: ["fetch", "nobody"], "there is no run nobody"),
    "no run at all": (lambda _: ["status"], "there is no run"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_message_a_hint_exit_2_and_creates_nothing(desk: Desk, case: str) -> None:
    breaker, said = BAD_INPUT[case]
    arguments = breaker(desk)
    before = tree(desk)
    result = desk.ftjob(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith(("ftjob: ", "hint: "))]
    assert lines[0].startswith("ftjob: ")
    assert said in lines[0]
    assert "Traceback" not in result.stderr
    assert tree(desk) == before


@pytest.mark.parametrize(
    "arguments", [["launch"], ["launch", "--nonsense"], ["launch", "--run", "a", "--name", "b"], ["nothing"], ["logs"]]
)
def test_bad_usage_is_exit_2(desk: Desk, arguments: list[str]) -> None:
    assert desk.ftjob(*arguments).exit_code == 2


def test_an_unknown_backend_is_refused(desk: Desk) -> None:
    answer = subprocess.run(
        [*FTJOB, "launch", "--infra", "moon", str(desk.recipe)],
        env=desk.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert "'moon'" in answer.stderr
    assert not desk.home.exists()


def test_a_run_that_exists_is_not_launched_again(desk: Desk) -> None:
    desk.create("mine")
    before = tree(desk)
    result = desk.ftjob("launch", "--name", "mine", "--bucket", desk.settings.bucket, desk.recipe)
    assert result.exit_code == 2
    assert "run mine exists already" in result.stderr
    assert "ftjob launch --run mine" in result.stderr
    assert tree(desk) == before


def test_another_machines_run_of_the_same_name_leaves_no_memory_here(desk: Desk) -> None:
    desk.create("theirs")
    forget(desk.home, "theirs")
    assert desk.ftjob("launch", "--name", "theirs", "--bucket", desk.settings.bucket, desk.recipe).exit_code == 2
    assert not (desk.home / "runs").exists()


def test_one_id_cannot_stand_for_runs_in_two_buckets_on_one_machine(desk: Desk) -> None:
    desk.create("twin")
    other = ("--bucket", (desk.home.parent / "other").as_uri())
    result = desk.ftjob("launch", "--name", "twin", *other, desk.recipe)
    assert result.exit_code == 2
    assert "this machine has a run twin in" in result.stderr
    assert not (desk.home.parent / "other").exists()

    # Another machine made one all the same: it is seen, and nothing of ours is taken for it.
    there = open_store(other[1])
    there.put_new(RunLayout("twin").recipe, desk.store.get(RunLayout("twin").recipe))
    assert json.loads(desk.ftjob("status", "twin", "--json", *other).stdout)["status"] == "unknown"
    assert json.loads(desk.ftjob("list", "--json", *other).stdout)[0]["status"] == "unknown"
    for arguments in (["cancel", "twin"], ["launch", "--run", "twin"]):
        assert desk.ftjob(*arguments, *other).exit_code == 2


def test_what_training_needs_is_checked_before_anything_is_created(desk: Desk) -> None:
    backend = LocalBackend(desk.home, stack=("json", "no_such_module"))
    result = CliRunner(mix_stderr=False).invoke(
        cli, ["launch", str(desk.recipe)], obj=lambda *_: backend, env={"FTJOB_HOME": str(desk.home)}
    )
    assert result.exit_code == 2
    assert "needs no_such_module" in result.stderr
    assert "pip install 'ftjob[job]'" in result.stderr
    assert not desk.home.exists()


def test_the_bound_of_restarts_is_the_backends() -> None:
    option = next(p for p in cli.commands["launch"].params if p.name == "max_restarts")
    assert option.default == DEFAULT_MAX_RESTARTS == RestartPolicy().max_restarts


def test_errors_that_are_not_the_persons_are_exit_1(desk: Desk) -> None:
    desk.create("broken")
    (desk.home.parent / "bucket" / RunLayout("broken").recipe).write_text("{")
    result = desk.ftjob("status", "broken")
    assert result.exit_code == 1
    assert "recipe.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_error_tells_the_password_of_an_address(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://me:pa55word@127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    result = desk.ftjob("list", "--bucket", "s3://mine/ftjob")
    assert result.exit_code == 1
    assert "127.0.0.1:9" in result.stderr
    assert "pa55word" not in result.stderr


# ----------------------------------------------------------------------------------------------------- taking up


def test_a_finished_run_is_not_taken_up(finished: Desk) -> None:
    result = finished.ftjob("launch", "--run", "done")
    assert result.exit_code == 2
    assert "is finished" in result.stderr


def test_a_run_whose_dataset_changed_is_not_taken_up(desk: Desk) -> None:
    desk.create("changed")
    rows_file = desk.recipe.parent / "rows.jsonl"
    rows_file.write_text(rows_file.read_text() * 2)
    result = desk.ftjob("launch", "--run", "changed")
    assert result.exit_code == 2
    assert "dataset.train" in result.stderr
    assert "rows.jsonl" in result.stderr


def test_a_run_is_taken_up_by_its_own_recipe_only(desk: Desk) -> None:
    desk.create("own")
    other = make_recipe(desk.recipe.parent, lora={"rank": 4})
    result = desk.ftjob("launch", "--run", "own", other)
    assert result.exit_code == 2
    assert "lora.rank (16 -> 4)" in result.stderr
    desk.plan = {"steps": 1}
    result = desk.ftjob("launch", "--json", "--run", "own", make_recipe(desk.recipe.parent))
    assert result.exit_code == 0, result.stderr


def test_of_two_launchers_that_go_on_with_a_run_one_does(desk: Desk) -> None:
    """Each has found that it stands still, and perhaps asked a person since: the slower must not leave its budget in
    the records of a run that goes by another, nor buy a second machine."""
    desk.create("both")
    desk.plan = {"steps": 1}
    here = Here(desk.settings, backend_maker(json.dumps(desk.plan)))
    first, second = (prepare(here, Wish(run_id="both", by=f"{year}-01-01"), for_launch=True) for year in (2098, 2099))
    start(here, first)
    with pytest.raises(BadInput, match="by another launcher"):
        start(here, second)
    wait_for(lambda: not is_locked(RunFolder.of(desk.home, "both").lock) or None)
    submission = newest_submission(desk.store, "both")
    assert submission is not None
    assert submission.budget.deadline is not None
    assert (submission.submission, submission.budget.deadline.year) == (1, 2098)


def test_a_run_that_may_live_elsewhere_is_left_alone_for_a_while(desk: Desk) -> None:
    desk.create("far")
    forget(desk.home, "far")
    layout, now = RunLayout("far"), datetime.now(UTC)
    claim = examples.claim().model_copy(update={"claimed_at": now, "host": "far-away"})
    desk.store.put_new(layout.claim(1), claim.to_bytes())
    beat = Heartbeat(at=now - timedelta(seconds=30), phase="training")
    desk.store.put_new(layout.metrics_object(1, 0), dump_lines([beat]))
    bucket = ("--bucket", desk.settings.bucket)
    assert json.loads(desk.ftjob("status", "far", "--json", *bucket).stdout)["status"] == "unknown"
    result = desk.ftjob("launch", "--run", "far", *bucket)
    assert result.exit_code == 2
    assert "may be running elsewhere" in result.stderr

    desk.store.delete(layout.metrics_object(1, 0))
    old = Heartbeat(at=now - timedelta(hours=1), phase="training")
    desk.store.put_new(layout.metrics_object(1, 0), dump_lines([old]))
    desk.plan = {"steps": 1}
    assert desk.ftjob("launch", "--json", "--run", "far", *bucket).exit_code == 0


# ------------------------------------------------------------------------------------------------- about runs


def test_status_tells_everything_about_a_run(finished: Desk) -> None:
    answer = json.loads(finished.ftjob("status", "done", "--json").stdout)
    assert answer["status"] == "succeeded"
    assert answer["adapter"] == f"{finished.settings.bucket}/runs/done/adapter/a0002"
    assert [a["ended"] for a in answer["attempts"]] == ["killed", "done"]
    text = finished.ftjob("status", "done").stdout
    for said in ("done  succeeded", "step 5/5", "held-out 1.5000", answer["adapter"], "attempt 1   killed", "fetch"):
        assert said in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_old_locale_lacks_letters_and_changes_no_exit_code(finished: Desk, encoding: str) -> None:
    variables = finished.variables | {"PYTHONIOENCODING": encoding}
    for arguments in (["status", "done"], ["check", "--show", "1", str(finished.recipe)], ["status", "done", "--json"]):
        done = subprocess.run([*FTJOB, *arguments], env=variables, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), arguments
        assert done.stdout.decode(encoding)
    assert json.loads(done.stdout)["status"] == "succeeded"


def test_status_without_a_run_is_the_newest(desk: Desk) -> None:
    for run_id in ("z-first", "a-second"):
        desk.create(run_id)
    answer = desk.ftjob("status", "--json", "--bucket", desk.settings.bucket)
    assert json.loads(answer.stdout)["run_id"] == "a-second"


def test_without_a_bucket_all_that_were_launched_into_are_listed(desk: Desk) -> None:
    desk.create("mine")  # in a bucket that is not the default one
    (desk.home.parent / "file").write_text("")
    lost = Remembered(run_id="lost", bucket=Uri((desk.home.parent / "file/bucket").as_uri()), backend="local")
    remember(desk.home, lost)
    result = desk.ftjob("list", "--json")
    assert [view["run_id"] for view in json.loads(result.stdout)] == ["mine"]
    assert json.loads(desk.ftjob("status", "--json").stdout)["run_id"] == "mine"


def test_list_shows_the_newest_first(desk: Desk) -> None:
    bucket = ("--bucket", desk.settings.bucket)
    empty = desk.ftjob("list", *bucket)
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert json.loads(desk.ftjob("list", "--json", *bucket).stdout) == []
    for run_id in ("z-first", "a-second"):
        desk.create(run_id)
    answer = json.loads(desk.ftjob("list", "--json", *bucket).stdout)
    assert [(view["run_id"], view["status"]) for view in answer] == [
        ("a-second", "interrupted"),
        ("z-first", "interrupted"),
    ]
    text = desk.ftjob("list", *bucket).stdout
    assert text.index("a-second") < text.index("z-first")


def test_a_run_that_cannot_be_read_hides_no_other(desk: Desk) -> None:
    for name in ("good", "bad"):
        desk.create(name)
    desk.store.put_new(RunLayout("bad").claim(1), b"{}\n")
    for command in ("list", "status"):
        done = desk.ftjob(command, "--json")
        assert (done.exit_code, '"run_id":"good"' in done.stdout) == (0, True), done.stderr
        assert "run bad cannot be listed" in done.stderr


def test_logs_for_people_and_for_programs(finished: Desk) -> None:
    text = finished.ftjob("logs", "done").stdout
    assert "supervisor.restarting exit_code=-9" in text
    lines = finished.ftjob("logs", "done", "--json", "--follow").stdout.splitlines()
    assert json.loads(lines[-1])["event"] == "supervisor.ended"


def test_logs_mask_secrets(finished: Desk) -> None:
    log = finished.home / "runs/done/log.jsonl"
    log.write_text(log.read_text() + "Error: hf_abcdefghijklmnopqrstuvwxyz is not a token\n")
    for arguments in (["logs", "done"], ["logs", "done", "--json"]):
        assert "Error: *** is not a token" in finished.ftjob(*arguments).stdout


def test_fetch_brings_the_adapter(finished: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = finished.ftjob("fetch", "done")
    assert result.exit_code == 0, result.stderr
    assert {p.name for p in (tmp_path / "done-adapter").iterdir()} == set(ADAPTER_FILES)
    assert "PeftModel.from_pretrained" in result.stdout
    again = finished.ftjob("fetch", "done")
    assert again.exit_code == 2
    answer = json.loads(finished.ftjob("fetch", "done", "other", "--json").stdout)
    assert answer["folder"] == str(tmp_path / "other")
    assert set(answer["files"]) == set(ADAPTER_FILES)


def test_a_damaged_adapter_is_exit_1_and_names_the_file(desk: Desk, tmp_path: Path) -> None:
    desk.plan = {"steps": 1}
    launched = desk.ftjob("launch", "--json", "--name", "flip", "--bucket", desk.settings.bucket, desk.recipe)
    adapter = RunLayout("flip").adapter_file(1, "adapter_model.safetensors")
    assert launched.exit_code == 0
    desk.store.delete(adapter)
    flipped = bytearray(ADAPTER_FILES["adapter_model.safetensors"])
    flipped[17] ^= 128
    desk.store.put_new(Key(adapter), bytes(flipped))
    result = desk.ftjob("fetch", "flip", tmp_path / "here")
    assert result.exit_code == 1
    assert "adapter_model.safetensors" in result.stderr
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_a_run_in_s3_is_launched_seen_and_fetched(desk: Desk, s3_uri: str, tmp_path: Path) -> None:
    desk.plan = {"steps": 3, "ends": {"1": [2, "kill"]}}
    launched = desk.ftjob("launch", "--json", "--name", "far", "--bucket", s3_uri, desk.recipe)
    assert launched.exit_code == 0, launched.stderr
    answer = json.loads(launched.stdout)
    assert answer["adapter"] == f"{s3_uri}/runs/far/adapter/a0002"
    # The machine remembers the bucket.
    assert json.loads(desk.ftjob("status", "far", "--json").stdout)["status"] == "succeeded"
    fetched = desk.ftjob("fetch", "far", tmp_path / "here")
    assert fetched.exit_code == 0, fetched.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()} == ADAPTER_FILES


def test_a_bucket_that_does_not_exist_is_bad_input(desk: Desk, s3_uri: str) -> None:
    result = desk.ftjob("launch", "--bucket", "s3://there-is-no-such-bucket", desk.recipe)
    assert result.exit_code == 2
    assert "there-is-no-such-bucket" in result.stderr
    assert not desk.home.exists()


def test_cancelling_what_does_not_run_changes_nothing(finished: Desk) -> None:
    result = finished.ftjob("cancel", "done", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["status"] == "succeeded"


def test_the_schema_describes_the_recipe(desk: Desk) -> None:
    schema = json.loads(desk.ftjob("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "ftjob recipe"
    assert schema["additionalProperties"] is False
    assert {"base_model", "dataset", "lora", "training", "$schema"} <= set(schema["properties"])


@pytest.mark.parametrize("command", ["launch", "status", "logs", "cancel", "fetch", "list", "schema"])
def test_every_command_shows_examples(desk: Desk, command: str) -> None:
    assert f"ftjob {command}" in desk.ftjob(command, "--help").stdout.split("Examples:")[1]


def test_help_and_version_are_quick(desk: Desk) -> None:
    # The best of three: what is promised is what it costs, not what else the machine does meanwhile.
    took = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([*FTJOB, "--help"], capture_output=True, check=True, env=desk.variables)
        took.append(time.monotonic() - began)
    assert min(took) < 0.5
    assert desk.ftjob("--version").stdout.startswith("ftjob ")
