"""What a recipe means, and everything about it that is refused before anything is created."""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from job.contract.errors import DatasetInvalid, IdentityMismatch, ModelInvalid
from job.contract.layout import Key
from job.contract.recipe import BaseModelRef
from job.storage import open_store
from launch.begin import new_record, new_run_id
from launch.datasets import dataset_uri, local_copy
from launch.recipe_file import read_recipe
from launch.resolve import Resolved, check_same_recipe, check_unchanged, commit_of, resolve
from tests.hubserver import HubServer
from tests.launch.kit import make_recipe, shared_cache, small_model, write_small_model

BUCKET = "s3://mine/ftjob"


def resolved(path: Path) -> Resolved:
    return resolve(read_recipe(path), folder=path.parent, bucket=BUCKET, cache=shared_cache())


def test_relative_references_become_absolute_and_the_bucket_is_filled_in(tmp_path: Path) -> None:
    folder = tmp_path / "with a space #1"
    found = resolved(make_recipe(folder))
    assert found.recipe.dataset.train == (folder / "rows.jsonl").as_uri()
    assert found.recipe.dataset.held_out == 0.1
    assert found.bucket == BUCKET
    assert found.train.rows == 4
    assert found.train.sha256 == hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest()
    assert found.held_out is None


def test_a_recipe_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_recipe(tmp_path / "a")
    first = resolved(path)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(Path("a/recipe.json"))
    assert resolve(recipe, folder=Path("a"), bucket=BUCKET, cache=shared_cache()) == first


def test_a_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    found = resolved(make_recipe(tmp_path / "a"))
    again = resolve(found.recipe, folder=Path("/"), bucket="s3://other", cache=shared_cache())
    assert (again.recipe, again.train, again.model) == (found.recipe, found.train, found.model)


