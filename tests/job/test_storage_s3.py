"""What only a bucket can do wrong: names, credentials, networks, servers with a mind of their own."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from job.contract.errors import (
    AccessRefused,
    AlreadyExists,
    BadInput,
    FtjobError,
    Garbled,
    NotFound,
    StorageError,
    Unreachable,
)
from job.contract.layout import Key
from job.storage import MULTIPART_BYTES, Store, open_store
from job.storage.s3_account import make_client
from tests.job.scripted_s3 import LOST, OK, Answer, ScriptedS3
from tests.job.storage_worker import is_whole, sealed
from tests.job.test_storage import a_file, keys
from tests.job.test_storage_file import CALLS, every_call
from tests.s3server import BUCKET, HOST, S3Server

EXISTS = Answer.error(412, "PreconditionFailed")


def scripted(script: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL", script.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    return open_store("s3://bucket/prefix")


# Names and credentials


def test_a_bucket_that_does_not_exist_is_named_whatever_is_asked(s3_server: S3Server, tmp_path: Path) -> None:
    for name, call in every_call(open_store("s3://no-such-bucket/prefix"), tmp_path).items():
        with pytest.raises(AccessRefused) as caught:
            call()
        assert caught.value.message == f"bucket no-such-bucket does not exist at {s3_server.endpoint}", name
        assert "aws s3 mb s3://no-such-bucket" in caught.value.hint
    assert not (tmp_path / "got").exists()


def test_without_credentials_it_says_which_to_set(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, call in every_call(open_store("s3://x/y"), tmp_path).items():
        with pytest.raises(AccessRefused, match="no usable AWS credentials for s3://x/y") as caught:
            call()
        assert "AWS_PROFILE" in caught.value.hint, name


def test_an_unknown_profile_is_named(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessRefused, match="nobody"):
        open_store(s3_uri).get(Key("a"))


def test_an_endpoint_that_is_no_url_is_bad_input(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(BadInput, match="endpoint is not a url") as caught:
        open_store(s3_uri).get(Key("a"))
    assert caught.value.hint == "check AWS_ENDPOINT_URL"


def test_a_name_that_no_bucket_can_have_is_bad_input(s3_server: S3Server) -> None:
    with pytest.raises(BadInput, match="s3://my bucket is not a usable bucket"):
        open_store("s3://my bucket").get(Key("a"))


def test_a_bucket_without_a_prefix_is_a_store_too(s3_server: S3Server) -> None:
    s3_server.make_bucket("whole-bucket")
    store = open_store("s3://whole-bucket/")
    assert store.uri == "s3://whole-bucket"
    store.put_new(Key("runs/x"), b"here")
    assert keys(store) == ["runs/x"]
    assert store.get(Key("runs/x")) == b"here"


@pytest.mark.parametrize("source", ["environment", "config file"])
def test_another_server_than_aws_is_told_the_bucket_in_the_path_and_sent_no_checksum_trailers(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedS3(OK) as script:
        store = scripted(script, monkeypatch)
        # A name instead of an address: boto3 would ask for the host "bucket.localhost" if it were not told otherwise.
        endpoint = script.endpoint.replace(HOST, "localhost")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        if source == "config file":
            monkeypatch.delenv("AWS_ENDPOINT_URL")
            (tmp_path / "config").write_text(f"[default]\nendpoint_url = {endpoint}\n")
            monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        store.put_new(Key("a"), b"here")
        assert script.requests == [("PUT", "/bucket/prefix/a")]
        assert not [name for name in script.headers[0] if "checksum" in name.lower() or name.lower() == "x-amz-trailer"]


def test_objects_of_other_people_under_names_that_are_no_keys_are_left_alone(s3_server: S3Server, s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.put_new(Key("folder/a"), b"")
    client = boto3.client("s3")  # as a web console does that "creates a folder"
    client.put_object(Bucket=BUCKET, Key=s3_uri.rpartition("/")[2] + "/folder/", Body=b"")
    client.close()
    assert keys(store) == ["folder/a"]


# Server, region, profile and style


def asked(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[str, str]:
    """Path and Authorization of the request that a put makes under these variables. "{}" stands for the endpoint."""
    with ScriptedS3(OK) as script:
        store = scripted(script, monkeypatch)
        for name, value in variables.items():
            monkeypatch.setenv(name, value.replace("{}", script.endpoint.replace(HOST, "localhost")))
        store.put_new(Key("a"), b"here")
        (_, path), headers = script.requests[-1], script.headers[-1]
        return f"{headers['Host'].partition(':')[0]}{path}", headers["Authorization"]


def test_ftjobs_own_endpoint_comes_before_those_of_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    where, _ = asked(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9", FTJOB_S3_ENDPOINT="{}")
    assert where == "localhost/bucket/prefix/a"


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),  # AWS_DEFAULT_REGION of all tests
        ({"AWS_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": "eu-west-3", "FTJOB_S3_REGION": "sa-east-1"}, "sa-east-1"),
    ],
)
def test_the_region_is_ftjobs_own_else_the_one_of_all_programs(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], region: str
) -> None:
    _, signed = asked(monkeypatch, **variables)
    assert f"/{region}/s3/" in signed


@pytest.mark.parametrize(
    ("style", "endpoint", "bucket", "url"),
    [
        ("", "https://minio.example.com:9000", "mine", "https://minio.example.com:9000/mine/a"),
        ("true", "https://minio.example.com:9000", "mine", "https://minio.example.com:9000/mine/a"),
        ("false", "https://minio.example.com:9000", "mine", "https://mine.minio.example.com:9000/a"),
        ("", "", "mine", "https://mine.s3.amazonaws.com/a"),
        ("", "", "my.own", "https://s3.amazonaws.com/my.own/a"),
        ("true", "", "mine", "https://s3.amazonaws.com/mine/a"),
    ],
)
def test_the_bucket_stands_in_the_path_or_in_the_host_name(
    monkeypatch: pytest.MonkeyPatch, style: str, endpoint: str, bucket: str, url: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("FTJOB_S3_PATH_STYLE", style)
    monkeypatch.setenv("FTJOB_S3_ENDPOINT", endpoint)
    with contextlib.closing(make_client(bucket)) as client:
        signed = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "a"})
    assert signed.partition("?")[0] == url


def test_a_style_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="FTJOB_S3_PATH_STYLE is 'maybe'"):
        asked(monkeypatch, FTJOB_S3_PATH_STYLE="maybe")


def test_a_region_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="the S3 region is none"):
        asked(monkeypatch, AWS_REGION="not a region")


def test_ftjobs_own_profile_comes_before_the_keys_of_all_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MYOWNKEY\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    _, signed = asked(monkeypatch, FTJOB_S3_PROFILE="mine")
    assert "Credential=MYOWNKEY/" in signed


# Networks


def test_8_a_dead_endpoint_is_unreachable_within_15_seconds(s3_server: S3Server, s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    store.put_new(Key("a/b"), b"here")
    calls = every_call(store, tmp_path)
    s3_server.cut()

    def timed(name: str) -> float:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="is out of reach") as caught:
            calls[name]()
        assert caught.value.hint == "check the network and AWS_ENDPOINT_URL"
        return time.monotonic() - began

    with ThreadPoolExecutor(len(CALLS)) as pool:
        seconds = dict(zip(CALLS, pool.map(timed, CALLS), strict=True))
    assert max(seconds.values()) < 15, seconds
    s3_server.mend()
    assert store.get(Key("a/b")) == b"here"
    assert not (tmp_path / "got").exists()


@pytest.mark.slow
def test_8_a_host_that_does_not_answer_is_unreachable_within_30_seconds(
    s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A listener that accepts nobody and whose queue is full: further connections get no answer at all.
    with socket.create_server((HOST, 0), backlog=0) as silent:
        address = silent.getsockname()
        waiting = [socket.socket() for _ in range(8)]
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(address)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{address[1]}")
        began = time.monotonic()
        with pytest.raises(Unreachable, match="is out of reach"):
            open_store(s3_uri).get(Key("a"))
        assert 15 < time.monotonic() - began < 30
        for connection in waiting:
            connection.close()


def test_a_connection_that_breaks_once_costs_nothing_but_time(s3_server: S3Server, s3_uri: str, tmp_path: Path) -> None:
    store = open_store(s3_uri)
    data = sealed(3 * MULTIPART_BYTES)
    source = a_file(tmp_path, data)
    counts: list[int] = []

    def broken_once(call: Callable[[], None]) -> None:
        counts.clear()
        before = s3_server.proxy.breaks
        s3_server.proxy.break_after(MULTIPART_BYTES + 100_000)
        call()
        assert s3_server.proxy.breaks == before + 1, "it never broke"
        assert sum(counts) == len(data)

    broken_once(lambda: store.put_file(Key("big"), source, counts.append))
    assert is_whole(store.get(Key("big")))
    broken_once(lambda: store.get_file(Key("big"), tmp_path / "got", counts.append))
    assert is_whole((tmp_path / "got").read_bytes())


def test_1_an_answer_that_breaks_off_is_unreachable_and_never_a_part(
    s3_server: S3Server, s3_uri: str, tmp_path: Path
) -> None:
    store = open_store(s3_uri)
    store.put_file(Key("big"), a_file(tmp_path, sealed(5_000_000)))
    s3_server.proxy.cut_after(1_000_000)
    with pytest.raises(Unreachable):
        store.get(Key("big"))


def test_1_an_upload_that_breaks_off_is_unreachable_and_creates_nothing(
    s3_server: S3Server, s3_uri: str, tmp_path: Path
) -> None:
    store = open_store(s3_uri)
    source = a_file(tmp_path, sealed(2 * MULTIPART_BYTES))
    assert keys(store) == []
    s3_server.proxy.cut_after(MULTIPART_BYTES)
    with pytest.raises(Unreachable):
        store.put_file(Key("big"), source)
    s3_server.mend()
    assert keys(store) == []
    store.put_file(Key("big"), source)
    assert is_whole(store.get(Key("big")))


# Servers


def test_2_an_answer_that_was_lost_is_not_somebody_elses_object(monkeypatch: pytest.MonkeyPatch) -> None:
    # The server has stored the object, its answer is lost, the request is repeated and finds the object there.
    with ScriptedS3(LOST, EXISTS, Answer(200, b"mine")) as script:
        scripted(script, monkeypatch).put_new(Key("a"), b"mine")
        assert [method for method, _ in script.requests] == ["PUT", "PUT", "GET"]
    with ScriptedS3(LOST, EXISTS, Answer(200, b"somebody else's")) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(AlreadyExists):
            store.put_new(Key("a"), b"mine")


def test_2_a_conflict_with_a_racer_is_tried_again_until_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    conflict = Answer.error(409, "ConditionalRequestConflict")
    with ScriptedS3(conflict, conflict, OK) as script:
        scripted(script, monkeypatch).put_new(Key("a"), b"mine")
        assert len(script.requests) == 3
    with ScriptedS3(conflict) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(Unreachable, match="ConditionalRequestConflict"):
            store.put_new(Key("a"), b"mine")


def test_2_an_object_deleted_while_it_is_compared_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedS3(EXISTS, Answer.error(404, "NoSuchKey")) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(Unreachable, match="vanished while it was created"):
            store.put_new(Key("a"), b"mine")


@pytest.mark.parametrize(
    ("answer", "error", "said", "hint"),
    [
        (Answer.error(403, "AccessDenied"), AccessRefused, "s3:GetObject is not allowed", "allow s3:GetObject in"),
        (Answer.error(403, "AccountProblem"), AccessRefused, "AccountProblem: as scripted", "other credentials"),
        (Answer.error(401, "Unauthorized"), AccessRefused, "s3:GetObject is not allowed", "other credentials"),
        (Answer.error(403, "InvalidAccessKeyId"), AccessRefused, "knows no such access key", "AWS_ACCESS_KEY_ID"),
        (Answer.error(403, "SignatureDoesNotMatch"), AccessRefused, "the secret key is not", "AWS_SECRET_ACCESS_KEY"),
        (Answer.error(400, "ExpiredToken"), AccessRefused, "have expired", "aws sso login"),
        (Answer.error(400, "InvalidToken"), AccessRefused, "the session token does not", "AWS_SESSION_TOKEN"),
        (Answer.error(403, "RequestTimeTooSkewed"), AccessRefused, "this machine's clock", "set this machine's clock"),
        (Answer.error(400, "InvalidArgument"), AccessRefused, "InvalidArgument", "the same again"),
        (Answer.error(405, "MethodNotAllowed"), AccessRefused, "MethodNotAllowed", "the same again"),
        (Answer.error(501, "NotImplemented"), AccessRefused, "NotImplemented", "use another one"),
        (Answer.error(404, "NoSuchKey"), NotFound, "s3://bucket/prefix/a does not exist", ""),
        (Answer.error(404, "NoSuchBucket"), AccessRefused, "bucket bucket does not exist", "aws s3 mb s3://bucket"),
        (Answer.error(507, "InsufficientStorage"), Unreachable, "InsufficientStorage", ""),
        (Answer(301), Garbled, "does not answer as S3 servers do", "http or https?"),
        (Answer(302), Garbled, "does not answer as S3 servers do", "login"),
        (
            Answer(400, b"<Error><Code>PermanentRedirect</Code><Endpoint>there.example.com</Endpoint></Error>"),
            AccessRefused,
            "will not answer there and sends on to there.example.com",
            "AWS_ENDPOINT_URL",
        ),
        (
            Answer(400, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"),
            AccessRefused,
            "bucket bucket lies in region eu-west-3",
            "AWS_REGION=eu-west-3",
        ),
    ],
)
def test_7_what_a_server_refuses_is_told_apart_and_tells_whether_trying_again_may_help(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, error: type[FtjobError], said: str, hint: str
) -> None:
    with ScriptedS3(answer) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(error) as caught:
            store.get(Key("a"))
    assert type(caught.value) is error
    assert said in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("status", "code"), [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (404, "NoSuchBucket"), (404, "NoSuchKey")]
)
def test_7_a_download_says_as_much_as_a_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str
) -> None:
    with ScriptedS3(Answer.error(status, code)) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(StorageError) as whole:
            store.get(Key("a"))
        with pytest.raises(StorageError) as caught:
            store.get_file(Key("a"), tmp_path / "got")
    assert (type(caught.value), str(caught.value)) == (type(whole.value), str(whole.value))


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("put_new", "s3:PutObject"),
        ("put_file", "s3:PutObject"),
        ("get_file", "s3:GetObject"),
        ("list", "s3:ListBucket"),
        ("delete", "s3:DeleteObject"),
    ],
)
def test_7_what_is_not_allowed_is_named_as_policies_name_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, action: str
) -> None:
    with ScriptedS3(Answer.error(403, "AccessDenied")) as script:
        call = every_call(scripted(script, monkeypatch), tmp_path)[name]
        with pytest.raises(AccessRefused, match=f"at {script.endpoint}: {action} is not allowed"):
            call()


def test_7_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedS3(Answer.error(503, "SlowDown"), Answer(500), Answer(200, b"here")) as script:
        assert scripted(script, monkeypatch).get(Key("a")) == b"here"
        assert len(script.requests) == 3


@pytest.mark.slow
def test_7_a_busy_server_is_unreachable_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedS3(Answer.error(503, "SlowDown")) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(Unreachable, match="SlowDown"):
            store.get(Key("a"))
        assert len(script.requests) == 4


@pytest.mark.parametrize("body", [b"", b"Please log in to this network", b"<html><p>Please log in", b"<html></html>"])
@pytest.mark.parametrize("status", [200, 404, 500])
def test_7_an_answer_that_is_not_s3s_is_no_empty_listing(
    monkeypatch: pytest.MonkeyPatch, status: int, body: bytes
) -> None:
    with ScriptedS3(Answer(status, body)) as script:
        store = scripted(script, monkeypatch)
        with pytest.raises(Unreachable, match="s3://bucket/prefix") as caught:
            list(store.list(""))
        # botocore makes a 500 of a listing that cannot be read at all.
        assert isinstance(caught.value, Garbled) == (
            status == 404 or (status == 200 and body in (b"", b"<html></html>"))
        )


def test_opening_a_store_contacts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedS3(OK) as script:
        store = scripted(script, monkeypatch)
        assert script.requests == []
        store.delete(Key("a"))
        assert script.requests == [("DELETE", "/bucket/prefix/a")]
