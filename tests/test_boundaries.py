"""Who may import whom: read from the source, and seen in processes in which the heavy things cannot be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]

TRAINING_STACK: Final = {
    *["torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "safetensors", "numpy"],
    *["tokenizers", "huggingface_hub"],
}
HEAVY: Final = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"}
"""What takes seconds to import, or gigabytes to install."""

MAY_IMPORT_HEAVY: Final = {
    *["job.model", "job.train", "job.callbacks", "job.evaluate", "job.speed"],
    *["job.batches", "job.loading", "job.randomness", "job.tensors", "job.tokenising"],
    *["job.isolation", "job.memory", "job.rehearsal", "job.trainer", "job.fast", "job.utilisation"],
}
"""The only modules, and packages of such, that may import them. Add one here only if it computes with them."""

CONTRACT_MAY_IMPORT: Final = {"pydantic", "job.contract"}
NOT_PURE: Final = {"os", "time", "random", "socket", "subprocess", "shutil", "tempfile", "threading", "uuid", "io"}
LAUNCH_MAY_IMPORT_OF_JOB: Final = {"job.contract", "job.storage", "job.logs", "job.dataset"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(source: str, name: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in it; for `from a import b` that is a.b."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=module, names=names, level=level):
                package = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join(package[: len(package) - level + 1]) if level else ""
                for alias in names:
                    yield node.lineno, ".".join(part for part in (base, module, alias.name) if part)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield node.lineno, target


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    return imports(path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py")


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def crossings(paths: list[Path], forbidden: object) -> list[str]:
    assert callable(forbidden)
    assert paths, "nothing to look at: has it moved?"
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for line, name in imports_of(path)
        if forbidden(name)
    ]


def test_this_test_sees_every_way_to_import() -> None:
    source = """
import torch.nn as nn
from torch import cuda
from . import sibling
from ..contract.layout import Key
if TYPE_CHECKING:
    from sky import Task
def later():
    import boto3, json
    importlib.import_module("peft")
    __import__("trl")
"""
    found = {name for _, name in imports(source, "job.dataset.render")}
    assert found == {
        *["torch.nn", "torch.cuda", "job.dataset.sibling", "job.contract.layout.Key", "sky.Task", "boto3", "json"],
        *["peft", "trl"],
    }
    assert {name for _, name in imports("from .file import X", "job.storage", is_package=True)} == {
        "job.storage.file.X"
    }


def test_the_contract_imports_itself_pydantic_and_the_standard_library() -> None:
    def foreign(name: str) -> bool:
        return not is_within(name, CONTRACT_MAY_IMPORT) and name.partition(".")[0] not in sys.stdlib_module_names

    assert crossings(modules("job/contract"), foreign) == []


def test_the_contract_can_do_nothing() -> None:
    assert crossings(modules("job/contract"), lambda name: is_within(name, NOT_PURE)) == []
    calls = {"now", "today", "utcnow", "getenv", "open", "print"}
    calls |= {"read_text", "read_bytes", "write_text", "write_bytes"}
    for path in modules("job/contract"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert called not in calls, f"{path.relative_to(ROOT)}:{node.lineno} calls {called}"


def test_what_launcher_and_job_share_never_imports_the_training_stack() -> None:
    shared = [ROOT / "job/logs.py", *modules("job/contract"), *modules("job/storage"), *modules("job/dataset")]
    assert crossings(shared, lambda name: is_within(name, TRAINING_STACK)) == []


def test_only_the_heavy_modules_import_torch_and_its_company() -> None:
    light = [path for path in modules("job") if not is_within(module_name(path), MAY_IMPORT_HEAVY)]
    assert crossings(light, lambda name: is_within(name, HEAVY)) == []


def test_the_job_never_imports_the_launcher_nor_skypilot() -> None:
    assert crossings(modules("job"), lambda name: is_within(name, {"launch", "sky"})) == []


def test_neither_imports_the_tests() -> None:
    assert crossings([*modules("job"), *modules("launch")], lambda name: is_within(name, {"tests"})) == []


def test_the_launcher_imports_of_the_job_only_what_they_share() -> None:
    def private(name: str) -> bool:
        return is_within(name, {"job"}) and not is_within(name, LAUNCH_MAY_IMPORT_OF_JOB)

    assert crossings(modules("launch"), private) == []


def test_the_launcher_never_imports_the_training_stack() -> None:
    assert crossings(modules("launch"), lambda name: is_within(name, TRAINING_STACK)) == []


def test_only_one_module_imports_skypilot() -> None:
    others = [path for path in modules("launch") if module_name(path) != "launch.skypilot"]
    assert crossings(others, lambda name: is_within(name, {"sky"})) == []


def test_only_the_stores_and_who_asks_ec2_import_boto3() -> None:
    may = {"launch.ec2"}
    everything = [*modules("job"), *modules("launch")]
    others = [path for path in everything if path.parent != ROOT / "job/storage" and module_name(path) not in may]
    assert crossings(others, lambda name: is_within(name, {"boto3", "botocore"})) == []


def test_the_folder_of_yaml_files_never_becomes_a_package_that_shadows_skypilot() -> None:
    assert list((ROOT / "sky").rglob("*.py")) == []


WITHOUT = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} may not be imported here")

blocked = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Blocker())
for name in sys.argv[2:]:
    importlib.import_module(name)
print(json.dumps(sorted(blocked & {name.partition(".")[0] for name in sys.modules})))
"""


def import_without(blocked: set[str], *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(sorted(blocked)), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["boto3", "torch"])
def test_the_blocker_blocks(name: str) -> None:
    done = import_without({name}, name)
    assert done.returncode == 1
    assert f"{name} may not be imported here" in done.stderr


def test_what_launcher_and_job_share_loads_without_the_training_stack_and_boto3() -> None:
    names = [module_name(path) for path in modules("job/contract") + modules("job/storage") + modules("job/dataset")]
    done = import_without({*TRAINING_STACK, "boto3", "botocore", "sky"}, "job.logs", *names)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    "name",
    [
        *["job.checkpoints", "job.notice", "job.metadata", "job.weights", "job.hub", "job.bucket"],
        *["job.download", "job.grace", "job.ending", "job.attempt"],
    ],
)
def test_saving_stopping_and_downloading_need_no_training_stack(name: str) -> None:
    done = import_without({*HEAVY, "boto3", "botocore", "sky"}, name)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_only_one_module_of_the_job_imports_huggingface_hub() -> None:
    others = [path for path in modules("job") if module_name(path) != "job.hub"]
    assert crossings(others, lambda name: is_within(name, {"huggingface_hub", "httpx", "hf_xet"})) == []


def test_the_command_loads_neither_the_training_stack_nor_skypilot_nor_boto3() -> None:
    done = import_without({*TRAINING_STACK, "boto3", "botocore", "sky"}, "launch.cli")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
