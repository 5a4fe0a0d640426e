"""A base model on the hub, through huggingface_hub: its commit's files, in Hugging Face's own cache.

What huggingface_hub does: it keeps what came of a file as blobs/<etag>.incomplete, and asks for the rest of it (HTTP
Range) the next time; files of the hub's newer storage come through hf_xet, faster, and begin anew when a process was
killed in the middle of one. Layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

from job.contract.base_model import HUB, hub_refusal, is_commit, model_files
from job.contract.errors import FtjobError, ModelInvalid, Unreachable
from job.contract.recipe import BaseModelRef
from job.contract.records import FileDigest
from job.download import Remote
from job.storage import Progress
from job.storage.store import translate_os_error

_SILENCE_SECONDS: Final = 30.0


class HubFiles:
    """The files of one commit.

    Args:
        listing: a local file that remembers the commit's files: an attempt that has them all needs no hub.
    """

    at_once: Final = 8

    def __init__(self, ref: BaseModelRef, *, listing: Path) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        self._ref = ref
        self._listing = listing
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
        self._cache = Path(os.environ.get("HF_HUB_CACHE") or HF_HUB_CACHE)
        self._model = self._cache / f"models--{ref.id.replace('/', '--')}"
        self._commit = ref.revision or "main"

    @property
    def folder(self) -> Path:
        return self._model / "snapshots" / self._commit

    def files(self) -> list[Remote]:
        if is_commit(self._ref.revision) and (known := _read(self._listing)):
            return known
        listed = self._ask()
        self._listing.parent.mkdir(parents=True, exist_ok=True)
        written = self._listing.with_suffix(".new")
        written.write_text(json.dumps([asdict(file) for file in listed]), encoding="utf-8")
        written.replace(self._listing)
        return listed

    def _ask(self) -> list[Remote]:
        from huggingface_hub import HfApi

        with self._errors():
            info = HfApi(endpoint=self._endpoint).model_info(
                self._ref.id, revision=self._commit, files_metadata=True, timeout=_SILENCE_SECONDS
            )
        self._commit = str(info.sha)
        listed = {file.rfilename: file for file in info.siblings or ()}
        chosen = model_files(listed, where=f"{self._ref.id} at revision {self._commit}")
        return [_remote(listed[name]) for name in chosen]

    def missing(self, file: Remote) -> int:
        if (self.folder / file.name).exists():
            return 0
        incomplete = self._model / "blobs" / f"{file.version}.incomplete"
        return max(file.size - incomplete.stat().st_size, 0) if incomplete.exists() else file.size

    def fetch(self, file: Remote, progress: Progress, *, again: bool) -> Path:
        from huggingface_hub import hf_hub_download

        with self._errors():
            return Path(
                hf_hub_download(
                    self._ref.id,
                    file.name,
                    revision=self._commit,
                    cache_dir=self._cache,
                    endpoint=self._endpoint,
                    force_download=again,
                    tqdm_class=cast(Any, partial(_Bar, progress)),
                )
            )

    def accepts(self, file: Remote, path: Path, digest: FileDigest) -> bool:
        if len(file.version) == 64:
            return digest.sha256 == file.version
        # Small files are kept in git, which names them by the sha1 of a header and their bytes.
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.version

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except FtjobError:
            raise
        # RuntimeError is what hf_xet raises for whatever the network does to it.
        except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> FtjobError:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        while isinstance(error, FileNotFoundError | ValueError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # "cannot find the file in the cache": why it could not be asked for is behind it
        if isinstance(error, HfHubHTTPError):
            answer = error.response
            refusal = hub_refusal(
                self._ref.id,
                self._ref.revision,
                endpoint=self._endpoint,
                status=answer.status_code,
                code=answer.headers.get("X-Error-Code", ""),
                message=answer.headers.get("X-Error-Message", ""),
                token=get_token() is not None,
            )
            # Storage behind the hub refuses a link that has become old; the next try gets a new one.
            if refusal is not None and answer.url.host == urlsplit(self._endpoint).hostname:
                return refusal
        elif isinstance(error, ValueError):
            return ModelInvalid(f"base model {self._ref.id} cannot be downloaded: {error}")
        elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            return translate_os_error(error, str(self._cache))
        return Unreachable(
            f"base model {self._ref.id} cannot be downloaded from {self._endpoint} for now: {error}",
            hint="check the network and HF_ENDPOINT",
        )


class _Bar:
    """What huggingface_hub takes for a tqdm bar: it is told how much of one file has come."""

    def __init__(self, heard: Progress, *_: Any, initial: float = 0, **__: Any) -> None:
        self._heard = heard
        self.update(initial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is drawn, so nothing is to be cleared."""

    def update(self, count: float | None = 1) -> None:
        self._heard(int(count or 0))


def _read(listing: Path) -> list[Remote]:
    """What is remembered of a commit's files; nothing, where that cannot be read: the hub is asked again then."""
    try:
        return [Remote(**file) for file in json.loads(listing.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _remote(file: Any) -> Remote:
    large = file.lfs
    if large is not None:
        return Remote(file.rfilename, int(large.size), str(large.sha256))
    return Remote(file.rfilename, int(file.size or 0), str(file.blob_id))
