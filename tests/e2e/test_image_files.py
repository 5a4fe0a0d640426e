"""Promise: the files that the image is made from agree with each other, and with pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[2]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
LOCKS: Final = ("requirements.lock", "requirements.cpu.lock")


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of that name, in order."""
    return [line.split(maxsplit=1)[1].strip() for line in DOCKERFILE.splitlines() if line.startswith(name + " ")]


def locked(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Package -> its requirements (one for each kind of machine), each with its digests."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            written, *hashes = re.split(r"\s+--hash=", line.strip())
            requirement = Requirement(written)
            found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_what_the_project_asks_for(lock: str) -> None:
    packages = locked(lock)
    for written in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["job"]):
        asked = Requirement(written)
        for requirement, _ in packages[canonicalize_name(asked.name)]:
            (version,) = requirement.specifier
            assert asked.specifier.contains(version.version), f"{requirement} is not {asked}: write {lock} anew"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_is_pinned_with_digests(lock: str) -> None:
    for requirements in locked(lock).values():
        for requirement, hashes in requirements:
            assert [version.operator for version in requirement.specifier] == ["=="]
            assert hashes
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes)


def test_the_default_lock_is_for_gpus_and_the_other_one_differs_in_torch_alone() -> None:
    assert "LOCK=requirements.lock" in instructions("ARG")
    gpu, cpu = (locked(name) for name in LOCKS)
    assert str(gpu.pop("torch")[0][0].specifier) + "+cpu" == str(cpu.pop("torch")[0][0].specifier)
    only_gpu = set(gpu) - set(cpu)
    assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13"} <= only_gpu
    assert all(name.startswith(("cuda-", "nvidia-", "triton")) for name in only_gpu)
    assert cpu == {name: requirements for name, requirements in gpu.items() if name not in only_gpu}


def test_the_last_stage_is_the_job_and_nobody_in_particular() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert last.startswith("\nFROM common AS job\n")
    assert instructions("USER")[-1] == "10001:10001"
    assert "\nUSER 10001:10001" in last
    assert '\nENTRYPOINT ["python", "-P", "-m", "job"]' in last


def test_the_version_in_the_label_is_the_projects() -> None:
    assert f"VERSION={PROJECT['version']}" in instructions("ARG")


def test_what_enters_the_build_is_what_is_copied() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    copied = {name for line in instructions("COPY") if not line.startswith("--from") for name in line.split()[:-1]}
    copied = copied - {"${LOCK}"} | set(LOCKS)
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert {line for line in lines[1:] if not line.startswith("!")} == {"**/.*", "**/__pycache__"}


def test_hadolint_has_nothing_to_say() -> None:
    command = [Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
