"""Every key in the bucket. Nothing else builds keys.

runs/<run_id>/
  recipe.json                              the run: resolved recipe and dataset digests (create-only)
  submissions/0001.json                    what was handed to a backend, and where it may run (create-only)
  submissions/0001.stop.json               a request to stop it: its job saves and ends
  attempts/0001.json                       claim of an attempt (create-only)
  attempts/0001.end.json                   how it ended (create-only; absent when it was killed)
  checkpoints/step-00000400-a0001/...      files of a checkpoint
  checkpoints/step-00000400-a0001.json     its manifest (create-only): its existence is the commit
  metrics/a0001-000123.jsonl               what happened, in whole objects; also the heartbeat
  adapter/a0002/...                        files of an adapter
  adapter.json                             its manifest (create-only): its existence is the publication
  landed/a0002.json                        the same of an adapter that was published because the budget ended

datasets/<sha256>.jsonl                    datasets that were brought from the launching machine, for any number of runs
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NewType, Self

from job.contract.errors import BadInput

Key = NewType("Key", str)
"""Name of an object in a store: relative, slash-separated, no empty, "." or ".." part."""

Uri = NewType("Uri", str)
"""What people write: s3://bucket/prefix or file:///folder."""

RUNS: Final = Key("runs/")


def dataset_key(sha256: str) -> Key:
    """Of a dataset with these bytes."""
    return Key(f"datasets/{sha256}.jsonl")


PROBES: Final = Key("runs/.probe/")
"""Where a launcher tries out whether it may write. No run id begins with a dot."""

_RUN_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_CHECKPOINT = re.compile(r"step-([0-9]{8})-a([0-9]{4})")
_SUBMISSION = re.compile(r"submissions/([0-9]{4})\.json")
_STOP = re.compile(r"submissions/([0-9]{4})\.stop\.json")
_CLAIM = re.compile(r"attempts/([0-9]{4})\.json")
_END = re.compile(r"attempts/([0-9]{4})\.end\.json")
_LANDED = re.compile(r"landed/a([0-9]{4})\.json")
_METRICS = re.compile(r"metrics/a([0-9]{4})-([0-9]{6})\.jsonl")
_MANIFEST = re.compile(r"checkpoints/(step-[0-9]{8}-a[0-9]{4})\.json")
_CHECKPOINT_FILE = re.compile(r"checkpoints/(step-[0-9]{8}-a[0-9]{4})/(?s:.+)")


def is_key(text: str) -> bool:
    """Whether a text can be the name of an object: it stays inside, everywhere, and can be written down."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not any(part in ("", ".", "..") for part in text.split("/")) and "\\" not in text and "\0" not in text


def _digits(number: int, width: int) -> str:
    # A wider number would make a key that sorts wrongly and that no reader of listings knows.
    if not 0 <= number < 10**width:
        raise ValueError(f"{number} does not fit into {width} digits")
    return f"{number:0{width}d}"


def check_run_id(run_id: str) -> str:
    """The id itself, if it is one.

    Raises:
        BadInput: it is not 1-63 characters of a-z, 0-9 and "-", starting and ending with a letter or digit (the rule
            of DNS labels, RFC 1123: such a name is safe in paths, keys, labels and cluster names).
    """
    if not _RUN_ID.fullmatch(run_id):
        raise BadInput(f"{run_id!r} is not a run id", hint="1-63 characters of a-z, 0-9 and '-', no '-' at either end")
    return run_id


@dataclass(frozen=True, order=True)
class CheckpointName:
    """A checkpoint's name. Ordered by step, then attempt: the greatest is the newest."""

    step: int
    attempt: int

    def __str__(self) -> str:
        return f"step-{_digits(self.step, 8)}-a{_digits(self.attempt, 4)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The name that a text spells; ValueError otherwise."""
        match = _CHECKPOINT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not the name of a checkpoint")
        return cls(step=int(match[1]), attempt=int(match[2]))


