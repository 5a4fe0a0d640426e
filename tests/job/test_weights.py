"""Promise: the base model's files come from wherever they are, survive any death on the way, and are what they say.

No training stack here: the files are only brought and digested.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from job.contract.errors import AccessRefused, Damaged, FtjobError, ModelInvalid, TrainingFailed, Unreachable
from job.contract.layout import Key
from job.contract.recipe import BaseModelRef
from job.storage import open_store
from job.weights import Base, locate
from tests.harm import cut_short, flip
from tests.hubserver import HubServer
from tests.s3server import S3Server
from tests.watching import wait_for

WRITTEN: Final = 10 * 1024 * 1024
"""huggingface_hub writes so much at a time."""
SHARD: Final = 24 * 1024 * 1024


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


SMALL: Final = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "model.safetensors": noise(1, 300_000),
}
NOT_READ: Final = {"README.md": b"hello", "pytorch_model.bin": b"pickle", "original/model.safetensors": b"again"}


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    """Two shards that take a while."""
    shards = {f"model-0000{n}-of-00002.safetensors": noise(n, SHARD) for n in (1, 2)}
    return {"config.json": b"{}", "model.safetensors.index.json": b"{}"} | shards


def on_disk(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def in_bucket(uri: str, files: dict[str, bytes]) -> BaseModelRef:
    store = open_store(uri)
    for name, data in files.items():
        store.put_new(Key(name), data)
    return BaseModelRef(id=uri)


def holds(base: Base, files: dict[str, bytes]) -> bool:
    """Whether the digests and the bytes on the disk are those of the files."""
    told = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    return {name: (d.size, d.sha256) for name, d in base.files.items()} == told and all(
        (base.folder / name).read_bytes() == data for name, data in files.items()
    )


class Told:
    """What a download says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def locate(self, ref: BaseModelRef, workdir: Path, *, retry_seconds: float = 0.0) -> Base:
        return locate(ref, workdir, say=self.said.append, retry_seconds=retry_seconds)


# ---------------------------------------------------------------------------------------- wherever it comes from


def test_the_same_files_are_the_same_base_wherever_they_come_from(tmp_path: Path, hub: HubServer, s3_uri: str) -> None:
    folder = on_disk(tmp_path / "folder", SMALL | NOT_READ)
    commit = hub.add("org/model", SMALL | NOT_READ)
    refs = [
        BaseModelRef(id=str(folder)),
        BaseModelRef(id=folder.as_uri()),
        BaseModelRef(id="org/model", revision=commit),
        BaseModelRef(id="org/model"),
        in_bucket(s3_uri, SMALL | NOT_READ),
    ]
    found = [locate(ref, tmp_path / str(at), retry_seconds=0.0) for at, ref in enumerate(refs)]
    assert all(holds(base, SMALL) for base in found)
    assert {base.digest for base in found} == {found[0].digest}
    assert {base.chat_template_digest for base in found} == {found[0].chat_template_digest}
    assert found[0].folder == found[1].folder == folder, "a folder of this machine is used where it is"


@pytest.mark.slow
def test_what_is_not_read_is_not_downloaded(tmp_path: Path, hub: HubServer, s3_uri: str) -> None:
    hub.add("org/model", SMALL | NOT_READ)
    base = locate(BaseModelRef(id="org/model"), tmp_path)
    assert {path.name for path in base.folder.rglob("*")} == set(SMALL)
    base = locate(in_bucket(s3_uri, SMALL | NOT_READ), tmp_path)
    assert {path.name for path in base.folder.rglob("*") if not path.name.startswith(".")} == set(SMALL)


def test_a_commit_is_what_it_was_when_its_branch_moves_on(tmp_path: Path, hub: HubServer) -> None:
    commit = hub.add("org/model", SMALL)
    hub.add("org/model", SMALL | {"config.json": b"[]"})
    assert holds(locate(BaseModelRef(id="org/model", revision=commit), tmp_path), SMALL)


@pytest.mark.parametrize("torn", [b"", b'[{"name"', b"7", b'[{"nome": 1}]', b"[]"])
def test_a_listing_that_a_power_cut_left_torn_is_asked_for_again(tmp_path: Path, hub: HubServer, torn: bytes) -> None:
    ref = BaseModelRef(id="org/model", revision=hub.add("org/model", SMALL))
    locate(ref, tmp_path)
    [listing] = (tmp_path / "base").glob("*.json")
    listing.write_bytes(torn)
    assert holds(locate(ref, tmp_path), SMALL)


