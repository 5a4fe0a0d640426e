"""Promise: a run in a real bucket, with real accounts, loses nothing when the server is killed, and what is wrong with
the bucket is said before the run exists.

The server is Ceph's object gateway. It is killed with SIGKILL in the middle of writes: after a number of bytes that a
proxy in front of it counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from job.checkpoints import committed
from job.contract.errors import AlreadyExists, BadInput, DatasetInvalid, Unreachable
from job.contract.layout import Key, RunLayout
from job.contract.records import AdapterManifest
from job.storage import MULTIPART_BYTES, Store, open_store
from launch.access import check_bucket
from launch.datasets import read_dataset
from tests.ceph import GUEST, OWNER, Account, Ceph
from tests.job.running import Zygote, start
from tests.job.storage_worker import is_whole, sealed
from tests.job.test_outages import (
    LONG,
    LONG_EPOCHS,
    PER_EPOCH,
    ROWS,
    assert_nothing_is_torn,
    assert_same,
    forked,
    untouched,
)
from tests.job.test_storage import a_file, keys

pytestmark = [pytest.mark.machine, pytest.mark.slow]

ROOT: Final = Path(__file__).parents[2]
FTJOB: Final = Path(sys.executable).with_name("ftjob")


def as_account(monkeypatch: pytest.MonkeyPatch, account: Account) -> None:
    for name, value in account.variables.items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------------------------------- what is wrong is told apart


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (Account("stranger", "NOSUCHKEY", OWNER.secret), "this server knows no such access key"),
        (Account("forger", OWNER.key_id, "wrong-secret"), "the secret key is not the one of this access key"),
        (GUEST, "s3:ListBucket is not allowed"),
    ],
)
def test_wrong_keys_wrong_secrets_and_missing_rights_are_told_apart(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch, account: Account, said: str
) -> None:
    uri = ceph.uri("wrong")
    as_account(monkeypatch, account)
    with pytest.raises(BadInput, match=said) as caught:
        check_bucket(open_store(uri))
    assert caught.value.hint
    assert account.secret not in str(caught.value)


def test_a_missing_bucket_is_named(ceph: Ceph) -> None:
    with pytest.raises(BadInput, match=f"bucket no-such-bucket does not exist at {ceph.endpoint}"):
        check_bucket(open_store("s3://no-such-bucket/prefix"))


RIGHTS: Final = ("s3:ListBucket", "s3:PutObject", "s3:GetObject", "s3:DeleteObject")


# Not s3:GetObject: Ceph lets everybody read what they wrote themselves.
@pytest.mark.parametrize("lacking", ["s3:ListBucket", "s3:PutObject", "s3:DeleteObject"])
def test_the_right_that_is_lacking_is_named(ceph: Ceph, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    uri = ceph.uri(uuid.uuid4().hex)
    ceph.allow_guest(*(right for right in RIGHTS if right != lacking))
    as_account(monkeypatch, GUEST)
    with pytest.raises(BadInput, match=f"{lacking} is not allowed"):
        check_bucket(open_store(uri))
    as_account(monkeypatch, OWNER)
    left = keys(open_store(uri))
    assert len(left) == (lacking == "s3:DeleteObject")


def test_whoever_has_the_four_rights_may_launch(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    ceph.allow_guest(*RIGHTS)
    as_account(monkeypatch, GUEST)
    store = open_store(ceph.uri(uuid.uuid4().hex))
    check_bucket(store)
    assert keys(store) == []


def test_a_dataset_that_may_not_be_read_is_refused_by_name(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    as_account(monkeypatch, GUEST)
    uri = ceph.uri("rows.jsonl")
    with pytest.raises(DatasetInvalid, match=r"dataset .*rows\.jsonl cannot be read: .*s3:GetObject is not allowed"):
        read_dataset(uri, name=uri)


# --------------------------------------------------------------------------------------------------- the whole way


def adapter_of(answer: dict[str, Any]) -> AdapterManifest:
    key = RunLayout(answer["run_id"]).adapter_manifest
    return AdapterManifest.from_bytes(open_store(answer["bucket"]).get(key), name=key)


def ftjob(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FTJOB, *map(str, arguments)],
        env=os.environ | {"FTJOB_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_quickstart_with_dataset_and_bucket_on_ceph_makes_the_adapter_of_the_quickstart_on_files(
    ceph: Ceph, tmp_path: Path
) -> None:
    place = ceph.uri(uuid.uuid4().hex)
    open_store(place).put_file(Key("data/rows.jsonl"), ROOT / "examples/quickstart.jsonl")
    recipe = json.loads((ROOT / "examples/quickstart.json").read_text())
    answers = []
    for name, rows, bucket in (
        ("remote", f"{place}/data/rows.jsonl", f"{place}/ftjob"),
        ("local", str(ROOT / "examples/quickstart.jsonl"), (tmp_path / "bucket").as_uri()),
    ):
        recipe["dataset"]["train"] = rows
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(recipe))
        done = ftjob(tmp_path / "home", "launch", "--infra", "local", "--json", "--bucket", bucket, path)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    remote, local = (adapter_of(answer).files for answer in answers)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert remote[file].sha256 == local[file].sha256
    done = ftjob(tmp_path / "home", "fetch", answers[0]["run_id"], tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size == remote["adapter_model.safetensors"].size


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "NOSUCHKEY"}, "this server knows no such access key"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is not the one of this access key"),
        (GUEST.variables, "is not allowed"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no usable AWS credentials"),
    ],
)
def test_a_launch_that_may_not_write_says_why_with_exit_code_2_and_creates_nothing(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    uri = ceph.uri(uuid.uuid4().hex)
    with monkeypatch.context() as wrong:
        for name, value in variables.items():
            if value:
                wrong.setenv(name, value)
            else:
                wrong.delenv(name)
        done = ftjob(tmp_path / "home", "launch", "--bucket", uri, ROOT / "examples/quickstart.json")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert keys(open_store(uri)) == []
    assert not list((tmp_path / "home").glob("runs/*"))


# ------------------------------------------------------------------------------------------- the gateway is killed

CHECKPOINT_BYTES: Final = 140_000
OFFSETS: Final = (1, 30_000, 60_000, 90_000, 120_000, CHECKPOINT_BYTES - 5_000)
"""Bytes of traffic from the start of a checkpoint's upload to the kill."""