@dataclass(frozen=True)
class RunLayout:
    """The keys of one run."""

    run_id: str

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    @property
    def root(self) -> Key:
        return Key(f"{RUNS}{self.run_id}/")

    @property
    def recipe(self) -> Key:
        return Key(f"{self.root}recipe.json")

    @property
    def submissions(self) -> Key:
        return Key(f"{self.root}submissions/")

    def submission(self, number: int) -> Key:
        return Key(f"{self.submissions}{_digits(number, 4)}.json")

    def stop(self, number: int) -> Key:
        return Key(f"{self.submissions}{_digits(number, 4)}.stop.json")

    @property
    def attempts(self) -> Key:
        return Key(f"{self.root}attempts/")

    def claim(self, attempt: int) -> Key:
        return Key(f"{self.attempts}{_digits(attempt, 4)}.json")

    def end(self, attempt: int) -> Key:
        return Key(f"{self.attempts}{_digits(attempt, 4)}.end.json")

    @property
    def checkpoints(self) -> Key:
        return Key(f"{self.root}checkpoints/")

    def checkpoint_files(self, name: CheckpointName) -> Key:
        return Key(f"{self.checkpoints}{name}/")

    def checkpoint_file(self, name: CheckpointName, file: str) -> Key:
        return Key(f"{self.checkpoint_files(name)}{file}")

    def checkpoint_manifest(self, name: CheckpointName) -> Key:
        return Key(f"{self.checkpoints}{name}.json")

    @property
    def metrics(self) -> Key:
        return Key(f"{self.root}metrics/")

    def metrics_of(self, attempt: int) -> str:
        """What the keys of an attempt's metrics start with."""
        return f"{self.metrics}a{_digits(attempt, 4)}-"

    def metrics_object(self, attempt: int, sequence: int) -> Key:
        return Key(f"{self.metrics}a{_digits(attempt, 4)}-{_digits(sequence, 6)}.jsonl")

    def adapter_files(self, attempt: int) -> Key:
        return Key(f"{self.root}adapter/a{_digits(attempt, 4)}/")

    def adapter_file(self, attempt: int, file: str) -> Key:
        return Key(f"{self.adapter_files(attempt)}{file}")

    @property
    def adapter_manifest(self) -> Key:
        return Key(f"{self.root}adapter.json")

    @property
    def landed(self) -> Key:
        return Key(f"{self.root}landed/")

    def landed_manifest(self, attempt: int) -> Key:
        return Key(f"{self.landed}a{_digits(attempt, 4)}.json")

    # Readers of listings. A key that is none of ours is None: other people's objects are left alone.

    def _relative(self, key: str) -> str:
        return key.removeprefix(self.root) if key.startswith(self.root) else ""

    def submitted(self, key: str) -> int | None:
        match = _SUBMISSION.fullmatch(self._relative(key))
        return int(match[1]) if match else None

    def asked_to_stop(self, key: str) -> int | None:
        match = _STOP.fullmatch(self._relative(key))
        return int(match[1]) if match else None

    def claimed_attempt(self, key: str) -> int | None:
        match = _CLAIM.fullmatch(self._relative(key))
        return int(match[1]) if match else None

    def ended_attempt(self, key: str) -> int | None:
        match = _END.fullmatch(self._relative(key))
        return int(match[1]) if match else None

    def landed_attempt(self, key: str) -> int | None:
        match = _LANDED.fullmatch(self._relative(key))
        return int(match[1]) if match else None

    def committed_checkpoint(self, key: str) -> CheckpointName | None:
        match = _MANIFEST.fullmatch(self._relative(key))
        return CheckpointName.parse(match[1]) if match else None

    def checkpoint_of_file(self, key: str) -> CheckpointName | None:
        match = _CHECKPOINT_FILE.fullmatch(self._relative(key))
        return CheckpointName.parse(match[1]) if match else None

    def metrics_position(self, key: str) -> tuple[int, int] | None:
        match = _METRICS.fullmatch(self._relative(key))
        return (int(match[1]), int(match[2])) if match else None


def run_of_recipe_key(key: str) -> str | None:
    """The run id whose recipe.json this key is; None for any other key."""
    match = re.fullmatch(re.escape(RUNS) + rf"({_RUN_ID.pattern})/recipe\.json", key)
    return match[1] if match else None
