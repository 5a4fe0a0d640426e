"""What people write for a place, and what it leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.contract.errors import BadInput
from job.contract.layout import Key
from job.storage import FileStore, S3Store, open_object, open_store


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket/a#b?c%20d", "s3://bucket/a#b?c%20d"),
        ("file:///folder", "file:///folder"),
        ("file:///folder/", "file:///folder"),
        ("file://localhost/folder", "file:///folder"),
        ("file:///with%20space%23", "file:///with%20space%23"),
        ("file:///", "file:///"),
    ],
)
def test_a_place_leads_to_a_store_that_says_the_same(uri: str, canonical: str) -> None:
    store = open_store(uri)
    assert isinstance(store, S3Store if uri.startswith("s3") else FileStore)
    assert store.uri == canonical
    assert open_store(store.uri).uri == canonical


@pytest.mark.parametrize(
    "uri",
    [
        *["", "folder", "/folder", "./folder", "~", "s3:", "s3://", "s3:///key", "s3://b//a", "s3://b/a//c", "s3://["],
        *[
            "file:",
            "file://host/folder",
            "file://folder",
            "file:///a#b",
            "file:///a?b",
            "gs://bucket/x",
            "http://host/x",
        ],
    ],
)
def test_anything_else_is_refused_with_the_two_ways_to_write_it(uri: str) -> None:
    with pytest.raises(BadInput, match="is not a place to store things") as caught:
        open_store(uri)
    assert repr(uri) in caught.value.message
    assert caught.value.hint == "use s3://bucket/prefix or file:///folder"


@pytest.mark.parametrize(
    ("uri", "store", "key"),
    [
        ("s3://bucket/rows.jsonl", "s3://bucket", "rows.jsonl"),
        ("s3://bucket/a/b/rows#1?.jsonl", "s3://bucket/a/b", "rows#1?.jsonl"),
        ("file:///rows.jsonl", "file:///", "rows.jsonl"),
        ("file:///a%20b/rows%20%231.jsonl", "file:///a%20b", "rows #1.jsonl"),
    ],
)
def test_an_objects_uri_leads_to_its_store_and_key(uri: str, store: str, key: str) -> None:
    opened, found = open_object(uri)
    assert (opened.uri, found) == (store, key)


@pytest.mark.parametrize(
    "uri",
    [
        *["", "rows.jsonl", "/rows.jsonl", "s3://bucket", "s3://bucket/", "s3://bucket/a/", "file:///", "file:///a/"],
        *[
            "file:///a/..",
            "s3://bucket/..",
            "s3://bucket/a//rows",
            "file:///a/rows#1",
            "gs://bucket/rows",
            "s3://[/rows",
        ],
    ],
)
def test_what_does_not_name_an_object_is_refused(uri: str) -> None:
    with pytest.raises(BadInput, match="does not name a file") as caught:
        open_object(uri)
    assert repr(uri) in caught.value.message


def test_an_object_is_found_where_its_path_says(tmp_path: Path) -> None:
    path = tmp_path / "with space" / "rows #1.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"rows")
    store, key = open_object(path.as_uri())
    assert store.get(key) == b"rows"
    assert store.get(Key("rows #1.jsonl")) == b"rows"
