"""Promise: the bytes that are trained are the bytes that were launched with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from job.contract.errors import DatasetInvalid, IdentityMismatch, Unreachable
from job.contract.records import DatasetDigest
from job.dataset.source import fetch_dataset, local_path
from job.storage import open_object
from tests.s3server import S3Server

ROWS = b'{"prompt": "a", "completion": "b"}\n'
OTHER = b'{"prompt": "a", "completion": "c"}\n'


def digest_of(uri: str, data: bytes = ROWS) -> DatasetDigest:
    return DatasetDigest(uri=uri, sha256=hashlib.sha256(data).hexdigest(), size=len(data), rows=1)


def put(uri: str, data: bytes, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(data)
    store, key = open_object(uri)
    store.put_file(key, source)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "my rows é.jsonl"
    path.write_bytes(ROWS)
    return path


@pytest.fixture
def remote(s3_uri: str, tmp_path: Path) -> str:
    uri = f"{s3_uri}/folder/rows.jsonl"
    put(uri, ROWS, tmp_path)
    return uri


def test_a_file_of_this_machine_is_used_where_it_is(local: Path, tmp_path: Path) -> None:
    assert fetch_dataset(digest_of(local.as_uri()), tmp_path / "data") == local
    assert not (tmp_path / "data").exists()


def test_the_path_of_a_uri_is_the_path_it_was_made_from(local: Path) -> None:
    assert local_path(local.as_uri()) == local
    assert local_path("s3://bucket/rows.jsonl") is None


def test_a_changed_file_is_refused_by_name_and_taken_again_when_it_is_put_back(local: Path, tmp_path: Path) -> None:
    local.write_bytes(OTHER)
    with pytest.raises(IdentityMismatch, match="changed after the launch") as raised:
        fetch_dataset(digest_of(local.as_uri()), tmp_path / "data")
    assert local.as_uri() in raised.value.message
    local.write_bytes(ROWS)
    assert fetch_dataset(digest_of(local.as_uri()), tmp_path / "data") == local


def test_a_missing_file_is_refused_by_name(local: Path, tmp_path: Path) -> None:
    local.unlink()
    with pytest.raises(DatasetInvalid, match=r"my%20rows.*cannot be read"):
        fetch_dataset(digest_of(local.as_uri()), tmp_path / "data")


def test_an_object_is_downloaded_once_and_cached_by_its_digest(
    remote: str, s3_server: S3Server, tmp_path: Path
) -> None:
    moved: list[int] = []
    path = fetch_dataset(digest_of(remote), tmp_path / "data", moved.append)
    assert path.read_bytes() == ROWS
    assert sum(moved) == len(ROWS)
    s3_server.cut()
    assert fetch_dataset(digest_of(remote), tmp_path / "data") == path
    assert [p.name for p in (tmp_path / "data").iterdir()] == [path.name]
    assert path.stem == digest_of(remote).sha256


def test_two_versions_of_one_uri_do_not_share_a_cached_file(remote: str, tmp_path: Path) -> None:
    first = fetch_dataset(digest_of(remote), tmp_path / "data")
    put(remote, OTHER, tmp_path)
    second = fetch_dataset(digest_of(remote, OTHER), tmp_path / "data")
    assert (first.read_bytes(), second.read_bytes()) == (ROWS, OTHER)


def test_a_changed_object_is_refused_and_taken_again_when_it_is_put_back(remote: str, tmp_path: Path) -> None:
    """The refused bytes must not stay in the cache: the hint says that putting the file back helps."""
    put(remote, OTHER, tmp_path)
    with pytest.raises(IdentityMismatch, match="changed after the launch") as raised:
        fetch_dataset(digest_of(remote), tmp_path / "data")
    assert "put the file back" in raised.value.hint
    put(remote, ROWS, tmp_path)
    assert fetch_dataset(digest_of(remote), tmp_path / "data").read_bytes() == ROWS


def test_a_cached_file_that_rotted_is_downloaded_again(remote: str, tmp_path: Path) -> None:
    path = fetch_dataset(digest_of(remote), tmp_path / "data")
    path.write_bytes(OTHER)
    assert fetch_dataset(digest_of(remote), tmp_path / "data").read_bytes() == ROWS


def test_a_missing_object_is_refused_by_name(remote: str, tmp_path: Path) -> None:
    gone = remote.replace("rows.jsonl", "gone.jsonl")
    with pytest.raises(DatasetInvalid, match=r"gone\.jsonl does not exist any more"):
        fetch_dataset(digest_of(gone), tmp_path / "data")


def test_a_store_out_of_reach_is_no_fault_of_the_dataset(remote: str, s3_server: S3Server, tmp_path: Path) -> None:
    s3_server.cut()
    with pytest.raises(Unreachable):
        fetch_dataset(digest_of(remote), tmp_path / "data")


def test_a_mounted_file_is_used_where_it_is_and_the_store_is_not_asked(tmp_path: Path) -> None:
    mounted = tmp_path / "mounted.jsonl"
    mounted.write_bytes(ROWS)
    nowhere = digest_of("s3://no-such-bucket-anywhere/rows.jsonl")
    assert fetch_dataset(nowhere, tmp_path / "data", mounted=mounted) == mounted


def test_a_mount_that_is_missing_or_holds_other_bytes_is_passed_over(tmp_path: Path, s3_uri: str) -> None:
    remote = f"{s3_uri}/rows.jsonl"
    store, key = open_object(remote)
    store.put_new(key, ROWS)
    other = tmp_path / "other.jsonl"
    other.write_bytes(ROWS + b"\n")
    for mounted in (tmp_path / "absent.jsonl", other):
        assert fetch_dataset(digest_of(remote), tmp_path / "data", mounted=mounted).read_bytes() == ROWS
