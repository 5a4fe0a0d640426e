"""Stores: objects under keys, in a folder (file://) or a bucket (s3://). The one place that speaks to them.

What every store promises (one contract test holds all of them to it):

1.  An object is whole or absent. A reader never sees a part of it, whatever dies while it is written.
2.  `put_new` creates and never replaces: of any number of racers one creates, the others get AlreadyExists.
    Creating the same bytes again is not an error, because an answer can be lost on its way and the request repeated;
    whoever needs a single winner puts something of its own (a nonce) into the bytes.
3.  `put_file` is for keys that only one writer ever uses; the last writer wins.
4.  What a returned `put` wrote, every later `get` and `list` sees, also after a crash of the machine or the server.
5.  `list` is sorted by key and holds no object that is still being written.
6.  `delete` of what is not there is not an error.
7.  Errors are StorageError's, and tell "trying again may help" (Unreachable) from "it will not" (AccessRefused).

Not relied on: If-Match, conditional completion of multipart uploads, conditional deletes, checksums checked by the
server. S3-compatible servers differ there; `If-None-Match: *` on a single PUT is what AWS, Ceph and moto all honour.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote, urlsplit

from job.contract.errors import AccessRefused, AlreadyExists, BadInput, NotFound, StorageError, Unreachable
from job.contract.layout import Key, Uri

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Progress = Callable[[int], None]
"""Called with the number of bytes moved since the last call; from any thread, never from two at once."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing. `size` in bytes, `modified` in UTC by the store's clock."""

    key: Key
    size: int
    modified: datetime


class Store(Protocol):
    """Objects under keys. Safe to use from several threads."""

    @property
    def uri(self) -> Uri:
        """Where it is, as people write it."""
        ...

    def put_new(self, key: Key, data: bytes) -> None:
        """Create an object. Raises AlreadyExists if the key holds other bytes."""
        ...

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        """Write a file's bytes under a key that nobody else writes."""
        ...

    def get(self, key: Key) -> bytes:
        """An object's bytes. Raises NotFound."""
        ...

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        """Write an object's bytes to a file (whole or not at all). Raises NotFound."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose key starts with `prefix` and sorts behind `after`, by key."""
        ...

    def delete(self, key: Key) -> None:
        """Remove an object, if it is there."""
        ...


def open_store(uri: str) -> Store:
    """The store at a uri. Opening contacts nobody.

    Raises:
        BadInput: the uri is neither s3://bucket[/prefix] nor file:///folder.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(bucket=parts.netloc, prefix=parts.path.strip("/"))
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileStore(Path(unquote(parts.path)))
    raise BadInput(f"{uri!r} is not a place to store things", hint="use s3://bucket/prefix or file:///folder")


def open_object(uri: str) -> tuple[Store, Key]:
    """The store and key of a single object's uri.

    Raises:
        BadInput: the uri does not name an object.
    """
    folder, _, name = uri.rpartition("/")
    if not name or not urlsplit(uri).path.strip("/"):
        raise BadInput(f"{uri!r} does not name a file", hint="use s3://bucket/folder/rows.jsonl or file:///rows.jsonl")
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return open_store(folder if urlsplit(folder).path else folder + "/"), Key(unquote(name))
    return open_store(folder), Key(name)


def check_key(key: str) -> PurePosixPath:
    """The key as a relative path. Raises ValueError where it could leave its store."""
    path = PurePosixPath(key)
    if not key or key.startswith("/") or "\\" in key or "\0" in key or key != str(path) or ".." in path.parts:
        raise ValueError(f"{key!r} is not a key")
    return path


class _Meter:
    """Passes counts on under a lock: boto3 calls back from several threads."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._progress(count)


# ---------------------------------------------------------------------------------------------------- file://

_STAGING: Final = ".ftjob-staging"
_COPY_CHUNK: Final = 1024 * 1024


class FileStore:
    """A folder. Objects are written aside, flushed to the disk, and moved into place by link(2) or rename(2)."""

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()

    @property
    def uri(self) -> Uri:
        return Uri(self._root.as_uri())

    def put_new(self, key: Key, data: bytes) -> None:
        target = self._path(key)
        with _file_errors(key), self._staged(target) as staged:
            with staged.open("wb") as file:
                file.write(data)
                _flush(file.fileno())
            try:
                # link(2) fails when the name exists, on every POSIX file system that has links: create-only, atomic.
                os.link(staged, target)
            except FileExistsError:
                if target.read_bytes() != data:
                    raise AlreadyExists(f"{self.uri}/{key} exists already") from None
            _flush_folder(target.parent)

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        target = self._path(key)
        with _file_errors(key), self._staged(target) as staged:
            _copy(path, staged, progress)
            staged.replace(target)
            _flush_folder(target.parent)

    def get(self, key: Key) -> bytes:
        with _file_errors(key, reading=True):
            return self._path(key).read_bytes()

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        source = self._path(key)
        with _file_errors(key, reading=True):
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                _copy(source, partial, progress)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
        with _file_errors(prefix):
            # Only the folder that the prefix names is walked, not the whole store.
            start = self._root / PurePosixPath(prefix).parent if not prefix.endswith("/") else self._root / prefix
            found = [key for key in self._walk(start) if key.startswith(prefix) and key > after]
        for key in sorted(found):
            try:
                stat = (self._root / key).stat()
            except FileNotFoundError:
                continue  # deleted since the walk
            yield ObjectInfo(Key(key), stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def delete(self, key: Key) -> None:
        path = self._path(key)
        with _file_errors(key):
            path.unlink(missing_ok=True)
            # Empty folders are not objects; removing them keeps the bucket readable to people.
            for folder in path.parents:
                if folder == self._root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def _walk(self, start: Path) -> Iterator[str]:
        for folder, folders, files in os.walk(start):
            if _STAGING in folders:
                folders.remove(_STAGING)
            for name in files:
                yield (Path(folder) / name).relative_to(self._root).as_posix()

    def _path(self, key: Key) -> Path:
        return self._root / check_key(key)

    @contextlib.contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        staging = self._root / _STAGING
        staging.mkdir(parents=True, exist_ok=True)
        staged = staging / uuid.uuid4().hex
        try:
            _make_parents(target)
            yield staged
        except FileNotFoundError:
            # A concurrent delete may remove the empty folder between making and using it: say "try again".
            raise Unreachable(f"the folder of {target} vanished while it was written") from None
        finally:
            staged.unlink(missing_ok=True)


def _make_parents(target: Path) -> None:
    missing = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_folder(folder.parent)


def _copy(source: Path, target: Path, progress: Progress | None) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_COPY_CHUNK):
            writer.write(chunk)
            if progress is not None:
                progress(len(chunk))
        _flush(writer.fileno())


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    # A rename survives a power cut only once the folder itself is on the disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _file_errors(key: str, *, reading: bool = False) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _translate_os_error(error, key, reading=reading) from error