def test_a_second_file_is_digested_too(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    path = make_recipe(folder, dataset={"train": "rows.jsonl", "held_out": "../b.jsonl"})
    row = {"prompt": "3 + 3?", "completion": "6"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    found = resolved(path)
    assert found.recipe.dataset.held_out == (tmp_path / "b.jsonl").as_uri()
    assert found.held_out is not None
    assert found.held_out.rows == 1


def test_held_out_rows_that_are_the_training_rows_are_refused(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": "./rows.jsonl"})
    with pytest.raises(DatasetInvalid, match="all 4 rows are in"):
        resolved(path)


@pytest.mark.parametrize(
    ("reference", "uri"),
    [
        ("rows.jsonl", "file:///r/rows.jsonl"),
        ("../rows.jsonl", "file:///rows.jsonl"),
        ("/data/rows 1.jsonl", "file:///data/rows%201.jsonl"),
        ("s3://mine/rows.jsonl", "s3://mine/rows.jsonl"),
        ("file:///data/rows.jsonl", "file:///data/rows.jsonl"),
    ],
)
def test_the_uris_of_datasets(reference: str, uri: str) -> None:
    assert dataset_uri(reference, Path("/r")) == uri


@pytest.mark.parametrize("reference", ["https://example.com/rows.jsonl", "gs://mine/rows.jsonl", "s3://mine/"])
def test_places_that_cannot_be_read_from_are_refused(reference: str) -> None:
    with pytest.raises(DatasetInvalid, match=reference.split(":", maxsplit=1)[0]):
        dataset_uri(reference, Path("/r"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl is not a file"), local_copy(path.as_uri(), "rows.jsonl"):
        pytest.fail("a pipe is no file")


def test_a_missing_dataset_and_a_bad_line_are_named(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"messages": \n')
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl line 5"):
        resolved(path)
    rows.write_text("\n")
    with pytest.raises(DatasetInvalid, match="no rows"):
        resolved(path)
    rows.unlink()
    with pytest.raises(DatasetInvalid, match="does not exist"):
        resolved(path)
    rows.mkdir()
    with pytest.raises(DatasetInvalid, match="cannot be read"):
        resolved(path)


def test_a_dataset_in_s3_is_digested_and_a_missing_one_refused(tmp_path: Path, s3_uri: str) -> None:
    path = make_recipe(tmp_path, dataset={"train": f"{s3_uri}/rows.jsonl"})
    with pytest.raises(DatasetInvalid, match="does not exist"):
        resolved(path)
    open_store(s3_uri).put_file(Key("rows.jsonl"), tmp_path / "rows.jsonl")
    found = resolved(path)
    assert found.train.uri == f"{s3_uri}/rows.jsonl"
    assert found.train.sha256 == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------- base models


MODEL = small_model()
OTHER = MODEL | {"config.json": MODEL["config.json"] + b"\n"}


def model_folder(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_a_local_model_becomes_an_absolute_path(tmp_path: Path) -> None:
    write_small_model(tmp_path / "model")
    path = make_recipe(tmp_path / "recipes", base_model={"id": "../model"})
    assert resolved(path).recipe.base_model.id == str(tmp_path / "model")


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"consolidated.safetensors": b"1234"}, "has consolidated.safetensors, but neither model.safetensors nor"),
        ({"model-1.safetensors": b"1234"}, "has model-1.safetensors, but neither model.safetensors nor"),
        (
            {"model-1.safetensors": b"1234", "model.safetensors.index.json": INDEX},
            "lacks 1 of the 2 files that its model.safetensors.index.json names: model-2.safetensors",
        ),
        ({"model-1.safetensors": b"1234", "model.safetensors.index.json": b"[]"}, "names no files"),
    ],
)
def test_weights_that_would_not_be_found_are_refused_before_they_are_brought(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    folder = write_small_model(tmp_path / "model", **files)
    (folder / "model.safetensors").unlink()
    path = make_recipe(tmp_path / "recipes", base_model={"id": str(folder)})
    with pytest.raises(ModelInvalid, match=re.escape(said)):
        resolved(path)


def test_weights_that_will_be_found_are_taken(tmp_path: Path) -> None:
    shards = {"model-1.safetensors": b"1234", "model-2.safetensors": b"5", "model.safetensors.index.json": INDEX}
    (write_small_model(tmp_path / "shards", **shards) / "model.safetensors").unlink()
    write_small_model(tmp_path / "whole", **{"model.safetensors.index.json": INDEX})  # which nobody reads then
    config = json.dumps(json.loads(MODEL["config.json"]) | {"transformers_weights": "mine.safetensors"}).encode()
    named = write_small_model(tmp_path / "named", **{"config.json": config, "mine.safetensors": b"1234"})
    (named / "model.safetensors").unlink()
    for name in ("shards", "whole", "named"):
        assert resolved(make_recipe(tmp_path / "recipes", base_model={"id": str(tmp_path / name)})).base_model.files


def test_a_file_uri_is_the_folder_it_names(tmp_path: Path) -> None:
    folder = write_small_model(tmp_path / "my model")
    found = resolved(make_recipe(tmp_path / "recipes", base_model={"id": folder.as_uri()}))
    assert found.recipe.base_model.id == str(folder)
    assert found.base_model.files == tuple(sorted(MODEL))
    assert found.base_model.bytes == sum(map(len, MODEL.values()))


def test_the_built_in_model_is_left_alone(tmp_path: Path) -> None:
    assert resolved(make_recipe(tmp_path, base_model={"id": "builtin:tiny"})).recipe.base_model.id == "builtin:tiny"


def test_a_model_on_the_hub_is_pinned_and_its_pin_is_in_the_digest(tmp_path: Path, hub: HubServer) -> None:
    commit = hub.add("org/model", MODEL)
    path = make_recipe(tmp_path, base_model={"id": "org/model"})
    first = resolved(path)
    assert first.recipe.base_model == BaseModelRef(id="org/model", revision=commit)
    assert first.base_model.bytes == sum(map(len, MODEL.values()))
    hub.add("org/model", OTHER)
    assert resolved(path).recipe.digest() != first.recipe.digest()


def test_the_token_of_the_environment_is_the_one_that_asks(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", MODEL, gated=True)
    path = make_recipe(tmp_path, base_model={"id": "org/model"})
    with pytest.raises(ModelInvalid, match="gated"):
        resolved(path)
    monkeypatch.setenv("HF_TOKEN", hub.account("hf_member", "org/model"))
    found = resolved(path)
    assert found.base_model.files
    assert "hf_member" not in str(found)


def test_a_model_in_a_bucket_is_listed_and_only_what_is_read_of_it_counts(tmp_path: Path, s3_uri: str) -> None:
    store = open_store(f"{s3_uri}/model")
    for name, data in (MODEL | {"README.md": b"hello", "old/model.safetensors": b"1"}).items():
        store.put_new(Key(name), data)
    found = resolved(make_recipe(tmp_path, base_model={"id": f"{s3_uri}/model/"}))
    assert found.recipe.base_model.id == f"{s3_uri}/model"
    assert found.base_model.files == tuple(sorted(MODEL))
    assert found.base_model.bytes == sum(map(len, MODEL.values()))
    again = resolve(found.recipe, folder=Path("/"), bucket="s3://other", cache=shared_cache())
    assert (again.recipe, again.base_model) == (found.recipe, found.base_model)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "nothing is stored there"),
        (("config.json",), r"no \*.safetensors"),
        (("config.json", "x.bin"), "pickles only"),
    ],
)
def test_a_bucket_without_a_model_is_refused(tmp_path: Path, s3_uri: str, names: tuple[str, ...], said: str) -> None:
    for name in names:
        open_store(s3_uri).put_new(Key(name), b"{}")
    with pytest.raises(ModelInvalid, match=said):
        resolved(make_recipe(tmp_path, base_model={"id": s3_uri}))


def test_a_bucket_that_is_none_or_may_not_be_read_is_the_models_fault(tmp_path: Path, s3_uri: str) -> None:
    for place in ("s3://", "s3:///model", "s3://no-such-bucket-here/model"):
        with pytest.raises(ModelInvalid, match=place):
            resolved(make_recipe(tmp_path, base_model={"id": place}))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no config.json"),
        (("config.json",), r"no \*.safetensors"),
        (("config.json", "pytorch_model.bin"), "pickles only"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    model_folder(tmp_path / "model", *names)
    with pytest.raises(ModelInvalid, match=said) as caught:
        resolved(make_recipe(tmp_path / "recipes", base_model={"id": "../model"}))
    assert caught.value.hint


@pytest.mark.parametrize(("model", "said"), [("./nowhere", "is not a folder"), ("builtin:huge", "not built in")])
def test_a_missing_model_is_refused(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(ModelInvalid, match=said):
        resolved(make_recipe(tmp_path, base_model={"id": model}))


# ------------------------------------------------------------------------------------------------- taking up a run


def test_a_changed_dataset_is_named(tmp_path: Path) -> None:
    found = resolved(make_recipe(tmp_path))
    record = new_record(found, run_id="one", now=datetime.now(UTC))
    check_unchanged(record)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("4", "5"))
    with pytest.raises(IdentityMismatch, match=r"dataset\.train .*rows\.jsonl has changed"):
        check_unchanged(record)


def test_a_branch_that_moved_on_is_told_from_another_recipe(tmp_path: Path, hub: HubServer) -> None:
    old = hub.add("org/model", MODEL)
    path = make_recipe(tmp_path, base_model={"id": "org/model"})
    record = new_record(resolved(path), run_id="one", now=datetime.now(UTC))
    check_same_recipe(record, resolved(path).recipe, name="recipe.json")
    new = hub.add("org/model", OTHER)
    with pytest.raises(IdentityMismatch, match=f"now at commit {new}.*{old}: the branch has moved on") as caught:
        check_same_recipe(record, resolved(path).recipe, name="recipe.json")
    assert "leave the recipe out" in caught.value.hint
    make_recipe(tmp_path, base_model={"id": "org/model", "revision": old})
    check_same_recipe(record, resolved(path).recipe, name="recipe.json")
    make_recipe(tmp_path, base_model={"id": "org/model"}, training={"seed": 7})
    with pytest.raises(IdentityMismatch, match=r"base_model.revision .*, training.seed \(42 -> 7\)"):
        check_same_recipe(record, resolved(path).recipe, name="recipe.json")


def test_another_recipe_is_refused_with_every_key_that_differs(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    record = new_record(resolved(path), run_id="one", now=datetime.now(UTC))
    make_recipe(tmp_path, checkpoints={"minutes": 5}, output={"bucket": "s3://elsewhere"})
    check_same_recipe(record, resolved(path).recipe, name="recipe.json")
    make_recipe(tmp_path, lora={"rank": 8}, training={"seed": 7})
    with pytest.raises(IdentityMismatch, match=r"lora.rank \(16 -> 8\), training.seed \(42 -> 7\)"):
        check_same_recipe(record, resolved(path).recipe, name="recipe.json")


@pytest.mark.parametrize(
    ("stem", "run_id"),
    [
        ("quickstart", "quickstart-20260102-030405-abcd"),
        ("My Recipe_v2", "my-recipe-v2-20260102-030405-abcd"),
        ("...", "run-20260102-030405-abcd"),
        ("ä" * 99, "run-20260102-030405-abcd"),
        ("x" * 99, "x" * 42 + "-20260102-030405-abcd"),
    ],
)
def test_run_ids_are_made_of_any_file_name(stem: str, run_id: str) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert new_run_id(stem, now=now, token="abcd") == run_id


def test_the_commit_of_a_folder_without_git_is_unknown(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
