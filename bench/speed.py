"""How fast the job trains on this GPU, beside its peers and beside what the GPU can do at all, in one run.

    python bench/speed.py [--shapes 8B 70B] [--peers trl unsloth ...] [--json FILE]      needs an NVIDIA GPU
    python bench/speed.py --smoke                                                        the tiny shape, anywhere

The floor is measured first: the rate of bf16 and of e4m3 matrix products of the shape's own sizes, random data, the
mean of two seconds, hot. A token needs 4 FLOP for each parameter of the linears and of the head: forward, and the
gradient of the input; frozen weights have none of their own. Attention is not in it.

Ours are whole steps of `job.train.Training`, steered and logged: random weights, NF4 with double quantisation, LoRA r16
on all linears, rows of 2048 tokens, every token trained, the optimizer, and one checkpoint written in the middle of the
measured steps. Peers are timed by bench/peers.py, each in a process of its own; those that are not installed are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from workload import ROWS_PACKED, SHAPES

from job.model import hardware
from launch.shape import Shape

HERE: Final = Path(__file__).parent
PEER_SECONDS: Final = 400
GIB: Final = 2**30


@dataclass(frozen=True)
class Ours:
    """A setting of the job. `gib`: the memory it may use, None for all of it."""

    name: str
    shape: str
    batch_size: int
    gradient_accumulation: int
    precision: str = "bf16"
    packing: bool = False
    gib: float | None = None
    reproducible: bool = False


SETTINGS: Final = (
    Ours("bf16", "8B", 8, 1),
    Ours("bf16, packed rows", "8B", 8, 1, packing=True),
    Ours("bf16, one row", "8B", 1, 8),
    Ours("bf16, reproducible", "8B", 8, 1, reproducible=True),
    Ours("fp8", "8B", 8, 1, "fp8"),
    Ours("fp8, packed rows", "8B", 8, 1, "fp8", packing=True),
    Ours("bf16", "70B", 2, 2),
    Ours("bf16 within 79 GiB", "70B", 1, 4, gib=79),
    Ours("bf16 within 47 GiB", "70B", 1, 4, gib=47),
    Ours("fp8", "70B", 2, 2, "fp8"),
    Ours("fp8 within 79 GiB", "70B", 1, 4, "fp8", gib=79),
)
SMOKE: Final = (Ours("fp32 on a CPU", "tiny", 2, 2), Ours("fp32 on a CPU, packed rows", "tiny", 2, 2, packing=True))


@dataclass(frozen=True)
class Line:
    """A row of the table. `of_floor`: of the floor in bf16, whatever it multiplies in."""

    who: str
    shape: str
    setting: str
    tokens_per_second: float | None
    gib: float | None
    of_floor: float | None
    blocking: float | None = None
    """Seconds for which the training stood still for a checkpoint."""
    trouble: str = ""


@dataclass(frozen=True)
class Floor:
    """Matrix products in TFLOP/s, and the tokens a second of a shape that would do nothing else."""

    shape: str
    bf16: float
    fp8: float | None
    tokens_bf16: float
    tokens_fp8: float | None


def floor_of(name: str) -> Floor:
    """Measure it, on the sizes of the shape's gate and up, both ways."""
    shape = SHAPES[name]
    per_token = 4 * (shape.linear_parameters + shape.head_parameters)
    bf16 = _rate(shape, fp8=False)
    fp8 = _rate(shape, fp8=True) if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9) else None
    return Floor(name, bf16 / 1e12, fp8 / 1e12 if fp8 else None, bf16 / per_token, fp8 / per_token if fp8 else None)


