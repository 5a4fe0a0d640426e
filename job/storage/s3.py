"""s3://: a bucket, or a prefix of one, as a store. boto3 is imported when the first request is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from job.contract.errors import AccessRefused, AlreadyExists, BadInput, NotFound, StorageError, Unreachable
from job.contract.layout import Key, Uri
from job.storage.store import ObjectInfo, Progress, check_key, check_prefix, translate_os_error

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MULTIPART_BYTES: Final = 8 * 1024 * 1024
"""From this size on an upload goes in parts, so that a broken connection costs one part (boto3's default)."""

_ATTEMPTS: Final = 4
"""Of one request. The pauses between them are random, up to 1 + 2 + 4 = 7 s (botocore's "standard" mode)."""

_CONNECT_SECONDS: Final = 5
"""Four attempts at a host that does not answer: 20 s and the pauses. Whoever wants to wait longer calls again."""

_READ_SECONDS: Final = 30
"""Longest silence of a server that has taken a request."""

_CONFLICT_TRIES: Final = 10

# Refusals by code where the status (400) would not tell; the others are told by 401 and 403.
_REFUSED: Final = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_EXISTS: Final = frozenset({"PreconditionFailed", "412"})
_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429})
_TRANSIENT: Final = frozenset({"RequestTimeout", "SlowDown", "Throttling", "IncompleteBody", "BadDigest"})


