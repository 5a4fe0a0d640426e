"""For tests marked `machine`, which change the machine they run on: whether they may, and its packages."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

DISPOSABLE: Final = "FTJOB_DISPOSABLE_MACHINE"
APT_SECONDS: Final = 900.0
"""For an installation: some hundred megabytes through a slow mirror."""


def require_disposable_machine() -> None:
    """Skip the test unless this machine may be changed: a CI machine, or one that is said to be disposable."""
    if os.environ.get("CI") != "true" and os.environ.get(DISPOSABLE) != "1":
        pytest.skip(f"changes the machine: runs where CI=true or {DISPOSABLE}=1")
    if os.geteuid() != 0:
        pytest.skip("changes the machine: needs root")


@contextmanager
def _machine_lock() -> Iterator[None]:
    """Held by one test process at a time; freed by the kernel when its owner dies."""
    with (Path(tempfile.gettempdir()) / "ftjob-tests-machine.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_installed(package: str) -> bool:
    command = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout == "installed"


def apt_install(*packages: str) -> None:
    """Install what is missing of these Debian packages; they stay.

    Raises:
        subprocess.CalledProcessError: apt refused; its words are on stderr.
    """
    with _machine_lock():
        missing = [package for package in packages if not _is_installed(package)]
        if not missing:
            return
        environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        # A list that is missing or old names versions that the mirror no longer has.
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
            command = ["apt-get", "--quiet", "--option=DPkg::Lock::Timeout=600", *arguments]
            subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, timeout=APT_SECONDS, check=True)