def _rate(shape: Shape, *, fp8: bool) -> float:
    """FLOP/s."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    tokens, wide = (8192 if cuda else 64), 2 * shape.feed_forward
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(wide, shape.hidden, device=device, dtype=dtype)
    gradient = torch.randn(tokens, wide, device=device, dtype=dtype)
    if fp8:
        e4m3, bf16 = torch.float8_e4m3fn, torch.bfloat16
        small, small_weight, small_gradient = x.to(e4m3), weight.to(e4m3), gradient.to(e4m3)
        turned = weight.T.contiguous().to(e4m3)
        rows = torch.ones(tokens, 1, device=device)
        ones, others = torch.ones(1, wide, device=device), torch.ones(1, shape.hidden, device=device)

        def both() -> None:
            torch._scaled_mm(small, small_weight.T, scale_a=rows, scale_b=ones, out_dtype=bf16, use_fast_accum=True)
            torch._scaled_mm(small_gradient, turned.T, rows, others, out_dtype=bf16, use_fast_accum=True)
    else:

        def both() -> None:
            x @ weight.T
            gradient @ weight

    for _ in range(3):
        both()
    _wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < (2.0 if cuda else 0.2):
        for _ in range(20):
            both()
        _wait()
        count += 20
    return count * 4 * tokens * wide * shape.hidden / (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(setting: Ours, *, steps: int, warm_up: int) -> dict[str, Any]:
    """Train a setting in a process of its own, whose memory is then free again."""
    order = json.dumps(asdict(setting) | {"steps": steps, "warm_up": warm_up})
    return _answer([sys.executable, str(HERE / "speed.py"), "--one", order])


def one(setting: dict[str, Any]) -> dict[str, Any]:
    """In that process: build, train, and tell."""
    import tempfile

    from steps import NEVER, Setting, build, make_rows

    from job.callbacks import Steering
    from job.contract.metrics import MetricLine, Step
    from job.contract.recipe import TINY_MODEL, BaseModelRef
    from job.model import load_tokenizer
    from job.notice import Notice
    from job.train import Rows, Training
    from job.weights import locate

    steps, warm_up = setting.pop("steps"), setting.pop("warm_up")
    wanted = Ours(**setting)
    if wanted.gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(wanted.gib * GIB / total)
    length = 96 if wanted.shape == "tiny" else 2048
    sized = (wanted.shape, wanted.batch_size, wanted.gradient_accumulation, wanted.packing, length)
    plain = Setting(*sized, precision=wanted.precision)
    recipe = plain.recipe()
    how = recipe.training.model_copy(update={"reproducible": wanted.reproducible})
    recipe = recipe.model_copy(update={"training": how})
    shape = SHAPES[wanted.shape]
    rows = make_rows(plain, shape.vocabulary, (warm_up + steps) * how.batch_size * how.gradient_accumulation)
    lines: list[MetricLine] = []
    blocking: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer = load_tokenizer(locate(BaseModelRef(id=TINY_MODEL), folder))
        training = Training(recipe, build(shape, recipe), tokenizer, Rows(rows, []), workdir=folder, notice=Notice())

        def save(_: str) -> float:
            began = time.perf_counter()
            write = training.snapshot()
            blocking.append(time.perf_counter() - began)
            write_to = folder / f"checkpoint-{len(blocking)}"
            write_to.mkdir()
            write(write_to)
            return blocking[-1]

        steering = Steering(
            training, Notice(), save=save, write=lines.append, interval=NEVER, upload_seconds=lambda: 0.0
        )
        training.run(steering)
    taken = [line for line in lines if isinstance(line, Step)][warm_up:]
    speeds = sorted(step.tokens / step.seconds for step in taken)
    return {
        "tokens_per_second": speeds[len(speeds) // 2],
        "slowest": speeds[0],
        "gib": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None,
        "blocking": max(blocking, default=None),
        "rows": ROWS_PACKED if wanted.packing else 1,
        "loss": [taken[0].loss, taken[-1].loss],
    }


def peer(name: str, shape: str, batch: int) -> dict[str, Any]:
    """What bench/peers.py says of a peer."""
    command = [sys.executable, str(HERE / "peers.py"), "--peer", name, "--shape", shape, "--batch", str(batch)]
    return _answer([*command, "--json"])


def _answer(command: list[str]) -> dict[str, Any]:
    """The JSON on a process's last line, or its trouble."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"trouble": f"took longer than {PEER_SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        said = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["it said nothing"]
        return {"trouble": said[-1][:300]}
    return found


