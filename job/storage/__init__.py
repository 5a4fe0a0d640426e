"""Stores: objects under keys, in a folder (file://) or a bucket (s3://). The one place that speaks to them.

What every store promises (one contract test holds all of them to it):

1.  An object is whole or absent. A reader never sees a part of it, whatever dies while it is written.
2.  `put_new` creates and never replaces: of any number of racers one creates, the others get AlreadyExists.
    Creating the same bytes again is not an error, because an answer can be lost on its way and the request repeated;
    whoever needs a single winner puts something of its own (a nonce) into the bytes.
3.  `put_file` is for keys that only one writer ever uses; the last writer wins.
4.  What a returned `put` wrote, every later `get` and `list` sees, also after a crash of the machine or the server.
5.  `list` is sorted by key and holds no object that is still being written. It is whole or an error: what could not
    be asked is never left out in silence.
6.  `delete` of what is not there is not an error.
7.  Errors are StorageError's, and tell "trying again may help" (Unreachable) from "it will not" (AccessRefused).
    Outside of that: BadInput for a bucket name or endpoint that cannot be one; ValueError for a key that is none, and
    FileNotFoundError for a `path` (or its folder) that is not there: both are the caller's mistake.
8.  A call ends. With a dead endpoint (connection refused) it raises Unreachable within 8 s, with a silent one (no
    answer to the connection) within 30 s, with one that connects and then says nothing within some two minutes.

Not relied on: If-Match, conditional completion of multipart uploads, conditional deletes, checksums checked by the
server. S3-compatible servers differ there; `If-None-Match: *` on a single PUT is what AWS, Ceph and moto all honour.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.contract.errors import BadInput
from job.contract.layout import Key
from job.storage.file import FileStore
from job.storage.s3 import MULTIPART_BYTES, S3Store
from job.storage.store import ObjectInfo, Progress, Store, check_key

__all__ = [
    "MULTIPART_BYTES",
    "FileStore",
    "ObjectInfo",
    "Progress",
    "S3Store",
    "Store",
    "check_key",
    "open_object",
    "open_store",
]


def open_store(uri: str) -> Store:
    """The store at a uri. Opening contacts nobody.

    Raises:
        BadInput: the uri is neither s3://bucket[/prefix] nor file:///folder.
    """
    try:
        scheme, netloc, path, query, fragment = urlsplit(uri)
    except ValueError:
        scheme = netloc = path = query = fragment = ""
    if scheme == "s3" and netloc:
        # By hand: to urlsplit "#" and "?" end the path, in a bucket they are letters like others.
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        prefix = prefix.rstrip("/")
        if not prefix or all(prefix.split("/")):
            return S3Store(bucket=bucket, prefix=prefix)
    if scheme == "file" and netloc in ("", "localhost") and path.startswith("/") and not query and not fragment:
        return FileStore(Path(unquote(path)))
    raise BadInput(f"{uri!r} is not a place to store things", hint="use s3://bucket/prefix or file:///folder")


def open_object(uri: str) -> tuple[Store, Key]:
    """The store and key of a single object's uri.

    Raises:
        BadInput: the uri does not name an object.
    """
    folder, _, name = uri.rpartition("/")
    try:
        open_store(uri)  # the whole must be well-formed, not only the folder: "#" could hide in the name
        is_file = urlsplit(uri).scheme == "file"
        key = check_key(unquote(name) if is_file else name)
        # "file:///rows" stands in the root folder, whose own uri keeps its slash; "s3://bucket" is no object.
        store = open_store(folder + "/" if folder == "file://" else folder)
    except (ValueError, BadInput):
        raise BadInput(
            f"{uri!r} does not name a file", hint="use s3://bucket/folder/rows.jsonl or file:///folder/rows.jsonl"
        ) from None
    return store, Key(str(key))
