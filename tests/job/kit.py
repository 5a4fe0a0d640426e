"""What the tests of the job share: records that are valid and mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from job.contract.layout import RunLayout
from job.contract.records import CheckpointManifest, Hardware, Identity, Versions

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
RUN = RunLayout("run")
NOTHING = "0" * 64


def hardware(name: str = "CPU AVX2", memory: int = 1) -> Hardware:
    return Hardware(device="cpu", name=name, memory_bytes=memory, count=1)


def versions(**changed: str) -> Versions:
    return Versions(**(dict.fromkeys(Versions.model_fields, "1") | changed))


def identity() -> Identity:
    return Identity(
        recipe=NOTHING,
        train=NOTHING,
        held_out=None,
        tokens=NOTHING,
        base_model=NOTHING,
        world_size=1,
        threads=1,
        versions=versions(),
        hardware=hardware(),
    )


def draft(step: int, attempt: int = 1, reason: Literal["epoch", "interval", "notice"] = "epoch") -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        attempt=attempt,
        epoch=1.0,
        reason=reason,
        created_at=NOON,
        finished=False,
        held_out_loss=None,
        identity=identity(),
        files={},
    )


def contents(step: int) -> dict[str, bytes]:
    """What the files of a checkpoint of this step hold: told apart from any other step's."""
    return {
        "adapter.bin": b"adapter %d" % step * 100,
        "best/adapter.bin": b"best %d" % step,
        "state.json": b"%d" % step,
    }


def writer(step: int) -> Callable[[Path], None]:
    """Writes those files into a folder."""

    def write(folder: Path) -> None:
        for name, data in contents(step).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    return write


def read_back(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
