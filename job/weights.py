"""The base model's files: brought to this machine, taken up where a killed attempt left them, verified and digested.

From the hub they go into Hugging Face's own cache (HF_HOME), which all runs of a machine share; from a bucket into the
work folder. Every file is digested once an attempt, wherever it came from: the digests are the base's identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from job.checkpoints import digest_file
from job.contract.base_model import is_weights, model_files
from job.contract.recipe import TINY_MODEL, BaseModelRef
from job.contract.records import FileDigest
from job.dataset.source import local_path
from job.download import Source, download, in_threads
from job.tiny import write_tiny_model

RETRY_SECONDS: Final = 300.0
"""How long a file waits for a place that is out of reach."""

_DIGESTING: Final = 4
"""Threads that digest files which are here: hashlib lets go of the interpreter, and one thread would take 90 s for a
70B model."""


@dataclass(frozen=True)
class Base:
    """The base model's files on this machine."""

    folder: Path
    files: dict[str, FileDigest]

    @property
    def digest(self) -> str:
        """Sha256 over the names and digests of all files."""
        return self.digest_of(*self.files)

    @property
    def chat_template_digest(self) -> str:
        """Sha256 of the chat template's text: a file of its own, or a key of tokenizer_config.json."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
        config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return hashlib.sha256(json.dumps(config.get("chat_template")).encode()).hexdigest()

    @property
    def weights_size(self) -> int:
        """Bytes of the weights' files."""
        return sum(digest.size for name, digest in self.files.items() if is_weights(name))

    def digest_of(self, *names: str) -> str:
        """The same over some of the files; absent ones count as absent."""
        listed = json.dumps({name: self.files[name].sha256 for name in names if name in self.files}, sort_keys=True)
        return hashlib.sha256(listed.encode()).hexdigest()


def locate(
    ref: BaseModelRef,
    workdir: Path,
    *,
    go_on: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
    before_weights: Callable[[Path], None] = lambda _: None,
    retry_seconds: float = RETRY_SECONDS,
) -> Base:
    """Bring the base model's files to this machine and digest them.

    Args:
        go_on: called ten times a second; raises when this attempt has to end.
        say: told what is done from now on: of a download every few seconds, and of its end.
        before_weights: called once with the folder, in which everything but the weights is by then; raises when it is
            not worth bringing them.

    Raises:
        ModelInvalid: it is missing, may not be had, or has no safetensors weights.
        Unreachable: its place was out of reach for all of `retry_seconds`, or this disk is full.
        TrainingFailed: this disk is too small for it.
        Damaged: its place gives other bytes than it lists.
    """

    def bring(source: Source) -> Base:
        files = download(source, ref, go_on, say, before_weights, retry_seconds)
        return Base(source.folder, files)  # only now: until a branch is asked for, its folder is not known

    if ref.id == TINY_MODEL:
        folder = workdir / "base"
        write_tiny_model(folder)
        return _digest(folder, ref, go_on, before_weights)
    name = hashlib.sha256(json.dumps([ref.id, ref.revision]).encode()).hexdigest()[:16]
    if ref.is_on_hub:
        from job.hub import HubFiles

        return bring(HubFiles(ref, listing=workdir / "base" / f"{name}.json"))
    if ref.is_in_bucket:
        from job.bucket import BucketFiles

        return bring(BucketFiles(ref, folder=workdir / "base" / name))
    folder = (local_path(ref.id) if "://" in ref.id else None) or Path(ref.id).expanduser()
    return _digest(folder, ref, go_on, before_weights)


def _digest(folder: Path, ref: BaseModelRef, go_on: Callable[[], None], before_weights: Callable[[Path], None]) -> Base:
    present = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    names = model_files(present, where=f"{folder}" if ref.id != TINY_MODEL else ref.id)
    before_weights(folder)
    digests = in_threads([partial(digest_file, folder / name) for name in names], _DIGESTING, go_on)
    return Base(folder, dict(zip(names, digests, strict=True)))
