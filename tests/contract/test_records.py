"""Stored records: what was written comes back; what was not written by us is Damaged, and says why."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from job.contract.errors import Damaged
from job.contract.records import CheckpointManifest, FileDigest, Record, utc
from tests.contract.examples import FILES, SHA, adapter, checkpoint, passport, records

RECORDS = pytest.mark.parametrize("record", records(), ids=lambda record: type(record).__name__)


def test_every_kind_of_record_is_tried() -> None:
    ours = {kind for kind in Record.__subclasses__() if kind.__module__.startswith("job.contract.")}
    assert {type(record) for record in records()} == ours


@RECORDS
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    again = type(record).from_bytes(record.to_bytes(), name="x")
    assert again == record
    assert again.to_bytes() == record.to_bytes()


@RECORDS
def test_a_record_is_readable_json_that_ends_its_line(record: Record) -> None:
    data = record.to_bytes()
    assert data.endswith(b"}\n")
    assert json.loads(data)["schema_version"] == 1
    assert json.loads(data) == record.model_dump(mode="json")


@given(st.floats(allow_nan=False))
def test_every_loss_comes_back_bit_for_bit(loss: float) -> None:
    again = CheckpointManifest.from_bytes(checkpoint(held_out_loss=loss).to_bytes(), name="x").held_out_loss
    assert again is not None
    assert again.hex() == loss.hex()


def test_a_loss_that_is_no_number_is_not_taken_for_no_loss() -> None:
    data = checkpoint(held_out_loss=math.nan).to_bytes()
    again = CheckpointManifest.from_bytes(data, name="x").held_out_loss
    assert again is not None
    assert math.isnan(again)
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@RECORDS
def test_a_record_cut_short_anywhere_is_damaged(record: Record) -> None:
    data = record.to_bytes().rstrip()
    for length in range(len(data)):
        with pytest.raises(Damaged):
            type(record).from_bytes(data[:length], name="x")


@RECORDS
@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b"\x00\xff", b"not json", b'{"schema_version": 1}', b"[" * 100_000]
)
def test_other_bytes_are_damaged_and_the_message_names_the_object_and_the_kind(record: Record, data: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        type(record).from_bytes(data, name="runs/x/y.json")
    assert caught.value.message.startswith(f"runs/x/y.json is not a readable {type(record).__name__}: ")
    assert caught.value.hint == "it was cut short, changed, or written by another version of ftjob"


@given(st.binary())
def test_any_bytes_are_damaged(data: bytes) -> None:
    with pytest.raises(Damaged):
        CheckpointManifest.from_bytes(data, name="x")


@RECORDS
def test_an_unknown_or_a_missing_key_is_named(record: Record) -> None:
    data = json.loads(record.to_bytes())
    with pytest.raises(Damaged, match="surprise"):
        type(record).from_bytes(json.dumps({**data, "surprise": 1}).encode(), name="x")
    came_later = {"tokens_sha256"}  # records of before have to be read for ever
    for key in set(data) - {"schema_version", "hint"} - came_later:
        with pytest.raises(Damaged, match=f": {key}: Field required"):
            type(record).from_bytes(json.dumps({k: v for k, v in data.items() if k != key}).encode(), name="x")


@RECORDS
@pytest.mark.parametrize("version", [2, 3, 10**9])
def test_a_record_of_a_newer_version_is_refused_with_the_versions_and_what_to_do(record: Record, version: int) -> None:
    data = {**json.loads(record.to_bytes()), "schema_version": version, "what_we_cannot_know": {}}
    with pytest.raises(Damaged) as caught:
        type(record).from_bytes(json.dumps(data).encode(), name="runs/x/y.json")
    assert caught.value.message == (
        f"runs/x/y.json was written by a newer ftjob: schema_version {version}, and this one reads 1"
    )
    assert caught.value.hint == "upgrade ftjob"


@pytest.mark.parametrize("version", [0, -1, "1", "2", None, 1.5, []])
def test_a_version_that_never_was_is_damaged(version: object) -> None:
    data = {**json.loads(checkpoint().to_bytes()), "schema_version": version}
    with pytest.raises(Damaged, match="schema_version"):
        CheckpointManifest.from_bytes(json.dumps(data).encode(), name="x")


@pytest.mark.parametrize("file", ["", "/etc/passwd", "../adapter.json", "a/../../b", "a/", ".", "a\\b", "a\0b"])
@pytest.mark.parametrize("record", [checkpoint(), adapter(), passport()], ids=lambda record: type(record).__name__)
def test_no_record_names_a_file_outside_its_folder(record: Record, file: str) -> None:
    evil = record.to_bytes().decode().replace("adapter_model.safetensors", json.dumps(file)[1:-1])
    assert evil != record.to_bytes().decode()
    with pytest.raises(Damaged, match="does not stay inside its folder"):
        type(record).from_bytes(evil.encode(), name="x")


@pytest.mark.parametrize("sha256", ["", SHA[:-1], SHA + "0", SHA.upper(), SHA[:-1] + "g", SHA + "\n"])
def test_a_digest_is_64_small_hex_digits(sha256: str) -> None:
    with pytest.raises(ValidationError):
        FileDigest(size=1, sha256=sha256)


def test_times_without_a_zone_are_refused() -> None:
    data = checkpoint().to_bytes().replace(b"05.678901Z", b"05.678901")
    assert data != checkpoint().to_bytes()
    with pytest.raises(Damaged, match="created_at"):
        CheckpointManifest.from_bytes(data, name="x")


@RECORDS
def test_a_record_is_frozen(record: Record) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        record.schema_version = 1  # type: ignore[misc]


def test_a_manifest_knows_its_checkpoints_name() -> None:
    assert str(checkpoint().name) == "step-00000400-a0002"


def test_a_passport_keeps_every_digit_of_every_loss() -> None:
    assert json.loads(passport().to_bytes())["losses"][1]["loss"] == 0.1 + 0.2
    assert set(FILES) == set(json.loads(passport().to_bytes())["base_model"]["files"])


def test_moments_are_told_in_utc() -> None:
    moment = datetime(2026, 1, 2, 1, 30, 0, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert utc(moment) == utc(moment.astimezone(UTC)) == "2026-01-01T23:30:00+00:00"
