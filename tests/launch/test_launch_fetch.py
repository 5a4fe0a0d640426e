"""An adapter arrives whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from job.contract.errors import BadInput, Damaged, FtjobError, RunUnknown
from job.contract.layout import RunLayout
from job.storage import Store, open_store
from launch.fetch import fetch
from tests.harm import HARMS
from tests.launch.fake_job import ADAPTER_FILES
from tests.launch.kit import Desk

LAYOUT = RunLayout("done")


@pytest.fixture
def bucket(finished: Desk, tmp_path: Path) -> Path:
    """A copy of the bucket, to break."""
    copy = tmp_path / "bucket"
    shutil.copytree(finished.home.parent / "bucket", copy)
    return copy


@pytest.fixture
def store(bucket: Path) -> Store:
    return open_store(bucket.as_uri())


def test_every_file_arrives(store: Store, tmp_path: Path) -> None:
    moved: list[int] = []
    fetched = fetch(store, "done", tmp_path / "a/b", moved.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a/b").iterdir()} == ADAPTER_FILES
    assert fetched.folder == str(tmp_path / "a/b")
    assert fetched.complete
    assert sum(moved) == sum(map(len, ADAPTER_FILES.values()))


def test_an_empty_folder_is_used_and_a_full_one_is_left_alone(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "here"
    target.mkdir()
    fetch(store, "done", target)
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(BadInput, match="not an empty folder"):
        fetch(store, "done", target)
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="not an empty folder"):
        fetch(store, "done", tmp_path / "file")


def test_an_empty_folder_stays_the_one_it_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may stand in it, a link may lead to it, and what it lies in may not be theirs."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fetch(store, "done", tmp_path / "link")
    assert {path.name: path.read_bytes() for path in (tmp_path / "real").iterdir()} == ADAPTER_FILES
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fetch(store, "done", Path())
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == ADAPTER_FILES


@pytest.mark.parametrize("folder", ["/", "~no-such-user"])
def test_a_folder_of_an_odd_name_is_no_traceback(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if folder == "/":
        with pytest.raises(BadInput, match="not an empty folder"):
            fetch(store, "done", Path(folder))
    else:
        assert fetch(store, "done", Path(folder)).folder == str(tmp_path / folder)


@pytest.mark.parametrize("name", sorted(ADAPTER_FILES))
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_named_and_nothing_is_left(
    store: Store, bucket: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(bucket / LAYOUT.adapter_file(2, name))
    with pytest.raises(Damaged, match=name):
        fetch(store, "done", tmp_path / "out/adapter")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "a\\b", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(
    store: Store, bucket: Path, tmp_path: Path, name: str
) -> None:
    path = bucket / LAYOUT.adapter_manifest
    manifest = json.loads(path.read_bytes())
    manifest["files"] = {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    path.write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Damaged, match=r"adapter\.json"):
        fetch(store, "done", tmp_path / "adapter")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_an_adapter_and_no_run_are_told_apart(desk: Desk, tmp_path: Path) -> None:
    desk.create("young")
    with pytest.raises(BadInput, match="has no adapter yet"):
        fetch(desk.store, "young", tmp_path / "a")
    with pytest.raises(RunUnknown, match="no run nobody"):
        fetch(desk.store, "nobody", tmp_path / "a")


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FtjobError, match="cannot write"):
        fetch(store, "done", tmp_path / "file/adapter")
