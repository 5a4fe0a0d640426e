"""A training's state as the files of a checkpoint, and back.

Files: the adapter (PEFT's own two), training_state.{safetensors,json} (optimizer, schedule, random state),
progress.json, and best/ when the best epoch is an earlier one. They are all that a resume needs, and nothing of another
checkpoint; nothing in them is a path, or a pickle.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from job.model import ADAPTER_WEIGHTS, AdapterState, read_adapter, write_adapter
from job.progress import Progress
from job.tensors import FrozenTree, load_tree, write_tensors

_STATE: Final = "training_state"
_PROGRESS: Final = "progress.json"
_BEST: Final = Path("best") / ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory, which the training does not change any more.

    Args:
        config: the text of PEFT's adapter_config.json.
        state: optimizer, schedule and random state.
        best: the best epoch's weights, where that is an earlier one; None where they are those of `adapter`.
    """

    adapter: AdapterState
    config: str
    state: FrozenTree
    progress: Progress
    best: AdapterState | None

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder. Raises OSError."""
        write_adapter(self.adapter, self.config, folder)
        self.state.save(folder / _STATE)
        if self.best is not None:
            (folder / _BEST).parent.mkdir()
            write_tensors(self.best, folder / _BEST)
        (folder / _PROGRESS).write_bytes(self.progress.to_bytes())


def read_progress(folder: Path) -> Progress:
    """How far the training had come. Raises Damaged."""
    return Progress.from_bytes((folder / _PROGRESS).read_bytes(), name=str(folder / _PROGRESS))


def read_weights(folder: Path) -> AdapterState:
    """The adapter as it was."""
    return read_adapter(folder / ADAPTER_WEIGHTS)


def read_best(folder: Path, progress: Progress) -> AdapterState | None:
    """The best epoch's adapter; None before any was evaluated."""
    if progress.best is None:
        return None
    return read_adapter(folder / (_BEST if progress.best_is_earlier else ADAPTER_WEIGHTS))


def read_state(folder: Path) -> dict[str, Any]:
    """Optimizer, schedule and random state."""
    state: dict[str, Any] = load_tree(folder / _STATE)
    return state
