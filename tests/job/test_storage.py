"""One contract for all stores: the promises of job/storage, by their numbers."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job.contract.errors import AlreadyExists, NotFound, Unreachable
from job.contract.layout import Key
from job.storage import MULTIPART_BYTES, Store, open_store
from tests.job.storage_worker import is_whole, sealed

ROOT = Path(__file__).parents[2]
KINDS = ("file", "s3", pytest.param("ceph", marks=[pytest.mark.machine, pytest.mark.slow]))


def place_of(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Uri of an empty store of that kind."""
    return (folder / "bucket").as_uri() if kind == "file" else str(request.getfixturevalue(f"{kind}_uri"))


@pytest.fixture(params=KINDS)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return place_of(request.param, request, tmp_path)


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


def keys(store: Store, prefix: str = "", *, after: str = "") -> list[str]:
    return [info.key for info in store.list(prefix, after=after)]


def a_file(folder: Path, data: bytes) -> Path:
    path = folder / "source.bin"
    path.write_bytes(data)
    return path


def worker(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.job.storage_worker", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


# What goes in comes out


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_what_was_put_is_what_is_got(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    store.put_new(Key("a/new"), data)
    store.put_file(Key("a/file"), a_file(tmp_path, data))
    for key in (Key("a/new"), Key("a/file")):
        assert store.get(key) == data
        store.get_file(key, tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == data
    assert [info.size for info in store.list("a/")] == [size, size]


def test_a_store_opened_again_by_its_own_uri_holds_the_same(store: Store) -> None:
    store.put_new(Key("a/b"), b"here")
    assert open_store(store.uri).get(Key("a/b")) == b"here"


def test_an_object_knows_when_it_was_written_in_utc(store: Store) -> None:
    store.put_new(Key("a"), b"")
    (info,) = store.list("")
    assert info.modified.tzinfo is UTC
    assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=1)


# 1. Whole or absent


@pytest.mark.parametrize("kind", KINDS)
def test_1_and_4_killed_writers_leave_whole_objects_and_all_whose_put_returned(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rounds, longest, size = (25, 0.06, 2_000_000) if kind == "file" else (5, 0.6, MULTIPART_BYTES + 1_000_000)
    place = place_of(kind, request, tmp_path)
    store = open_store(place)
    report = tmp_path / "report"
    report.touch()
    whole: set[str] = set()

    def look() -> None:
        for info in store.list("victims/"):
            if info.key not in whole:
                data = store.get(info.key)
                assert len(data) == info.size
                assert is_whole(data), f"{info.key} is torn"
                whole.add(info.key)

    process = worker("victims", place, str(report), str(rounds), str(longest), str(size))
    while process.poll() is None:
        look()
    out, _ = process.communicate()
    look()
    assert json.loads(out) == {"killed": rounds}
    returned = set(report.read_text().split())
    assert returned
    assert returned <= whole
    assert set(keys(store)) == whole


def test_1_a_reader_sees_the_old_or_the_new_object_and_nothing_between(store: Store, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    contents = [bytes([index]) * 3_000_000 for index in (1, 2)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    store.put_file(Key("x"), paths[0])
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(contents.index(store.get(Key("x"))))  # ValueError if it is neither

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read), pool.submit(read)]
        for path in (paths * 8)[1:]:
            store.put_file(Key("x"), path)
        done.set()
        for reader in readers:
            reader.result()
    assert seen


# 2. Create-only


def test_2_put_new_never_replaces(store: Store) -> None:
    store.put_new(Key("a/b"), b"first")
    with pytest.raises(AlreadyExists, match="a/b exists already"):
        store.put_new(Key("a/b"), b"second")
    assert store.get(Key("a/b")) == b"first"


def test_2_creating_the_same_bytes_again_is_no_error(store: Store) -> None:
    store.put_new(Key("a/b"), b"same")
    store.put_new(Key("a/b"), b"same")
    assert keys(store) == ["a/b"]


def test_2_of_16_threads_one_creates(store: Store) -> None:
    barrier = threading.Barrier(16)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            store.put_new(Key("claims/0001"), str(number).encode())
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(attempt, range(16)))
    assert won.count(True) == 1
    assert store.get(Key("claims/0001")) == str(won.index(True)).encode()


def test_2_of_16_processes_one_creates(uri: str, store: Store) -> None:
    out, _ = worker("race", uri, "claims/0001", "16").communicate()
    assert json.loads(out) == {"won": 1, "lost": 15, "all": 16}
    assert store.get(Key("claims/0001")).startswith(b"racer ")


def test_2_an_object_can_be_created_again_after_it_was_deleted(store: Store) -> None:
    store.put_new(Key("a"), b"first")
    store.delete(Key("a"))
    store.put_new(Key("a"), b"second")
    assert store.get(Key("a")) == b"second"


# 3. put_file


def test_3_the_last_writer_wins(store: Store, tmp_path: Path) -> None:
    store.put_file(Key("a"), a_file(tmp_path, b"first, and longer"))
    store.put_file(Key("a"), a_file(tmp_path, b"second"))
    assert store.get(Key("a")) == b"second"


def test_3_progress_sums_up_to_the_size_and_is_never_called_from_two_threads_at_once(
    store: Store, tmp_path: Path
) -> None:
    size = 2 * MULTIPART_BYTES + 12_345  # three parts
    data = sealed(size - 32)
    busy = threading.Lock()

    def counter(counts: list[int]) -> Callable[[int], None]:
        def count(moved: int) -> None:
            assert busy.acquire(blocking=False), "two threads at once"
            counts.append(moved)
            busy.release()

        return count

    up: list[int] = []
    down: list[int] = []
    store.put_file(Key("big"), a_file(tmp_path, data), counter(up))
    store.get_file(Key("big"), tmp_path / "got", counter(down))
    assert (tmp_path / "got").read_bytes() == data
    assert sum(up) == sum(down) == size
    assert len(up) > 3
    assert len(down) > 3


def test_3_a_source_that_is_missing_is_the_callers_mistake_and_creates_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file(Key("a/b"), tmp_path / "missing")
    assert keys(store) == []


# 5. list


def test_5_list_is_sorted_and_filtered_by_prefix(store: Store) -> None:
    names = ["b", "a/z", "a/b/c", "a-b", "a/b.json", "ab/c", "a/b/é 世界", "a/b/#?%20+&", "a/b/C"]
    for name in names:
        store.put_new(Key(name), name.encode())
    assert keys(store) == sorted(names)
    assert keys(store, "a/") == sorted(name for name in names if name.startswith("a/"))
    assert keys(store, "a/b") == sorted(name for name in names if name.startswith("a/b"))
    assert keys(store, "a/b/") == sorted(name for name in names if name.startswith("a/b/"))
    assert keys(store, "missing/") == keys(store, "b/") == keys(store, "a/z/y/x") == []
    for name in names:
        assert store.get(Key(name)) == name.encode()


def test_5_list_begins_behind_after(store: Store) -> None:
    names = [f"m/{number:03d}" for number in range(8)]
    for name in [*names, "z"]:
        store.put_new(Key(name), b"")
    assert keys(store, "m/", after="m/004") == names[5:]
    assert keys(store, "m/", after="m/0045") == names[5:]
    assert keys(store, "m/", after="m/007") == []
    assert keys(store, "m/", after="a") == names
    assert keys(store, after="m/006") == ["m/007", "z"]


@pytest.mark.slow
def test_5_list_holds_all_objects_of_many_pages(store: Store) -> None:
    count = 1_003  # a page of S3 has 1000
    names = [f"metrics/{number:05d}" for number in range(count)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put_new(Key(name), b""), names))
    assert keys(store, "metrics/") == names
    assert keys(store, "metrics/", after=names[1]) == names[2:]


def test_5_an_object_deleted_during_a_listing_does_not_break_it(store: Store) -> None:
    for name in "abc":
        store.put_new(Key(name), b"")
    listing = store.list("")
    assert next(listing).key == "a"
    store.delete(Key("b"))
    assert [info.key for info in listing][-1] == "c"


def test_5_an_empty_store_lists_nothing(store: Store) -> None:
    assert keys(store) == keys(store, "runs/") == []


# 6. delete


def test_6_delete_of_what_is_not_there_is_no_error(store: Store) -> None:
    store.put_new(Key("a/b"), b"")
    for key in ("missing", "missing/too", "a", "a/b/c"):
        store.delete(Key(key))
    assert keys(store) == ["a/b"]


def test_6_what_was_deleted_is_gone_and_nothing_else_is(store: Store) -> None:
    store.put_new(Key("a/b/c"), b"")
    store.put_new(Key("a/d"), b"")
    store.delete(Key("a/b/c"))
    with pytest.raises(NotFound):
        store.get(Key("a/b/c"))
    assert keys(store) == ["a/d"]


def test_6_putting_and_deleting_side_by_side_disturbs_nobody(store: Store, tmp_path: Path) -> None:
    source = a_file(tmp_path, b"data")

    def work(number: int) -> None:
        for turn in range(25):
            new, file = Key(f"folder/sub/{number}-{turn}"), Key(f"folder/sub/{number}-{turn}-file")
            store.put_new(new, b"data")
            store.put_file(file, source)
            assert store.get(new) == store.get(file) == b"data"
            store.delete(new)
            store.delete(file)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert keys(store) == []


# 7. Errors


def test_7_what_is_not_there_is_not_found(store: Store, tmp_path: Path) -> None:
    store.put_new(Key("a/b"), b"")
    for key in ("missing", "a", "a/b/c"):
        with pytest.raises(NotFound, match="does not exist"):
            store.get(Key(key))
        with pytest.raises(NotFound, match="does not exist"):
            store.get_file(Key(key), tmp_path / "got")
    assert not list(tmp_path.glob("*got*"))


def test_7_a_target_folder_that_is_missing_is_the_callers_mistake(store: Store, tmp_path: Path) -> None:
    store.put_new(Key("a"), b"here")
    with pytest.raises(FileNotFoundError):
        store.get_file(Key("a"), tmp_path / "missing" / "got")


BAD_KEYS = ["", "/", "/etc/passwd", "..", "../x", "a/../x", "a/..", ".", "./a", "a/.", "a//b", "a/", "\\", "a\\..\\b"]
BAD_KEYS += ["a\0b", "\ud800", ".ftjob-staging", ".ftjob-staging/x"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_7_no_key_leaves_its_store(store: Store, tmp_path: Path, key: str) -> None:
    outside = tmp_path / "x"
    outside.write_bytes(b"outside")
    bad = Key(key)
    calls: list[Callable[[], object]] = [
        lambda: store.put_new(bad, b"evil"),
        lambda: store.put_file(bad, outside),
        lambda: store.get(bad),
        lambda: store.get_file(bad, tmp_path / "got"),
        lambda: store.delete(bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is not a key"):
            call()
    assert outside.read_bytes() == b"outside"
    assert not (tmp_path / "got").exists()


def test_7_no_listing_leaves_its_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "beside").write_bytes(b"outside")
    store.put_new(Key("a/b"), b"")
    for prefix in ("/", "/etc/", "../", "../b", "a/../../", "./", "a//", ".ftjob-staging/"):
        with pytest.raises(ValueError, match="is not a key"):
            list(store.list(prefix))


@contextlib.contextmanager
def small_files_only(limit: int) -> Iterator[None]:
    """A disk that is full, without needing one: the kernel refuses to let any file grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("size", [200_000, 2 * MULTIPART_BYTES])
def test_7_a_full_disk_is_worth_another_try_and_leaves_nothing_behind(store: Store, tmp_path: Path, size: int) -> None:
    target = tmp_path / "target"
    target.mkdir()
    store.put_file(Key("big"), a_file(tmp_path, bytes(size)))
    with small_files_only(65536), pytest.raises(Unreachable, match="no space left for"):
        store.get_file(Key("big"), target / "got")
    gc.collect()  # boto3 leaves the connection of a download that broke here to the garbage collector
    assert list(target.iterdir()) == []
    store.get_file(Key("big"), target / "got")


def test_7_messages_name_the_object(store: Store) -> None:
    with pytest.raises(NotFound) as caught:
        store.get(Key("runs/x/adapter.json"))
    assert caught.value.message == f"{store.uri}/runs/x/adapter.json does not exist"


def test_stores_may_be_used_from_many_threads(store: Store, tmp_path: Path) -> None:
    source = a_file(tmp_path, sealed(300_000))
    numbers = itertools.count()

    def work(_: int) -> None:
        key = Key(f"t/{next(numbers)}")
        store.put_file(key, source)
        assert is_whole(store.get(key))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert len(keys(store)) == 24
