"""What other stacks reach on the same shapes: whole training steps of TRL, Liger, Axolotl and Unsloth, timed.

    python bench/peers.py --list                               what is installed here, and what each is tried with
    python bench/peers.py --peer unsloth --shape 8B            all its settings for that shape, a process for each
    python bench/peers.py --peer unsloth --shape 8B --batch 8 [--no-recompute] [--packed] [--json]      one setting
    python bench/peers.py --smoke                              TRL on the tiny shape, on any machine, in seconds

A peer trains a Llama-like model with random weights made on the GPU (70B of them fit on few disks): NF4 with double
quantisation, LoRA r16 alpha 32 on all linears without dropout, full rows of 2048 tokens or rows packed into as many,
every token trained. What computes is the peer's own code as it ships; only the weights do not come from a file.
bench/stacks.py says what each peer is, and sets it up.

Each runs in a process of its own, since Unsloth and the kernels patch transformers for the whole process. Packages may
lie in a folder instead of being installed: PEERS_SITE names it, with `liger`, `axolotl` and `unsloth` in it, each put
first on the import path of the peers that use it. An optimizer that is fused (torch's AdamW) is used for all: at these
sizes it is faster than the 8-bit one that most examples of these stacks name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from stacks import PEERS, Peer, Setting
from workload import ROWS_PACKED, SHAPES

# Nothing that Unsloth patches may be imported before it: torch, transformers, PEFT and TRL are imported where used.

SITE: Final = "PEERS_SITE"
"""Variable that names the folder where packages lie."""
SETTINGS: Final = (
    Setting("trl", "8B", 8),
    Setting("trl", "8B", 4, recompute=False),
    Setting("trl", "70B", 4),
    Setting("liger", "8B", 8),
    Setting("liger", "8B", 4, recompute=False),
    Setting("liger", "70B", 4),
    Setting("axolotl", "8B", 4, recompute=False),
    Setting("axolotl", "8B", 8, recompute=False),
    Setting("axolotl", "70B", 4),
    Setting("axolotl", "70B", 2, recompute=False),
    Setting("axolotl", "70B", 1, recompute=False),
    Setting("axolotl-trl", "8B", 4, recompute=False),
    Setting("axolotl-trl", "70B", 4),
    Setting("unsloth", "8B", 8),
    Setting("unsloth", "8B", 4, recompute=False),
    Setting("unsloth", "70B", 4),
    Setting("unsloth", "70B", 1, recompute=False),
)


@dataclass(frozen=True)
class Measured:
    """A setting, timed; or why it could not be.

    Args:
        seconds: of each step after the warm-up.
        tokens_per_second: of the median step. None where it did not run.
        gib: of torch's allocator while it trained. None without a GPU.
        loss: the mean over all steps. Random weights give about log(vocabulary) + 0.5: else something is amiss.
        trouble: None where it ran, and its loss is a number.
        versions: of the packages that took part.
    """

    setting: Setting
    seconds: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    gib: float | None = None
    loss: float | None = None
    trouble: str | None = None
    versions: tuple[tuple[str, str], ...] = ()

    def as_json(self) -> str:
        return json.dumps({"name": self.setting.name, **asdict(self), "versions": dict(self.versions)})


def add_to_path(peer: Peer) -> None:
    """Put the folders of PEERS_SITE first, if there is one."""
    if site := os.environ.get(SITE):
        sys.path[:0] = [str(Path(site).absolute() / folder) for folder in peer.folders]


def versions(peer: Peer) -> tuple[tuple[str, str], ...]:
    """Of its packages, and of what they stand on, as far as installed."""
    found = []
    for name in (*peer.packages, "transformers", "torch", "triton"):
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def timed(setting: Setting, *, steps: int, warm_up: int, optimizer: str = "adamw_torch_fused") -> Measured:
    """Train in this process. Where that fails, the traceback goes to stderr and its last line is the trouble."""
    peer = PEERS[setting.peer]
    add_to_path(peer)
    found = versions(peer)
    if peer.packages[0] not in dict(found):
        return Measured(setting, trouble=f"{peer.packages[0]} is not installed", versions=found)
    here = Path.cwd()
    # What Axolotl and Unsloth set for themselves, for all: it leaves less memory in pieces too small to use.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # Unsloth writes what it compiles where it is
        try:
            return _train(setting, Path(scratch), steps, warm_up, optimizer, found)
        except Exception as problem:
            traceback.print_exc()
            return Measured(setting, trouble=f"{type(problem).__name__}: {problem}", versions=found)
        finally:
            os.chdir(here)


def _train(
    setting: Setting, folder: Path, steps: int, warm_up: int, optimizer: str, found: tuple[tuple[str, str], ...]
) -> Measured:
    peer = PEERS[setting.peer]
    if setting.peer == "unsloth":
        import unsloth as _  # noqa: F401  (before torch: it sets what torch reads when it is first imported)
    import torch

    if peer.needs_gpu and not torch.cuda.is_available():
        return Measured(setting, trouble="needs an NVIDIA GPU", versions=found)
    cuda = torch.cuda.is_available()
    common = {
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": warm_up + steps,
        "learning_rate": 1e-5,
        "optim": optimizer,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    begun = time.perf_counter()
    trainer = peer.trainer(setting, folder, common)
    print(f"{setting.name}: ready after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    ends = _clock(trainer)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss = trainer.train().training_loss
    if len(ends) != warm_up + steps + 1:
        raise AssertionError(f"{len(ends) - 1} steps, and not {warm_up + steps}")
    seconds = tuple(end - begin for begin, end in pairwise(ends))[warm_up:]
    return Measured(
        setting,
        seconds=seconds,
        tokens_per_second=setting.tokens / statistics.median(seconds),
        gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        loss=loss,
        trouble=None if math.isfinite(loss) else f"the loss is {loss}",
        versions=found,
    )


def _clock(trainer: Any) -> list[float]:
    """Lets the trainer note when it begins and when each step has ended on the GPU."""
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    def note() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        print(f"  step {len(ends) - 1}", file=sys.stderr, flush=True)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: object, **__: object) -> None:
            note()

        def on_step_end(self, *_: object, **__: object) -> None:
            note()

    trainer.add_callback(Clock())
    return ends


def row_of(found: Measured) -> str:
    """A line of the table."""
    if found.tokens_per_second is None:
        return f"{found.setting.name:36} {found.trouble}"
    peak = "-" if found.gib is None else f"{found.gib:.1f}"
    said = ", ".join(f"{name} {version}" for name, version in found.versions)
    trouble = f"  TROUBLE: {found.trouble}" if found.trouble else ""
    speed = f"{found.tokens_per_second:8.0f} tok/s {peak:>6} GiB  loss {found.loss:.2f}{trouble}"
    return f"{found.setting.name:36} {speed}  {said}"


def apart(setting: Setting, *, steps: int, warm_up: int, optimizer: str = "adamw_torch_fused") -> Measured:
    """Train in a process of its own, whose stderr goes where this one's does."""
    command = [sys.executable, str(Path(__file__).absolute()), "--json", "--peer", setting.peer]
    command += ["--shape", setting.shape, "--batch", str(setting.batch), "--length", str(setting.length)]
    command += ["--steps", str(steps), "--warm-up", str(warm_up), "--optimizer", optimizer]
    command += ["--recompute" if setting.recompute else "--no-recompute"]
    command += ["--packed"] if setting.packed else []
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"name"'):
            return _read(json.loads(line))
    return Measured(setting, trouble=f"its process ended with {ended.returncode} and said nothing")