def test_a_gateway_that_is_killed_in_the_middle_of_checkpoints_costs_nothing_but_time(
    zygote: Zygote, ceph: Ceph, tmp_path: Path
) -> None:
    keep_all = LONG | {"checkpoints": {"keep": LONG_EPOCHS}}
    run = start(tmp_path / "run", rows=ROWS, bucket=ceph.uri(uuid.uuid4().hex), recipe=keep_all)
    store = open_store(run.bucket)
    with forked(zygote, run, final_retry_seconds=120.0) as live:
        for offset in OFFSETS:
            seen, failures = len(live.events("checkpoint.uploading")), len(live.events("checkpoint.upload_failed"))
            live.until("checkpoint.uploading", after=seen)
            ceph.proxy.after(offset, ceph.kill_gateway)
            live.until("checkpoint.upload_failed", after=failures)
            assert not ceph.gateway_lives
            existed = {event["checkpoint"] for event in live.events("checkpoint.committed")}
            ceph.start_gateway()
            assert existed <= {str(name) for name in committed(store, run.layout)}
        assert live.exit() == 0, live.said
        assert [event["step"] for event in live.events("checkpoint.committed")] == [
            PER_EPOCH * epoch for epoch in range(1, LONG_EPOCHS + 1)
        ]
        assert len(live.events("checkpoint.upload_failed")) >= len(OFFSETS)
    assert [attempt.steps_repeated for attempt in run.passport().attempts] == [0]
    assert len(committed(store, run.layout)) == LONG_EPOCHS
    assert_nothing_is_torn(run, tmp_path / "read")
    assert_same(run, untouched(zygote, tmp_path / "untouched", LONG))


def test_every_claim_that_was_answered_survives_the_kill_and_no_other_is_torn(ceph: Ceph, ceph_uri: str) -> None:
    store = open_store(ceph_uri)

    def data(number: int) -> bytes:
        return sealed(2_000 + number)

    written: dict[str, bytes] = {}
    for turn, offset in enumerate((1_500, 4_000, 9_000, 20_000)):
        ceph.proxy.after(offset, ceph.kill_gateway)
        for number in range(40):
            key, content = f"claims/{turn}-{number:02}", data(number)
            try:
                store.put_new(Key(key), content)
            except Unreachable:
                break
            written[key] = content
        assert not ceph.gateway_lives
        ceph.start_gateway()
        for info in store.list("claims/"):
            found = store.get(info.key)
            assert is_whole(found)
            assert written.setdefault(info.key, found) == found
        assert keys(store, "claims/") == sorted(written)
    for key in written:  # and the create-only promise did not die with the gateway
        with pytest.raises(AlreadyExists):
            store.put_new(Key(key), b"somebody else's")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_an_upload_in_parts_that_loses_its_gateway_is_whole_or_absent(
    ceph: Ceph, ceph_uri: str, tmp_path: Path, share: float
) -> None:
    store: Store = open_store(ceph_uri)
    size = 4 * MULTIPART_BYTES
    source = a_file(tmp_path, sealed(size - 32))
    assert keys(store) == []
    ceph.proxy.after(int(share * size), ceph.kill_gateway)
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(store.put_file, Key("big"), source)
        with pytest.raises(Unreachable):
            upload.result(timeout=120)
    assert not ceph.gateway_lives
    ceph.start_gateway()
    assert keys(store) == []
    store.put_file(Key("big"), source)
    assert is_whole(store.get(Key("big")))