class S3Store:
    """A bucket, or a prefix of one, through boto3.

    Endpoint, region, profile and credentials come from where AWS's own tools take them (AWS_ENDPOINT_URL[_S3],
    AWS_REGION, AWS_PROFILE, the credentials file, the machine's role), so a store needs no settings of its own.
    """

    def __init__(self, *, bucket: str, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._made: S3Client | None = None

    @property
    def uri(self) -> Uri:
        return Uri(f"s3://{self._bucket}/{self._prefix}".rstrip("/"))

    def put_new(self, key: Key, data: bytes) -> None:
        name = self._name(key)
        with self._errors(key):
            for left in reversed(range(_CONFLICT_TRIES)):
                try:
                    self._client().put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
                    return
                except self._client().exceptions.ClientError as error:
                    # 409: another racer's put is under way, and may fail yet; AWS asks to put again.
                    if _code(error) == "ConditionalRequestConflict" and left:
                        continue
                    if _code(error) not in _EXISTS:
                        raise
                break
            try:
                found = self.get(key)
            except NotFound:
                raise Unreachable(f"{self.uri}/{key} vanished while it was created") from None
            if found != data:
                raise AlreadyExists(f"{self.uri}/{key} exists already")

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        name = self._name(key)
        with self._errors(key, path):
            self._client().upload_file(
                str(path),
                self._bucket,
                name,
                Config=_transfer_config(),
                Callback=_Meter(progress) if progress else None,
            )

    def get(self, key: Key) -> bytes:
        name = self._name(key)
        with self._errors(key):
            return self._client().get_object(Bucket=self._bucket, Key=name)["Body"].read()

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        name = self._name(key)
        # boto3 downloads to a temporary name beside the target and renames it: whole or not at all.
        with self._errors(key, path):
            try:
                self._client().download_file(
                    self._bucket,
                    name,
                    str(path),
                    Config=_transfer_config(),
                    Callback=_Meter(progress) if progress else None,
                )
            except self._client().exceptions.ClientError as error:
                if _code(error) in _MISSING:
                    # boto3 asked by HEAD, whose answer has no body to say whether key or bucket is missing.
                    self._client().get_object(Bucket=self._bucket, Key=name, Range="bytes=0-0")["Body"].close()
                raise

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._errors(prefix):
            pages = (
                self._client()
                .get_paginator("list_objects_v2")
                .paginate(
                    Bucket=self._bucket,
                    Prefix=self._prefix + prefix,
                    StartAfter=self._prefix + after if after else "",
                )
            )
            for page in pages:
                if "IsTruncated" not in page:
                    # Whatever that was, it was no listing, and must not be taken for an empty one.
                    raise Unreachable(f"{self.uri}/{prefix}: the server answered with something that is no listing")
                for item in page.get("Contents", ()):
                    key = Key(item["Key"].removeprefix(self._prefix))
                    with contextlib.suppress(ValueError):  # other people's objects, such as the consoles' "folder/"
                        check_key(key)
                        yield ObjectInfo(key, item["Size"], item["LastModified"].astimezone(UTC))

    def delete(self, key: Key) -> None:
        name = self._name(key)
        with self._errors(key):
            self._client().delete_object(Bucket=self._bucket, Key=name)

    def _name(self, key: Key) -> str:
        return f"{self._prefix}{check_key(key)}"

    def _client(self) -> S3Client:
        # boto3 clients may be shared between threads; sessions may not, and making one costs 0.2 s.
        with self._lock:
            if self._made is None:
                self._made = _make_client(self._bucket)
            return self._made

    @contextlib.contextmanager
    def _errors(self, key: str, path: Path | None = None) -> Iterator[None]:
        """Errors of the server, the network, and of the caller's own file at `path`."""
        import boto3.exceptions as transfer
        import botocore.exceptions as core
        from botocore.parsers import ResponseParserError

        try:
            yield
        except core.ClientError as error:
            raise self._translate(error, key) from error
        except (core.NoCredentialsError, core.PartialCredentialsError, core.CredentialRetrievalError) as error:
            raise AccessRefused(
                f"no usable AWS credentials for {self.uri}: {error}",
                hint="set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
            ) from error
        except core.ProfileNotFound as error:
            raise AccessRefused(
                str(error), hint="`aws configure list-profiles` shows the profiles there are"
            ) from error
        except core.ParamValidationError as error:
            raise BadInput(f"{self.uri} is not a usable bucket: {error}") from error
        except transfer.S3UploadFailedError as error:
            cause = error.__context__
            if isinstance(cause, core.ClientError):
                raise self._translate(cause, key) from error
            raise Unreachable(f"{self.uri}/{key}: {error}") from error
        except (core.BotoCoreError, transfer.Boto3Error, ResponseParserError) as error:
            raise Unreachable(
                f"{self.uri}/{key} is out of reach: {error}", hint="check the network and AWS_ENDPOINT_URL"
            ) from error
        except OSError as error:
            # boto3 wraps what the network says, so this is about a file.
            if isinstance(error, FileNotFoundError) and path is not None:
                raise
            raise translate_os_error(error, str(path or key)) from error

    def _translate(self, error: Any, key: str) -> StorageError:
        code = _code(error)
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        what = f"{self.uri}/{key}"
        if code == "NoSuchBucket":
            return AccessRefused(
                f"bucket {self._bucket} does not exist", hint="create it, or correct the bucket's name"
            )
        if code in _MISSING:
            return NotFound(f"{what} does not exist")
        if code == "RequestTimeTooSkewed":
            return AccessRefused(f"{what}: {error}", hint="set this machine's clock")
        if status in (401, 403) or code in _REFUSED:
            return AccessRefused(f"{what}: {error}", hint="check the credentials and the bucket's policy")
        if status == 501:
            return AccessRefused(f"{what}: {error}", hint="this server lacks what ftjob needs; use another one")
        if 400 <= status < 500 and status not in _TRANSIENT_STATUS and code not in _TRANSIENT:
            return AccessRefused(f"{what}: {error}", hint="the server would answer the same again")
        return Unreachable(f"{what}: {error}")


class _Meter:
    """Passes counts on under a lock: boto3 calls back from several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._progress(count)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _make_client(bucket: str) -> S3Client:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        max_pool_connections=16,
        user_agent_extra="ftjob",
    )
    session = boto3.session.Session()
    try:
        client = session.client("s3", config=config)
    except ValueError as error:
        raise BadInput(f"the S3 endpoint is not a url: {error}", hint="check AWS_ENDPOINT_URL") from error
    endpoint = urlsplit(client.meta.endpoint_url).hostname or ""
    if ".amazonaws.com" in endpoint and "." not in bucket:
        return client
    # Bucket names as host names need a DNS that S3-compatible servers seldom have, and a certificate for every level.
    config = config.merge(Config(s3={"addressing_style": "path"}))
    if ".amazonaws.com" not in endpoint:
        # Many of them refuse the checksum trailers that boto3 sends since 1.36. Ours are in the manifests.
        config = config.merge(
            Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        )
    return session.client("s3", config=config)


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    # "classic": the CRT client fails against servers on the loopback interface.
    return TransferConfig(
        multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, preferred_transfer_client="classic"
    )