def _read(said: dict[str, Any]) -> Measured:
    del said["name"]
    said |= {
        "setting": Setting(**said["setting"]),
        "seconds": tuple(said["seconds"]),
        "versions": tuple(said["versions"].items()),
    }
    return Measured(**said)


def show_list() -> None:
    """What is installed, and the settings of each peer."""
    before = list(sys.path)
    for name, peer in PEERS.items():
        add_to_path(peer)
        found = dict(versions(peer))
        sys.path[:] = before
        there = peer.packages[0] in found
        print(f"{name}: " + (", ".join(f"{key} {found[key]}" for key in found) if there else "not installed"))
        for setting in SETTINGS:
            if setting.peer == name:
                print(f"    {setting.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, action="append", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, help="default: all that a peer has settings for")
    parser.add_argument("--batch", type=int, help="one setting, in this process; else all, each in its own")
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="default: as the list has it for that batch; else yes",
    )
    parser.add_argument("--packed", action="store_true", help=f"{ROWS_PACKED} rows in each sequence")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw_torch_fused", help="a name that transformers knows")
    parser.add_argument("--smoke", action="store_true", help="TRL on the tiny shape; needs no GPU")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json", action="store_true", help="an object for each setting, a line each")
    asked = parser.parse_args(arguments)
    how = {"steps": asked.steps, "warm_up": asked.warm_up, "optimizer": asked.optimizer}
    if asked.list:
        show_list()
        return 0
    if asked.smoke:
        results = [timed(Setting("trl", "tiny", 2, asked.recompute is not False, asked.packed, 96), **how)]
    elif asked.batch is not None:
        if not (asked.peer and len(asked.peer) == 1 and asked.shape):
            parser.error("--batch is of one setting: name its --peer and its --shape too")
        [peer] = asked.peer
        listed = [each for each in SETTINGS if (each.peer, each.shape, each.batch) == (peer, asked.shape, asked.batch)]
        recompute = asked.recompute if asked.recompute is not None else listed[0].recompute if listed else True
        setting = Setting(peer, asked.shape, asked.batch, recompute, asked.packed, asked.length)
        results = [timed(setting, **how)]
    else:
        chosen = [
            setting
            for setting in SETTINGS
            if setting.peer in (asked.peer or PEERS) and asked.shape in (None, setting.shape)
        ]
        results = [apart(setting, **how) for setting in chosen]
    for found in results:
        print(found.as_json() if asked.json else row_of(found), flush=True)
    return 0 if any(found.tokens_per_second for found in results) else 1


if __name__ == "__main__":
    sys.exit(main())