def _translate_os_error(error: OSError, key: str, *, reading: bool) -> StorageError:
    if reading and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{key} does not exist")
    what = f"{key}: {error.strerror or error} ({error.filename})" if error.filename else f"{key}: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unreachable(f"no space left for {what}", hint="free some space; writing is tried again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessRefused(f"not allowed to use {what}", hint="check the folder's owner and permissions")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return AccessRefused(f"cannot use {what}", hint="choose another folder")
    return Unreachable(what)


# ------------------------------------------------------------------------------------------------------ s3://

MULTIPART_BYTES: Final = 8 * 1024 * 1024
"""From this size on an upload goes in parts, so that a broken connection costs one part (boto3's default)."""

_REFUSED: Final = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}
)
_MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})


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
            try:
                self._client().put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
            except self._client().exceptions.ClientError as error:
                if _code(error) not in {"PreconditionFailed", "412"}:
                    raise  # 409 ConditionalRequestConflict is Unreachable: the caller tries again
                if self.get(key) != data:
                    raise AlreadyExists(f"{self.uri}/{key} exists already") from None

    def put_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        with self._errors(key):
            self._client().upload_file(
                str(path),
                self._bucket,
                self._name(key),
                Config=_transfer_config(),
                Callback=_Meter(progress) if progress else None,
            )

    def get(self, key: Key) -> bytes:
        with self._errors(key):
            return self._client().get_object(Bucket=self._bucket, Key=self._name(key))["Body"].read()

    def get_file(self, key: Key, path: Path, progress: Progress | None = None) -> None:
        # boto3 downloads to a temporary name beside the target and renames it: whole or not at all.
        with self._errors(key):
            self._client().download_file(
                self._bucket,
                self._name(key),
                str(path),
                Config=_transfer_config(),
                Callback=_Meter(progress) if progress else None,
            )

    def list(self, prefix: str, *, after: str = "") -> Iterator[ObjectInfo]:
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
                for item in page.get("Contents", ()):
                    key = Key(item["Key"].removeprefix(self._prefix))
                    yield ObjectInfo(key, item["Size"], item["LastModified"].astimezone(UTC))

    def delete(self, key: Key) -> None:
        with self._errors(key):
            self._client().delete_object(Bucket=self._bucket, Key=self._name(key))

    def _name(self, key: Key) -> str:
        return f"{self._prefix}{check_key(key)}"

    def _client(self) -> S3Client:
        # boto3 clients may be shared between threads; sessions may not, and making one costs 0.2 s.
        with self._lock:
            if self._made is None:
                self._made = _make_client(self._bucket)
            return self._made

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        import boto3.exceptions as transfer
        import botocore.exceptions as core

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
        except (core.BotoCoreError, transfer.Boto3Error, OSError) as error:
            raise Unreachable(
                f"{self.uri}/{key} is out of reach: {error}", hint="check the network and AWS_ENDPOINT_URL"
            ) from error

    def _translate(self, error: Any, key: str) -> StorageError | BadInput:
        code = _code(error)
        if code == "NoSuchBucket":
            return AccessRefused(
                f"bucket {self._bucket} does not exist", hint="create it, or correct the bucket's name"
            )
        if code in _MISSING:
            return NotFound(f"{self.uri}/{key} does not exist")
        if code in _REFUSED:
            return AccessRefused(f"{self.uri}/{key}: {error}", hint="check the credentials and the bucket's policy")
        return Unreachable(f"{self.uri}/{key}: {error}")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _make_client(bucket: str) -> S3Client:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    custom = bool(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))
    return session.client(
        "s3",
        config=Config(
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=16,
            # Bucket names as host names need a DNS that S3-compatible servers seldom have.
            s3={"addressing_style": "path"} if custom or "." in bucket else {},
            user_agent_extra="ftjob",
        ),
    )


def _transfer_config() -> Any:
    from boto3.s3.transfer import TransferConfig

    # "classic": the CRT client fails against servers on the loopback interface.
    return TransferConfig(
        multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES, preferred_transfer_client="classic"
    )


# ------------------------------------------------------------------------------------------------ both of them


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder that exists."""
    return shutil.disk_usage(folder).free