def table(floors: Sequence[Floor], lines: Sequence[Line], peers: Sequence[str]) -> str:
    """For people: each line with its ratio to the best setting of every peer, and to the floor."""
    said = [f"{hardware().name}, torch {torch.__version__}"]
    for floor in floors:
        fp8 = f", {floor.fp8:.0f} in e4m3: {floor.tokens_fp8:.0f}" if floor.fp8 and floor.tokens_fp8 else ""
        said.append(
            f"floor {floor.shape}: {floor.bf16:.0f} TFLOP/s in bf16: {floor.tokens_bf16:.0f} tokens a second{fp8}"
        )
    best: dict[tuple[str, str], float] = {}
    for line in lines:
        if line.who != "ftjob" and line.tokens_per_second:
            key = (line.who, line.shape)
            best[key] = max(best.get(key, 0.0), line.tokens_per_second)
    said.append(
        f"{'':8}{'shape':7}{'setting':34}{'tokens/s':>9}{'GiB':>7}{'floor':>7}"
        + "".join(f"{'/ ' + name:>12}" for name in peers)
        + f"{'save, s':>9}"
    )
    for line in lines:
        if line.tokens_per_second is None:
            said.append(f"{line.who:8}{line.shape:7}{line.setting:34} {line.trouble}")
            continue
        ratios = "".join(
            f"{line.tokens_per_second / best[name, line.shape]:12.2f}" if (name, line.shape) in best else f"{'-':>12}"
            for name in peers
        )
        gib = f"{line.gib:7.1f}" if line.gib is not None else f"{'-':>7}"
        saved = f"{line.blocking:9.2f}" if line.blocking is not None else f"{'-':>9}"
        said.append(
            f"{line.who:8}{line.shape:7}{line.setting:34}{line.tokens_per_second:9.0f}{gib}{line.of_floor:7.2f}"
            f"{ratios}{saved}"
        )
    return "\n".join(said)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["8B", "70B"])
    parser.add_argument("--settings", nargs="*", default=[], help="names of our settings; default: all")
    parser.add_argument("--peers", nargs="*", default=[], help="peer:batch, as bench/peers.py names them: unsloth:8")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="the tiny shape, without peers")
    parser.add_argument("--json", metavar="FILE", help="also as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.one:
        print(json.dumps(one(json.loads(asked.one))))
        return
    if not (asked.smoke or torch.cuda.is_available()):
        parser.error("this needs an NVIDIA GPU; --smoke does not")
    shapes = ["tiny"] if asked.smoke else asked.shapes
    floors = [floor_of(name) for name in shapes]
    floor = {each.shape: each.tokens_bf16 for each in floors}
    lines: list[Line] = []

    def add(who: str, shape: str, setting: str, found: dict[str, Any]) -> None:
        speed = found.get("tokens_per_second")
        lines.append(
            Line(
                *(who, shape, setting, speed, found.get("gib"), speed / floor[shape] if speed else None),
                blocking=found.get("blocking"),
                trouble=found.get("trouble", ""),
            )
        )
        print(lines[-1], file=sys.stderr, flush=True)

    for setting in SMOKE if asked.smoke else SETTINGS:
        if setting.shape in shapes and (not asked.settings or setting.name in asked.settings):
            name = f"{setting.name} ({setting.batch_size}x{setting.gradient_accumulation})"
            add("ftjob", setting.shape, name, ours(setting, steps=asked.steps, warm_up=asked.warm_up))
    peers = [each.partition(":")[::2] for each in asked.peers]
    for name, batch in peers:
        for shape in shapes:
            add(name, shape, f"{batch}x1", peer(name, shape, int(batch or 1)))
    print(table(floors, lines, list(dict.fromkeys(name for name, _ in peers))))
    if asked.json:
        found = {"floors": [asdict(each) for each in floors], "lines": [asdict(each) for each in lines]}
        Path(asked.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