def test_a_download_tells_how_far_it_is_and_one_that_is_not_needed_tells_nothing(
    tmp_path: Path, hub: HubServer
) -> None:
    hub.add("org/model", SMALL)
    told = Told()
    with capture_logs() as events:
        told.locate(BaseModelRef(id="org/model"), tmp_path)
    total = sum(map(len, SMALL.values()))
    assert told.said[0].startswith("downloading the base model: ")
    assert told.said[0].endswith(" of 0.3 MB")
    assert told.said[-1] == "loading the model"
    assert [e["total"] for e in events if e["event"] == "weights.downloading"] == [total]
    assert [(e["files"], e["total"]) for e in events if e["event"] == "weights.downloaded"] == [(len(SMALL), total)]
    again = Told()
    again.locate(BaseModelRef(id="org/model"), tmp_path)
    assert again.said == []


# ------------------------------------------------------------------------------------------------- a second time


def test_a_second_attempt_on_a_machine_needs_no_hub(tmp_path: Path, hub: HubServer) -> None:
    ref = BaseModelRef(id="org/model", revision=hub.add("org/model", SMALL))
    locate(ref, tmp_path)
    asked = len(hub.seen)
    hub.proxy.cut()
    assert holds(locate(ref, tmp_path, retry_seconds=0.0), SMALL)
    assert len(hub.seen) == asked


def test_runs_of_one_machine_share_what_came_from_the_hub(tmp_path: Path, hub: HubServer) -> None:
    ref = BaseModelRef(id="org/model", revision=hub.add("org/model", SMALL))
    locate(ref, tmp_path / "one")
    locate(ref, tmp_path / "two")
    assert hub.sent_of(SMALL["model.safetensors"]) == len(SMALL["model.safetensors"])


def test_a_second_attempt_copies_only_what_changed_in_the_bucket(tmp_path: Path, s3_uri: str) -> None:
    ref = in_bucket(s3_uri, SMALL)
    first = locate(ref, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.suffix != ".json"}
    assert locate(ref, tmp_path) == first
    changed = tmp_path / "changed"
    # Of another size: within one second that and the time of the last change are all that a listing tells.
    changed.write_bytes(b'{"model_type": "quite another model"}')
    open_store(s3_uri).put_file(Key("config.json"), changed)
    second = locate(ref, tmp_path)
    assert holds(second, SMALL | {"config.json": changed.read_bytes()})
    assert second.digest != first.digest
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("spoil", [flip, cut_short])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("place", ["hub", pytest.param("bucket", marks=pytest.mark.slow)])
def test_a_file_that_was_damaged_on_this_disk_is_fetched_again(
    tmp_path: Path, hub: HubServer, s3_uri: str, place: str, name: str, spoil: Callable[[Path], None]
) -> None:
    hub.add("org/model", SMALL)
    ref = in_bucket(s3_uri, SMALL) if place == "bucket" else BaseModelRef(id="org/model")
    spoil(locate(ref, tmp_path).folder / name)
    with capture_logs() as events:
        assert holds(locate(ref, tmp_path, retry_seconds=0.0), SMALL)
    assert [e["file"] for e in events if e["event"] == "weights.damaged"] == [name]


def test_a_place_that_gives_other_bytes_than_it_lists_is_damage(tmp_path: Path, hub: HubServer) -> None:
    hub.add("org/model", SMALL)
    hub.spoils.add(hashlib.sha256(SMALL["model.safetensors"]).hexdigest())
    with pytest.raises(Damaged, match=r"model\.safetensors of base model org/model has other bytes"):
        locate(BaseModelRef(id="org/model"), tmp_path, retry_seconds=0.0)


# ------------------------------------------------------------------------------------------------ cut and killed

SCRIPT: Final = """
import sys
from pathlib import Path
from job.contract.recipe import BaseModelRef
from job.weights import locate
print(locate(BaseModelRef(id=sys.argv[1]), Path(sys.argv[2]), retry_seconds=20.0).digest)
"""


