"""A base model in a bucket of the person's own: its files, copied into a folder of this machine."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from job.contract.base_model import model_files
from job.contract.errors import ModelInvalid, NotFound
from job.contract.layout import Key
from job.contract.recipe import BaseModelRef
from job.contract.records import FileDigest, utc
from job.download import Remote
from job.storage import Progress, open_store

_KNOWN: Final = ".ftjob-known.json"


class _Copy(BaseModel):
    """A file as it was copied. Listings have no digest, so it counts as the same while size and time do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    version: str
    sha256: str


class BucketFiles:
    """The files of one prefix.

    Args:
        folder: for the copies, and for what is known of them, so that the next attempt copies nothing twice.
    """

    # boto3 fetches the parts of each file in ten threads of its own.
    at_once: Final = 2

    def __init__(self, ref: BaseModelRef, *, folder: Path) -> None:
        self._ref = ref
        self._store = open_store(ref.id)
        self._folder = folder
        self._known = _read(folder / _KNOWN)
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        return self._folder

    def files(self) -> list[Remote]:
        listed = {str(info.key): info for info in self._store.list("")}
        chosen = model_files(listed, where=self._ref.id)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep({*chosen, _KNOWN})
        return [Remote(name, listed[name].size, utc(listed[name].modified)) for name in chosen]

    def missing(self, file: Remote) -> int:
        return 0 if self._has(file) else file.size

    def fetch(self, file: Remote, progress: Progress, *, again: bool) -> Path:
        path = self._folder / file.name
        if again or not self._has(file):
            with self._lock:
                self._known.pop(file.name, None)
            try:
                self._store.get_file(Key(file.name), path, progress)
            except NotFound as error:
                raise ModelInvalid(f"base model {self._ref.id} has lost its {file.name}", hint="put it back") from error
        return path

    def accepts(self, file: Remote, path: Path, digest: FileDigest) -> bool:
        """Whether it is whole; and, when it was here already, what it was when it came."""
        with self._lock:
            known = self._known.setdefault(file.name, _Copy(size=file.size, version=file.version, sha256=digest.sha256))
            right = digest.size == file.size and digest.sha256 == known.sha256
            if not right:
                del self._known[file.name]
            self._write_known()
        return right

    def _has(self, file: Remote) -> bool:
        known = self._known.get(file.name)
        here = known is not None and (known.size, known.version) == (file.size, file.version)
        return here and (self._folder / file.name).is_file()

    def _write_known(self) -> None:
        written = self._folder / f"{_KNOWN}.new"
        written.write_text(json.dumps({name: copy.model_dump() for name, copy in self._known.items()}))
        written.replace(self._folder / _KNOWN)

    def _sweep(self, keep: set[str]) -> None:
        """Remove what is no file of the model any more, and what a killed attempt left of one."""
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink()


def _read(path: Path) -> dict[str, _Copy]:
    """What is known of the copies; nothing, where it cannot be read: they are copied once more then."""
    try:
        return {name: _Copy.model_validate(copy) for name, copy in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}
