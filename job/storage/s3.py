"""s3://: a bucket, or a prefix of one, as a store. boto3 is imported when the first request is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job.contract.errors import AlreadyExists, NotFound, Unreachable
from job.contract.layout import Key, Uri
from job.storage.s3_account import make_client
from job.storage.s3_errors import EXISTS, MISSING, Place, account_errors, code_of, garbled, s3_errors
from job.storage.store import ObjectInfo, Progress, check_key, check_prefix

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MULTIPART_BYTES: Final = 8 * 1024 * 1024
"""From this size on an upload goes in parts, so that a broken connection costs one part (boto3's default)."""

_CONFLICT_TRIES: Final = 10

_UNEXPLAINED: Final = frozenset({"301", "400", "401", "403", *MISSING})
"""Codes of answers without a body, made of the status."""


class S3Store:
    """A bucket, or a prefix of one, through boto3.

    Endpoint, region, profile and credentials come from FTJOB_S3_*, and from where AWS's own tools take them
    (AWS_ENDPOINT_URL[_S3], AWS_REGION, AWS_PROFILE, the credentials file, the machine's role).
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
                    if code_of(error) == "ConditionalRequestConflict" and left:
                        continue
                    if code_of(error) not in EXISTS:
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
                if code_of(error) in _UNEXPLAINED:
                    # Older versions of boto3 ask by HEAD, whose answer has no body to say what is missing or wrong.
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
                    raise garbled(self._place(prefix))
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
                self._made = make_client(self._bucket)
            return self._made

    def _errors(self, key: str, path: Path | None = None) -> contextlib.AbstractContextManager[None]:
        """Errors of the account, the server, the network, and of the caller's own file at `path`."""
        return s3_errors(self._place(key), path)

    def _place(self, key: str) -> Place:
        with account_errors(self.uri):
            return Place(self.uri, key, self._client().meta.endpoint_url)


class _Meter:
    """Passes counts on under a lock: boto3 calls back from several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._progress(count)


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    # "classic": the CRT client fails against servers on the loopback interface.
    return TransferConfig(
        multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, preferred_transfer_client="classic"
    )
