"""A recipe as written -> a recipe that means the same from anywhere, and the digests of its dataset.

Everything that can be refused is refused here, before anything is created.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from job.contract.check import Check
from job.contract.errors import BadInput, DatasetInvalid, IdentityMismatch, ModelInvalid
from job.contract.recipe import Recipe
from job.contract.records import DatasetDigest, RunRecord
from job.storage import open_store
from launch.checking import check_recipe
from launch.datasets import read_dataset
from launch.facts import ModelFacts
from launch.hub import Hub, Pinned
from launch.quote import Facts
from launch.steps import Lengths
from launch.visible import visible

_TOLD: Final = 3
"""Errors that a refusal tells; `ftjob check` shows the others."""


@dataclass(frozen=True)
class Resolved:
    """A recipe whose every reference is absolute, what its dataset and its base model are now, and its check."""

    recipe: Recipe
    check: Check
    model: ModelFacts
    lengths: tuple[Lengths, Lengths | None]

    @property
    def train(self) -> DatasetDigest:
        """Of the very bytes that were checked."""
        return self.check.train.digest

    @property
    def held_out(self) -> DatasetDigest | None:
        return self.check.held_out.digest if self.check.held_out is not None else None

    @property
    def base_model(self) -> Pinned:
        return self.model.base_model

    @property
    def facts(self) -> Facts:
        """What a quote rests on."""
        return self.model.quoted(*self.lengths)

    @property
    def bucket(self) -> str:
        """Uri of the bucket that the run lands in."""
        assert self.recipe.output.bucket is not None  # noqa: S101 - `resolve` filled it in
        return self.recipe.output.bucket


def resolve(recipe: Recipe, *, folder: Path, bucket: str, cache: Path | None = None, anyway: bool = False) -> Resolved:
    """What a recipe means.

    Args:
        folder: the recipe's own, which its relative references start from.
        bucket: uri, used where the recipe names none.
        cache: folder of what need not be computed twice; None to keep nothing.
        anyway: although the rows could not be rendered here, so that nobody knows what they would train.

    Raises:
        DatasetInvalid: a dataset is missing, unreadable, or cannot be trained on.
        ModelInvalid: the base model is missing, may not be had, has no safetensors, or cannot be trained on these rows.
        BadInput: the bucket's uri is none.
        Unreachable: the hub, or an s3:// dataset or base model, is out of reach for now.
    """
    target = str(open_store(recipe.output.bucket or bucket).uri)
    hub = Hub.of(os.environ)
    checked = check_recipe(
        recipe, folder=folder, hub=hub, variables=os.environ, cache=cache, thorough=False, anyway=anyway
    )
    refused = refusal_of(checked.check)
    if isinstance(refused, DatasetInvalid):
        raise refused
    if checked.model is None:
        assert checked.failure is not None  # noqa: S101 - one of the two is there
        raise checked.failure
    if refused is not None:
        raise refused
    assert checked.lengths is not None  # noqa: S101 - there are no errors
    dataset = {"train": checked.train_uri}
    if checked.held_out_uri is not None:
        dataset["held_out"] = checked.held_out_uri
    resolved = recipe.model_copy(
        update={
            "base_model": checked.model.base_model.ref,
            "dataset": recipe.dataset.model_copy(update=dataset),
            "output": recipe.output.model_copy(update={"bucket": target}),
        }
    )
    return Resolved(resolved, checked.check, checked.model, checked.lengths)


def refusal_of(check: Check) -> BadInput | None:
    """Why a recipe with such a check is not launched: its first errors, those of the dataset before the others."""
    errors = check.errors
    if not errors:
        return None
    first = errors[0]
    told = "; ".join(visible(problem.text) for problem in errors[:_TOLD])
    count = sum(check.times(code) for code in {problem.code for problem in errors})
    more = f"; and {count - _TOLD:,} more" if count > _TOLD else ""
    hint = first.hint if count == 1 else "`ftjob check RECIPE` shows all of them, and what to do"
    if first.file:
        return DatasetInvalid(f"dataset {told}{more}", hint=hint)
    return ModelInvalid(f"{told}{more}", hint=hint)


def check_unchanged(record: RunRecord) -> None:
    """Refuse to go on with a run whose dataset is not what it was at its launch.

    Raises:
        IdentityMismatch: names the dataset.
        DatasetInvalid: it can no longer be read.
    """
    for key, then in (("train", record.train), ("held_out", record.held_out)):
        if then is None:
            continue
        now = read_dataset(then.uri, name=then.uri)
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
