"""Promise: a tree of tensors comes back from the disk as it was when it was frozen, bit for bit, and never as code."""

from __future__ import annotations

import contextlib
import math
import pickle
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.tensors import freeze, load_tree, write_tensors
from tests.job.stack import bits, same_tensor

DTYPES = (
    *[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    *[torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool],
)


@st.composite
def some_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits at all, in any small shape: of no dimension, and of no element, too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).reshape(shape)
    size = count * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    return torch.frombuffer(bytearray(raw or b"\0" * 8), dtype=dtype)[:count].reshape(shape)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | some_tensors()
names = st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$tuple", "$items", "/", "a/b", "0", 0])
trees = st.recursive(
    leaves,
    lambda part: (
        st.lists(part, max_size=3) | st.lists(part, max_size=3).map(tuple) | st.dictionaries(names, part, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    match a:
        case torch.Tensor():
            return same_tensor(a, b)
        case list() | tuple():
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        case dict():
            return [(type(k), k) for k in a] == [(type(k), k) for k in b] and all(same(a[k], b[k]) for k in a)
        case float():
            return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
        case _:
            return bool(a == b)


def saved(tree: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        freeze(tree).save(Path(folder) / "tree")
        return load_tree(Path(folder) / "tree")


@given(trees)
@settings(deadline=None)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    assert same(saved(tree), tree)


def test_the_comparison_of_this_test_tells_trees_apart() -> None:
    one = {"a": torch.tensor([0.0]), 1: (1, [2.0])}
    assert same(one, {"a": torch.tensor([0.0]), 1: (1, [2.0])})
    for other in (
        {"a": torch.tensor([-0.0]), 1: (1, [2.0])},
        {"a": torch.tensor([0.0]), "1": (1, [2.0])},
        {"a": torch.tensor([0.0]), 1: [1, [2.0]]},
        {"a": torch.tensor([0.0]), 1: (True, [2.0])},
        {"a": torch.tensor([0.0]), 1: (1, [2.0000000000000004])},
        {"a": torch.tensor([0.0]).double(), 1: (1, [2.0])},
    ):
        assert not same(one, other)


def test_keys_whose_paths_look_alike_stay_apart() -> None:
    tree = {
        "a/b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0)},
        "a/b'": torch.tensor(3.0),
        1: torch.tensor(4.0),
        "1": torch.tensor(5.0),
    }
    assert same(saved(tree), tree)


def test_tensors_that_share_memory_come_back_each_for_itself() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tree = [whole, whole, whole[1:], whole.T, whole[:, ::2], whole[0].expand(5, 4)]
    back = saved(tree)
    assert same(back, tree)
    back[0][1, 1] = -1
    assert back[1][1, 1] == 5


def test_what_changes_after_the_freeze_is_not_saved(tmp_path: Path) -> None:
    weights = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    steps = [1]
    tree = {"whole": weights, "transposed": weights.data.T, "part": weights.data[0], "steps": steps}
    kept = freeze(tree)
    weights.data.fill_(-1)
    steps.append(2)
    tree["later"] = 3
    kept.save(tmp_path / "tree")
    back = load_tree(tmp_path / "tree")
    assert back["whole"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["part"].tolist() == [0, 1, 2]
    assert back["steps"] == [1]
    assert "later" not in back


def test_equal_trees_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        freeze({"b": torch.ones(3), "a": [torch.zeros(2, dtype=torch.uint8), 0.1]}).save(tmp_path / name)
    for ending in (".safetensors", ".json"):
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"optimizer": {"state": [0, {1, 2}]}}, "/optimizer/state/1 is a set"),
        ({"a": (1, b"bytes")}, "/a/1 is a bytes"),
        (object(), "the tree is a object"),
        ({"a": {(1, 2): 3}}, r"/a has the key \(1, 2\)"),
        ({None: 1}, "the tree has the key None"),
    ],
)
def test_what_a_tree_may_not_hold_is_refused_with_its_path(tree: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        freeze(tree)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._path,)


def test_reading_never_unpickles(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(exploded))
    pickle.loads(bomb)  # noqa: S301  it is a bomb
    assert exploded.exists()
    exploded.unlink()
    freeze({"a": torch.ones(1)}).save(tmp_path / "tree")
    for ending in (".safetensors", ".json"):
        good = (tmp_path / f"tree{ending}").read_bytes()
        (tmp_path / f"tree{ending}").write_bytes(bomb)
        with pytest.raises(Exception, match=r"."):
            load_tree(tmp_path / "tree")
        (tmp_path / f"tree{ending}").write_bytes(good)
    torch.save({"a": _Bomb(exploded)}, tmp_path / "tree.safetensors")
    with pytest.raises(Exception, match=r"."):
        load_tree(tmp_path / "tree")
    assert not exploded.exists()


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a disk that is full: the kernel refuses to write more into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_os_error_and_leaves_no_torn_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    with no_file_beyond(50_000), pytest.raises(OSError, match=r"full\.safetensors"):
        write_tensors(tensors, tmp_path / "full.safetensors")
    assert not (tmp_path / "full.safetensors").exists()
    with no_file_beyond(50_000), pytest.raises(OSError, match="too large"):
        freeze({"text": "x" * 100_000}).save(tmp_path / "text")
    write_tensors(tensors, tmp_path / "full.safetensors")


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.safetensors"):
        write_tensors({"a": torch.zeros(1)}, tmp_path / "nowhere" / "a.safetensors")


Optimizer = Callable[[list[torch.nn.Parameter]], Any]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw_8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=0.01),
}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    # 8-bit states begin at 4096 elements; smaller parameters keep fp32 ones
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (7,))]


def train(weights: list[torch.nn.Parameter], optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        schedule.step()


def begin(make: Optimizer) -> tuple[list[torch.nn.Parameter], Any, Any]:
    weights = parameters()
    optimizer = make(weights)
    return weights, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_the_disk_bit_for_bit(tmp_path: Path, name: str) -> None:
    untouched, optimizer, schedule = begin(OPTIMIZERS[name])
    train(untouched, optimizer, schedule, range(3))
    middle = [weight.detach().clone() for weight in untouched]
    state = freeze({"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()})
    train(untouched, optimizer, schedule, range(3, 6))
    state.save(tmp_path / "state")  # later, as the spool does

    def resumed(*, with_state: bool) -> list[bytes]:
        weights, optimizer, schedule = begin(OPTIMIZERS[name])
        for weight, was in zip(weights, middle, strict=True):
            weight.data.copy_(was)
        if with_state:
            tree = load_tree(tmp_path / "state")
            optimizer.load_state_dict(tree["optimizer"])
            schedule.load_state_dict(tree["scheduler"])
        train(weights, optimizer, schedule, range(3, 6))
        return [bits(weight) for weight in weights]

    assert resumed(with_state=True) == [bits(weight) for weight in untouched]
    assert resumed(with_state=False) != [bits(weight) for weight in untouched]
    if "8bit" in name:
        dtypes = {tensor.dtype for tensor in state.tensors.values()}
        assert torch.uint8 in dtypes, "no 8-bit state: this tested nothing of bitsandbytes"
