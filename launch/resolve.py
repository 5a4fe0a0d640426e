"""A recipe as written -> a recipe that means the same from anywhere, and the digests of its dataset.

Everything that can be refused is refused here, before anything is created.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.errors import AccessRefused, BadInput, DatasetInvalid, Garbled, IdentityMismatch, NotFound
from job.contract.recipe import Recipe
from job.contract.records import DatasetDigest, RunRecord
from job.dataset.reader import fingerprint
from job.dataset.source import local_path
from job.storage import open_object, open_store
from launch.base_model import pin
from launch.hub import Hub, Pinned
from launch.tokens import Sample, take_sample

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Resolved:
    """A recipe whose every reference is absolute, and what its dataset and its base model are now."""

    recipe: Recipe
    train: DatasetDigest
    held_out: DatasetDigest | None
    base_model: Pinned
    train_sample: Sample
    held_out_sample: Sample | None

    @property
    def bucket(self) -> str:
        """Uri of the bucket that the run lands in."""
        assert self.recipe.output.bucket is not None  # noqa: S101 - `resolve` filled it in
        return self.recipe.output.bucket


def resolve(recipe: Recipe, *, folder: Path, bucket: str) -> Resolved:
    """What a recipe means.

    Args:
        folder: the recipe's own, which its relative references start from.
        bucket: uri, used where the recipe names none.

    Raises:
        DatasetInvalid: a dataset is missing, unreadable, or has a bad line.
        ModelInvalid: the base model is missing, may not be had, or has no safetensors.
        BadInput: the bucket's uri is none.
        Unreachable: the hub, or an s3:// dataset or base model, is out of reach for now.
    """
    target = str(open_store(recipe.output.bucket or bucket).uri)
    base_model = pin(recipe.base_model, folder=folder, hub=Hub.of(os.environ))
    train_uri = dataset_uri(recipe.dataset.train, folder)
    train, train_sample = read_dataset(train_uri, name=recipe.dataset.train)
    held_out_ref: float | str | None = recipe.dataset.held_out
    held_out, held_out_sample = None, None
    if isinstance(held_out_ref, str):
        held_out, held_out_sample = read_dataset(dataset_uri(held_out_ref, folder), name=held_out_ref)
        held_out_ref = held_out.uri
        if held_out.sha256 == train.sha256:
            raise DatasetInvalid(
                "dataset.held_out has the same rows as dataset.train: its loss would say nothing",
                hint="name another file, or a fraction such as 0.1",
            )
    resolved = recipe.model_copy(
        update={
            "base_model": base_model.ref,
            "dataset": recipe.dataset.model_copy(update={"train": train_uri, "held_out": held_out_ref}),
            "output": recipe.output.model_copy(update={"bucket": target}),
        }
    )
    return Resolved(
        recipe=resolved,
        train=train,
        held_out=held_out,
        base_model=base_model,
        train_sample=train_sample,
        held_out_sample=held_out_sample,
    )


def dataset_uri(reference: str, folder: Path) -> str:
    """The absolute uri of a dataset as a recipe names it.

    Raises:
        DatasetInvalid: it is in a place that cannot be read from.
    """
    if not _SCHEME.match(reference):
        return Path(os.path.normpath(folder.absolute() / Path(reference).expanduser())).as_uri()
    try:
        open_object(reference)
    except BadInput as error:
        raise DatasetInvalid(f"dataset {reference}: {error.message}", hint=error.hint) from error
    return reference


def read_dataset(uri: str, *, name: str) -> tuple[DatasetDigest, Sample]:
    """Check every row of a dataset, digest its bytes, keep some rows to count tokens. `name` is what errors call it.

    Raises:
        DatasetInvalid: it is missing, unreadable, or has a bad line.
        Unreachable: its store is out of reach for now.
    """
    with _local_copy(uri, name) as path:
        digest = fingerprint(path, name=name).model_copy(update={"uri": uri})
        try:
            return digest, take_sample(path, digest)
        except OSError as error:
            raise DatasetInvalid(f"dataset {name} cannot be read: {error.strerror or error}") from error


def check_unchanged(record: RunRecord) -> None:
    """Refuse to go on with a run whose dataset is not what it was at its launch.

    Raises:
        IdentityMismatch: names the dataset.
        DatasetInvalid: it can no longer be read.
    """
    for key, then in (("train", record.train), ("held_out", record.held_out)):
        if then is None:
            continue
        now, _ = read_dataset(then.uri, name=then.uri)
        if now.sha256 != then.sha256:
            raise IdentityMismatch(
                f"dataset.{key} {then.uri} has changed since run {record.run_id} was launched: "
                f"{then.rows} rows with sha256 {then.sha256[:12]} then, {now.rows} rows with {now.sha256[:12]} now",
                hint="put the old file back, or launch a new run",
            )


def check_same_recipe(record: RunRecord, recipe: Recipe, *, name: str) -> None:
    """Refuse to go on with a run by another recipe than its own. Where it lands and how often it is saved may differ.

    Raises:
        IdentityMismatch: names every key that differs; or says that the branch it names has moved on.
    """
    if recipe.digest() == record.recipe_digest:
        return
    model, pinned = recipe.base_model, record.recipe.base_model
    as_then = recipe.model_copy(update={"base_model": model.model_copy(update={"revision": pinned.revision})})
    if as_then.digest() == record.recipe_digest:
        raise IdentityMismatch(
            f"base model {model.id} of {name} is now at commit {model.revision}, and run {record.run_id} was launched "
            f"with commit {pinned.revision}: the branch has moved on",
            hint=f"leave the recipe out to go on with {record.run_id}, or write the run's commit as its revision",
        )
    then, now = (
        dict(_leaves(r.model_dump(mode="json", exclude={"output", "checkpoints"}))) for r in (record.recipe, recipe)
    )
    changes = [
        f"{key} ({then.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    raise IdentityMismatch(
        f"{name} is not the recipe of run {record.run_id}: {', '.join(changes) or 'its digest differs'}",
        hint=f"leave the recipe out to go on with {record.run_id}, or launch a new run",
    )


def commit_of(folder: Path) -> str | None:
    """The git commit of the folder a recipe lies in, "-dirty" behind it with uncommitted changes; None without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _leaves(value: object, at: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


@contextmanager
def _local_copy(uri: str, name: str) -> Iterator[Path]:
    """A local path to the bytes of a dataset, for as long as it is needed."""
    path = local_path(uri)
    if path is not None:
        if not path.exists():
            raise DatasetInvalid(f"dataset {name} does not exist ({path})", hint="paths are relative to the recipe")
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
