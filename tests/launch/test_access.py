"""Promise: a bucket that a run could not use is refused before the run exists, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job.contract.errors import BadInput, Unreachable
from job.contract.layout import run_of_recipe_key
from job.storage import Store, open_store
from launch.access import check_bucket, given_to_the_job, job_credentials, job_variables
from tests.contract.examples import run_record
from tests.job.scripted_s3 import OK, Answer, ScriptedS3
from tests.s3server import S3Server

EMPTY = Answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
EXISTS = Answer.error(412, "PreconditionFailed")
FORBIDDEN = Answer.error(403, "AccessDenied")
OTHERS = Answer(200, b"what somebody else wrote")
OURS = Answer(200, b"ftjob asks whether it can write here\n")
DELETED = Answer(204)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")


@pytest.fixture
def told(request: pytest.FixtureRequest, keys: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    with ScriptedS3(*request.param) as script:
        monkeypatch.setenv("AWS_ENDPOINT_URL", script.endpoint)
        yield script


def bucket() -> Store:
    return open_store("s3://bucket/mine")


def test_a_bucket_that_can_be_used_is_left_as_it_was(s3_uri: str) -> None:
    store = open_store(s3_uri)
    check_bucket(store)
    assert list(store.list("")) == []


def test_a_folder_is_left_alone(tmp_path: Path) -> None:
    check_bucket(open_store((tmp_path / "bucket").as_uri()))
    assert not (tmp_path / "bucket").exists()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ((FORBIDDEN,), "s3:ListBucket is not allowed"),
        ((EMPTY, FORBIDDEN), "s3:PutObject is not allowed"),
        ((EMPTY, OK, EXISTS, FORBIDDEN), "s3:GetObject is not allowed"),
        ((EMPTY, OK, EXISTS, OTHERS, OURS, FORBIDDEN), "s3:DeleteObject is not allowed"),
    ],
    indirect=["told"],
)
def test_what_a_run_needs_and_may_not_do_is_named(told: ScriptedS3, said: str) -> None:
    with pytest.raises(BadInput, match=f"bucket s3://bucket/mine cannot be used: .*{said}") as caught:
        check_bucket(bucket())
    assert said.partition(" ")[0] in caught.value.hint


@pytest.mark.parametrize("told", [(EMPTY, OK, OK, DELETED)], indirect=True)
def test_a_server_that_replaces_what_it_should_create_is_refused_and_left_clean(told: ScriptedS3) -> None:
    with pytest.raises(BadInput, match="ignores If-None-Match") as caught:
        check_bucket(bucket())
    assert "honours" in caught.value.hint
    assert [method for method, _ in told.requests] == ["GET", "PUT", "PUT", "DELETE"]
    assert told.requests[1][1] == told.requests[3][1]


@pytest.mark.parametrize("told", [(EMPTY, OK, EXISTS, OTHERS, OTHERS, DELETED)], indirect=True)
def test_a_server_that_gives_back_other_bytes_is_refused_and_left_clean(told: ScriptedS3) -> None:
    with pytest.raises(BadInput, match="does not give back what was just written"):
        check_bucket(bucket())
    assert told.requests[-1][0] == "DELETE"


@pytest.mark.parametrize("told", [(EMPTY, OK, EXISTS, OTHERS, OURS, DELETED)], indirect=True)
def test_what_is_tried_out_is_beside_the_runs_and_is_none(told: ScriptedS3) -> None:
    check_bucket(bucket())
    path = told.requests[1][1]
    assert path.startswith("/bucket/mine/runs/")
    assert run_of_recipe_key(path.removeprefix("/bucket/mine/") + "/recipe.json") is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ((Answer(404, b"<html><body>nothing here</body></html>"),), "does not answer as S3 servers do"),
        ((Answer(302),), "does not answer as S3 servers do"),
        ((Answer.error(403, "InvalidAccessKeyId"),), "knows no such access key"),
        ((Answer.error(403, "SignatureDoesNotMatch"),), "the secret key is not the one"),
        ((Answer.error(400, "ExpiredToken"),), "the credentials have expired"),
        ((Answer.error(404, "NoSuchBucket"),), "bucket bucket does not exist"),
    ],
    indirect=["told"],
)
def test_wrong_servers_keys_and_buckets_are_bad_input(told: ScriptedS3, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        check_bucket(bucket())
    assert caught.value.hint
    assert "testing-secret" not in str(caught.value)


def test_a_bucket_without_credentials_is_bad_input(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BadInput, match="no usable AWS credentials"):
        check_bucket(bucket())


def test_a_server_out_of_reach_is_worth_another_try(s3_server: S3Server) -> None:
    s3_server.cut()
    with pytest.raises(Unreachable, match="out of reach"):
        check_bucket(bucket())


# ----------------------------------------------------------------------------------------------- what a job is given


def test_no_credentials_are_no_error() -> None:
    assert job_credentials().variables == {}


def test_credentials_that_last_are_handed_on_and_never_shown(keys: None) -> None:
    found = job_credentials()
    assert found.variables == {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}
    assert (found.expires_at, found.are_temporary) == (None, False)
    assert "testing" not in repr(found)


def test_credentials_that_end_say_when(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=8)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    assert job_credentials().expires_at is None
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", end.isoformat())
    found = job_credentials()
    assert found.variables["AWS_SESSION_TOKEN"] == "token"
    assert (found.expires_at, found.are_temporary) == (end, True)


def test_a_profile_is_resolved_to_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MINE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("FTJOB_S3_PROFILE", "mine")
    assert job_credentials().variables == {"AWS_ACCESS_KEY_ID": "MINE", "AWS_SECRET_ACCESS_KEY": "x"}
    monkeypatch.setenv("FTJOB_S3_PROFILE", "nobody")
    for ask in (job_credentials, job_variables):
        with pytest.raises(BadInput, match="nobody"):
            ask()


def test_single_sign_on_that_has_ended_says_how_to_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "[profile mine]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n"
        "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://example.com/start\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    for ask in (job_credentials, lambda: check_bucket(bucket())):
        with pytest.raises(BadInput, match="no usable AWS credentials") as caught:
            ask()
        assert "aws sso login" in caught.value.hint


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FTJOB_S3_ENDPOINT"])
def test_a_job_is_led_to_the_same_server_whoever_named_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "https://minio.example.com")
    monkeypatch.setenv("FTJOB_S3_PATH_STYLE", "0")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert job_variables() == {
        "FTJOB_S3_ENDPOINT": "https://minio.example.com",
        "FTJOB_S3_REGION": "eu-west-3",
        "FTJOB_S3_PATH_STYLE": "false",
    }


def test_a_server_and_region_of_a_profile_travel_too_and_its_name_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[profile mine]\nregion = sa-east-1\nendpoint_url = https://minio.example.com\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert job_variables() == {
        "FTJOB_S3_ENDPOINT": "https://minio.example.com",
        "FTJOB_S3_REGION": "sa-east-1",
    }


@pytest.mark.parametrize(("hub", "secret"), [("https://hub.example", False), ("https://me:pw@hub.example", True)])
def test_a_mirror_of_the_hub_that_is_named_with_a_password_travels_as_a_secret(
    monkeypatch: pytest.MonkeyPatch, hub: str, secret: bool
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    given = given_to_the_job(run_record(), bucket())
    assert ("HF_ENDPOINT" in given.secrets, "HF_ENDPOINT" in given.variables) == (secret, not secret)


def test_aws_itself_is_named_by_its_region_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert job_variables() == {"FTJOB_S3_REGION": "eu-central-1"}
