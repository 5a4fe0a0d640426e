"""The dataset as a recipe names it -> a uri that means the same from anywhere, and a local path to its bytes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from job.contract.errors import AccessRefused, BadInput, DatasetInvalid, Garbled, NotFound
from job.contract.records import DatasetDigest
from job.dataset.reader import fingerprint
from job.dataset.source import local_path
from job.storage import open_object
from launch.home import from_home

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def dataset_uri(reference: str, folder: Path) -> str:
    """The absolute uri of a dataset as a recipe names it.

    Raises:
        DatasetInvalid: it is in a place that cannot be read from.
    """
    if not _SCHEME.match(reference):
        return Path(os.path.normpath(folder.absolute() / from_home(reference))).as_uri()
    try:
        open_object(reference)
    except BadInput as error:
        raise DatasetInvalid(f"dataset {reference}: {error.message}", hint=error.hint) from error
    return reference


def read_dataset(uri: str, *, name: str) -> DatasetDigest:
    """Check every row of a dataset, and digest its bytes. `name` is what errors call it.

    Raises:
        DatasetInvalid: it is missing, unreadable, or has a bad line.
        Unreachable: its store is out of reach for now.
    """
    with local_copy(uri, name) as path:
        return fingerprint(path, name=name).model_copy(update={"uri": uri})


@contextmanager
def local_copy(uri: str, name: str) -> Iterator[Path]:
    """A local path to the bytes of a dataset, for as long as it is needed.

    Raises:
        DatasetInvalid: it is missing, or may not be read.
        Unreachable: its store is out of reach for now.
    """
    path = local_path(uri)
    if path is not None:
        try:
            exists = path.exists()
        except OSError as error:  # a folder on the way may not be entered, or the name is too long to be one
            raise DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}") from error
        if not exists:
            raise DatasetInvalid(f"dataset {name} does not exist ({path})", hint="paths are relative to the recipe")
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for, and can be read once
            raise DatasetInvalid(f"dataset {name} is not a file ({path})", hint="write its rows into a file first")
        yield path
        return
    store, key = open_object(uri)
    with tempfile.TemporaryDirectory(prefix="ftjob-") as folder:
        copy = Path(folder) / "rows.jsonl"
        try:
            store.get_file(key, copy)
        except NotFound as error:
            raise DatasetInvalid(f"dataset {name} does not exist", hint="check the uri") from error
        except (AccessRefused, Garbled) as error:
            raise DatasetInvalid(f"dataset {name} cannot be read: {error.message}", hint=error.hint) from error
        yield copy
