"""What only a folder can do wrong: permissions, full disks, power cuts, files left by the dead."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.contract.errors import AccessRefused, Unreachable
from job.contract.layout import Key
from job.storage import FileStore, Store
from job.storage.store import STAGING
from tests.job.test_storage import a_file, keys, small_files_only

NOBODY = 65534
MOUNT, UMOUNT = shutil.which("mount"), shutil.which("umount")


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def store(bucket: Path) -> Store:
    return FileStore(bucket)


@contextlib.contextmanager
def powerless(closed: Path) -> Iterator[None]:
    """Nobody may look into the folder, not even root: it becomes somebody else for a while."""
    mode = closed.stat().st_mode
    closed.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(mode)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that others may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def every_call(store: Store, folder: Path) -> dict[str, Callable[[], object]]:
    source = a_file(folder, b"data")
    return {
        "put_new": lambda: store.put_new(Key("a/new"), b"data"),
        "put_file": lambda: store.put_file(Key("a/file"), source),
        "get": lambda: store.get(Key("a/b")),
        "get_file": lambda: store.get_file(Key("a/b"), folder / "got"),
        "list": lambda: list(store.list("a/")),
        "delete": lambda: store.delete(Key("a/b")),
    }


CALLS = ["put_new", "put_file", "get", "get_file", "list", "delete"]


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_that_may_not_be_used_is_refused_and_never_looks_empty(public: Path, name: str) -> None:
    bucket, own = public / "bucket", public / "own"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    store = FileStore(bucket)
    store.put_new(Key("a/b"), b"data")
    call = every_call(store, own)[name]
    with powerless(bucket), pytest.raises(AccessRefused, match="not allowed to use") as caught:
        call()
    assert caught.value.hint == "check the folder's owner and permissions"
    assert store.get(Key("a/b")) == b"data"


def test_a_listing_that_cannot_look_everywhere_is_an_error(public: Path) -> None:
    store = FileStore(public / "bucket")
    store.put_new(Key("runs/x/a"), b"")
    store.put_new(Key("runs/x/closed/b"), b"")
    with powerless(public / "bucket/runs/x/closed"), pytest.raises(AccessRefused, match="not allowed"):
        list(store.list("runs/"))
    assert keys(store, "runs/") == ["runs/x/a", "runs/x/closed/b"]


@pytest.mark.parametrize("name", CALLS)
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    bucket = tmp_path / "bucket"
    bucket.write_bytes(b"not a folder")
    with pytest.raises(AccessRefused, match="cannot use"):
        every_call(FileStore(bucket), tmp_path)[name]()
    assert bucket.read_bytes() == b"not a folder"


def test_an_object_in_the_place_of_a_folder_is_refused(store: Store) -> None:
    store.put_new(Key("a"), b"object")
    with pytest.raises(AccessRefused, match="cannot use"):
        store.put_new(Key("a/b"), b"below an object")
    store.put_new(Key("c/d"), b"object")
    with pytest.raises(AccessRefused, match="cannot use"):
        store.put_new(Key("c"), b"where a folder is")
    assert keys(store) == ["a", "c/d"]


@pytest.mark.parametrize("name", ["put_new", "put_file"])
def test_a_write_that_finds_no_space_is_worth_another_try_and_leaves_nothing(
    store: Store, bucket: Path, tmp_path: Path, name: str
) -> None:
    source = a_file(tmp_path, bytes(200_000))

    def write() -> None:
        if name == "put_new":
            store.put_new(Key("a/b"), bytes(200_000))
        else:
            store.put_file(Key("a/b"), source)

    with small_files_only(65536), pytest.raises(Unreachable, match="no space left for a/b"):
        write()
    assert keys(store) == []
    assert list((bucket / STAGING).iterdir()) == []
    write()
    assert keys(store) == ["a/b"]


def test_a_disk_that_is_really_full_says_so(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and MOUNT is not None
        and not subprocess.run(
            [str(MOUNT), "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs; the refusal by file size above covers the same code")
    try:
        store = FileStore(disk / "bucket")
        store.put_new(Key("small"), b"fits")
        with pytest.raises(Unreachable, match="no space left for big: No space left on device") as caught:
            store.put_new(Key("big"), bytes(1_000_000))
        assert caught.value.hint == "free some space there"
        assert keys(store) == ["small"]
        store.put_new(Key("next"), b"fits")
    finally:
        subprocess.run([str(UMOUNT), str(disk)], check=True)


@pytest.mark.parametrize("name", ["put_new", "put_file"])
def test_4_all_bytes_are_on_the_disk_before_the_object_has_its_name_and_the_names_before_the_put_returns(
    store: Store, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # What a power cut would leave cannot be seen from here; what was asked of the disk, and when, can.
    events: list[tuple[str, int, int]] = []
    fsync, link, rename = os.fsync, os.link, os.rename

    def spy_fsync(descriptor: int) -> None:
        fsync(descriptor)
        stat = os.fstat(descriptor)
        events.append(("fsync", stat.st_ino, stat.st_size))

    def spy_link(source: Path, target: Path) -> None:
        events.append(("name", source.stat().st_ino, source.stat().st_size))
        link(source, target)

    def spy_replace(source: Path, target: Path) -> None:
        events.append(("name", source.stat().st_ino, source.stat().st_size))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    monkeypatch.setattr(os, "replace", spy_replace)
    if name == "put_new":
        store.put_new(Key("runs/x/a.json"), b"small enough to sit in Python's buffer")
    else:
        store.put_file(Key("runs/x/a.json"), a_file(tmp_path, b"small enough to sit in Python's buffer"))
    inode, size = next((inode, size) for kind, inode, size in events if kind == "name")
    named = next(index for index, event in enumerate(events) if event[0] == "name")
    assert size == 38
    assert ("fsync", inode, 38) in events[:named]
    flushed_after = {inode for kind, inode, _ in events[named:] if kind == "fsync"}
    for folder in (bucket / "runs/x", bucket / "runs", bucket):
        assert folder.stat().st_ino in flushed_after
    assert bucket.parent.stat().st_ino in {inode for kind, inode, _ in events if kind == "fsync"}


def test_what_killed_writers_left_behind_is_swept_and_what_is_being_written_is_not(bucket: Path) -> None:
    staging = bucket / STAGING
    staging.mkdir(parents=True)
    (staging / "old").write_bytes(bytes(1000))
    os.utime(staging / "old", (time.time() - 7200,) * 2)
    (staging / "young").write_bytes(bytes(1000))
    FileStore(bucket).put_new(Key("a"), b"")
    assert [path.name for path in staging.iterdir()] == ["young"]


def test_files_of_other_people_under_names_that_are_no_keys_are_left_alone(store: Store, bucket: Path) -> None:
    store.put_new(Key("a"), b"")
    (bucket / "back\\slash").write_bytes(b"")
    assert keys(store) == ["a"]