def bring_in_a_process(ref: BaseModelRef, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, ref.id, str(workdir)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_process_killed_in_mid_download_goes_on_where_it_was(
    tmp_path: Path, hub: HubServer, large: dict[str, bytes]
) -> None:
    hub.add("org/model", large)
    hub.hold_at(SHARD * 3 // 4)
    ref = BaseModelRef(id="org/model")
    process = bring_in_a_process(ref, tmp_path)
    cache = Path(os.environ["HF_HUB_CACHE"])
    try:
        assert hub.held.wait(60), process.communicate(timeout=1)
        wait_for(lambda: [p for p in cache.rglob("*.incomplete") if p.stat().st_size >= WRITTEN])
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hub.release()
    # huggingface_hub writes 10 MiB at a time, and a file that had less goes on from what it had.
    left = {path.stat().st_size for path in cache.rglob("*.incomplete")} - {0}
    assert max(left) == WRITTEN
    before = {name: hub.sent_of(data) for name, data in large.items() if name.endswith(".safetensors")}
    base = locate(ref, tmp_path)
    assert holds(base, large)
    starts = {seen.path: seen.start for seen in hub.seen if seen.path.startswith("/stored/") and seen.status == 206}
    assert starts, "nothing was taken up"
    assert set(starts.values()) == left
    for name, sent in before.items():
        assert hub.sent_of(large[name]) - sent <= SHARD
    assert len(hub.asked_for("/config.json")) <= 2


@pytest.mark.slow
def test_files_that_are_whole_are_not_fetched_again_after_a_kill(
    tmp_path: Path, hub: HubServer, large: dict[str, bytes]
) -> None:
    """The process is killed when the small model's weights are here and a shard of the large one is on its way."""
    files = large | {"tokenizer.json": noise(3, 1000), "model-extra.safetensors": noise(4, SHARD // 4)}
    hub.add("org/model", files)
    hub.hold_at(SHARD // 2)
    ref = BaseModelRef(id="org/model")
    process = bring_in_a_process(ref, tmp_path)
    cache = Path(os.environ["HF_HUB_CACHE"])
    whole = ("tokenizer.json", "model-extra.safetensors", "config.json", "model.safetensors.index.json")
    try:
        assert hub.held.wait(60), process.communicate(timeout=1)
        wait_for(lambda: all(list(cache.glob(f"models--org--model/snapshots/*/{name}")) for name in whole))
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hub.release()
    asked = len(hub.seen)
    assert holds(locate(ref, tmp_path), files)
    again = {seen.path.rpartition("/")[2] for seen in hub.seen[asked:]}
    assert again.isdisjoint({*whole, hashlib.sha256(files["model-extra.safetensors"]).hexdigest()})


@pytest.mark.slow
def test_a_process_killed_while_it_copies_from_a_bucket_leaves_no_rubbish_and_copies_nothing_twice(
    tmp_path: Path, s3_server: S3Server, s3_uri: str, large: dict[str, bytes]
) -> None:
    files = large | {"tokenizer.json": noise(3, 1000)}
    ref = in_bucket(s3_uri, files)
    process = bring_in_a_process(ref, tmp_path)
    folder = tmp_path / "base"
    try:
        wait_for(lambda: [p for p in folder.rglob("*.safetensors.*") if p.stat().st_size > 0])
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert holds(locate(ref, tmp_path, retry_seconds=0.0), files)
    (place,) = folder.iterdir()
    assert {path.name for path in place.iterdir()} == {*files, ".ftjob-known.json"}


def test_a_connection_that_breaks_in_mid_file_is_taken_up(
    tmp_path: Path, hub: HubServer, large: dict[str, bytes]
) -> None:
    hub.add("org/model", large)
    hub.proxy.break_after(SHARD)
    assert holds(locate(BaseModelRef(id="org/model"), tmp_path, retry_seconds=30.0), large)
    assert hub.proxy.breaks == 1


@pytest.mark.parametrize("place", ["hub", pytest.param("bucket", marks=pytest.mark.slow)])
def test_a_place_that_is_out_of_reach_can_be_tried_again(
    tmp_path: Path, hub: HubServer, s3_server: S3Server, s3_uri: str, place: str
) -> None:
    hub.add("org/model", SMALL)
    ref = in_bucket(s3_uri, SMALL) if place == "bucket" else BaseModelRef(id="org/model")
    hub.proxy.cut()
    if place == "bucket":
        s3_server.cut()
    with pytest.raises(Unreachable):
        locate(ref, tmp_path, retry_seconds=0.0)
    mending = threading.Timer(0.3, hub.proxy.mend if place == "hub" else s3_server.mend)
    mending.start()
    assert holds(locate(ref, tmp_path, retry_seconds=30.0), SMALL)
    mending.join()


class Stop(Exception):
    """A notice came."""


@pytest.mark.parametrize("silent", [True, False])
def test_a_notice_ends_a_download_at_once(
    tmp_path: Path, hub: HubServer, large: dict[str, bytes], silent: bool
) -> None:
    """Also one that waits for a server that says nothing."""
    hub.add("org/model", large)
    hub.hold_at(SHARD // 2)

    def go_on() -> None:
        if hub.held.is_set():
            if not silent:
                hub.release()
            raise Stop

    with pytest.raises(Stop):
        locate(BaseModelRef(id="org/model"), tmp_path, go_on=go_on)
    hub.release()
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("weights")])
    landed = list(Path(os.environ["HF_HUB_CACHE"]).glob("models--*/snapshots/*/*.safetensors"))
    assert landed == [], "the threads went on to the end"


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("token", "model", "said"),
    [
        (None, "org/none", "does not exist on the hub, or is private and there is no token"),
        ("hf_good", "org/none", "does not exist on the hub, or is private and this token"),
        (None, "org/private", "is private and there is no token"),
        (None, "org/gated", "is gated, and there is no token"),
        ("hf_good", "org/gated", "is gated, and the account of this token has not been let in"),
        ("hf_bad", "org/gated", "does not accept the token"),
        (None, "org/pickles", "pickles only"),
    ],
)
def test_a_model_that_may_not_be_had_is_refused_at_once_and_the_token_is_not_told(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, model: str, said: str
) -> None:
    hub.add("org/gated", SMALL, gated=True)
    hub.add("org/private", SMALL, private=True)
    hub.add("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.account("hf_good")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with capture_logs() as events, pytest.raises(ModelInvalid, match=said) as caught:
        locate(BaseModelRef(id=model), tmp_path)
    assert caught.value.hint
    assert "hf_" not in f"{caught.value}{events}".replace("HF_TOKEN", "")


def test_a_revision_that_does_not_exist_is_refused(tmp_path: Path, hub: HubServer) -> None:
    hub.add("org/model", SMALL)
    with pytest.raises(ModelInvalid, match="no revision 'v9'"):
        locate(BaseModelRef(id="org/model", revision="v9"), tmp_path)


def test_a_member_gets_a_gated_model_and_the_token_goes_to_the_hub_only(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", SMALL, gated=True)
    monkeypatch.setenv("HF_TOKEN", hub.account("hf_member", "org/model"))
    assert holds(locate(BaseModelRef(id="org/model"), tmp_path), SMALL)
    assert {(seen.host, seen.token) for seen in hub.seen} == {("127.0.0.1", "hf_member"), ("localhost", None)}


def test_a_bucket_that_refuses_is_told_from_one_that_is_empty(tmp_path: Path, s3_uri: str) -> None:
    with pytest.raises(ModelInvalid, match=r"no config\.json"):
        locate(BaseModelRef(id=s3_uri), tmp_path)
    with pytest.raises(AccessRefused, match="no-such-bucket-here"):
        locate(BaseModelRef(id="s3://no-such-bucket-here/model"), tmp_path)


def test_a_disk_that_is_too_small_is_known_before_the_download(
    tmp_path: Path, hub: HubServer, large: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lie of the hub about the size of a file fills any disk."""
    free = shutil.disk_usage(tmp_path).free
    hub.add("org/model", SMALL)
    said: dict[str, Any] = json.loads(hub.page("/api/models/org/model/revision/main"))
    for file in said["siblings"]:
        if "lfs" in file:
            file["lfs"]["size"] = free * 2
    hub.pages["/api/models/org/model/revision/main"] = json.dumps(said).encode()
    with pytest.raises(TrainingFailed, match="does not fit onto this disk") as caught:
        locate(BaseModelRef(id="org/model"), tmp_path)
    assert "larger disk" in caught.value.hint
    assert [seen for seen in hub.seen if "/resolve/" in seen.path] == []


FULL: Final = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_on_the_way_is_named(tmp_path: Path, hub: HubServer) -> None:
    """A limit on the size of files stands for it: the same error, without the privileges for a small disk."""
    hub.add("org/model", SMALL)
    script = FULL + SCRIPT.replace("20.0", "0.0")
    done = subprocess.run(
        [sys.executable, "-c", script, "org/model", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "job.contract.errors.Unreachable: no space left for" in done.stderr


def test_errors_of_the_hub_are_ours(tmp_path: Path, hub: HubServer) -> None:
    hub.add("org/model", SMALL)
    for status in (429, 500, 503):
        hub.failing = status
        with pytest.raises(FtjobError) as caught:
            locate(BaseModelRef(id="org/model"), tmp_path, retry_seconds=0.0)
        assert isinstance(caught.value, Unreachable)
