"""Images and containers without a daemon or a registry: buildah and podman, with a storage of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.machine import apt_install

PACKAGES: Final = ("buildah", "podman", "crun", "conmon", "catatonit", "debootstrap", "uidmap")
BASE: Final = "docker.io/library/python:3.12-slim-bookworm"
"""The name that the Dockerfile asks for."""

# What stands in for it: Debian's own Python. The headers are what the real one has too.
_DEBIAN: Final = "bookworm"
_BASE_PACKAGES: Final = "ca-certificates,libpython3-dev,python3,python3-venv"

# crun refuses the mix of both kinds of cgroups that some machines have: it gets a view without the new kind.
_PRIVATE: Final = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    'if mountpoint --quiet /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi; exec "$@"',
    "sh",
)


@dataclass(frozen=True)
class PipSettings:
    """This machine's settings of pip as an image's build needs them.

    Attributes:
        conf: a pip.conf, with the certificates at /run/secrets/ca.pem.
        ca: the file with the certificates; None for those that pip brings.
        folders: of packages, which `conf` names; the build must see them at the same paths.
    """

    conf: str
    ca: Path | None
    folders: tuple[Path, ...]

    @classmethod
    def here(cls) -> PipSettings:
        """What pip itself says that it has been told, by files and by the environment."""
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        )
        told = dict(re.findall(r"^(?:[a-z]+|:env:)\.([a-z-]+)='(.*)'$", asked.stdout, re.MULTILINE))
        conf = {key: told[key] for key in ("index-url", "proxy", "timeout", "trusted-host") if key in told}
        indexes = [url for url in told.get("extra-index-url", "").split() if url.startswith("http")]
        if indexes:
            conf["extra-index-url"] = " ".join(indexes)
        folders = tuple(Path(link) for link in told.get("find-links", "").split() if Path(link).is_dir())
        if folders:
            conf["find-links"] = " ".join(map(str, folders))
        ca = Path(told["cert"]) if "cert" in told else None
        if ca is not None:
            conf["cert"] = "/run/secrets/ca.pem"
        lines = ["[global]", *(f"{key} = {value}" for key, value in conf.items())]
        return cls("\n".join(lines) + "\n", ca, folders)

    @property
    def has_torch_for_cpu(self) -> bool:
        return any(any(folder.glob("torch-*+cpu-*.whl")) for folder in self.folders)


@dataclass(frozen=True)
class Containers:
    """A storage of images and containers. Needs root.

    Args:
        folder: of the storage; on a file system that overlayfs can lie on.
    """

    folder: Path

    @property
    def _environ(self) -> dict[str, str]:
        registries = self.folder / "registries.conf"
        registries.write_text("unqualified-search-registries = []\n")
        return os.environ | {"CONTAINERS_REGISTRIES_CONF": str(registries), "BUILDAH_ISOLATION": "chroot"}

    def command(self, tool: str, *arguments: str | Path) -> list[str]:
        """The whole command line of buildah or podman on this storage."""
        storage = ("--root", self.folder / "graph", "--runroot", self.folder / "run", "--storage-driver", "overlay")
        return [tool, *map(str, storage), *map(str, arguments)]

    def ask(self, tool: str, *arguments: str | Path) -> str:
        """What a command says on stdout, stripped. Raises CalledProcessError; its words are on stderr."""
        command = self.command(tool, *arguments)
        return subprocess.run(command, env=self._environ, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    def build(self, context: Path, *arguments: str | Path, tag: str) -> None:
        """Build a Dockerfile; what it says is on stderr."""
        fixed = ("bud", "--pull=never", "--network", "host", "--layers", "--tag", tag)
        subprocess.run(self.command("buildah", *fixed, *arguments, context), env=self._environ, stdout=2, check=True)

    def start(self, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """`podman run` with these arguments; the container's stdout and stderr go to a file."""
        fixed = ("run", "--rm", "--pull=never", "--network", "host", "--cgroups=disabled", "--runtime", "crun")
        # The defaults are more than a container may have to raise its own limits to.
        limits = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096")
        command = [*_PRIVATE, *self.command("podman", *fixed, *limits, *arguments)]
        with log.open("wb") as file:
            return subprocess.Popen(command, env=self._environ, stdout=file, stderr=file)

    def run(self, *arguments: str | Path, log: Path, seconds: float = 300) -> int:
        """The same to its end; the exit code."""
        process = self.start(*arguments, log=log)
        try:
            return process.wait(seconds)
        finally:
            process.kill()
            process.wait()

    def inspect(self, image: str) -> dict[str, Any]:
        (found,) = json.loads(self.ask("podman", "image", "inspect", image))
        assert isinstance(found, dict)
        return found

    def layers(self, image: str) -> list[Path]:
        """The folders of an image's layers, from the lowest: also what a later layer has deleted is in them."""
        known = {
            layer["diff-digest"]: layer["id"]
            for layer in json.loads((self.folder / "graph" / "overlay-layers" / "layers.json").read_bytes())
            if "diff-digest" in layer
        }
        digests = self.inspect(image)["RootFS"]["Layers"]
        return [self.folder / "graph" / "overlay" / known[digest] / "diff" for digest in digests]

    def make_base(self) -> None:
        """Have the stand-in of the base image under its name."""
        container = self.ask("buildah", "from", "scratch")
        self.ask("buildah", "add", "--quiet", container, _debian(), "/")
        self.ask(
            "buildah", "config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container
        )
        self.ask("buildah", "commit", "--quiet", "--rm", container, BASE)

    def remove(self) -> None:
        """Stop and delete everything."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ask("podman", "rm", "--all", "--force", "--time", "0")
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ask("buildah", "rm", "--all")
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(f"{self.folder}/")), reverse=True):
            command = ["umount", "--lazy", path]
            subprocess.run(command, check=True)  # what is mounted here must not be deleted
        shutil.rmtree(self.folder, ignore_errors=True)


def _debian() -> Path:
    """A tar of a minimal Debian; kept between test runs, since making it takes minutes."""
    key = hashlib.sha256(f"{_DEBIAN} {_BASE_PACKAGES}".encode()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    tar = caches / "ftjob-tests" / f"{_DEBIAN}-{key}.tar"
    if tar.exists():
        return tar
    tar.parent.mkdir(parents=True, exist_ok=True)
    making = tar.with_suffix(f".{os.getpid()}")
    try:
        command = ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _DEBIAN, str(making)]
        subprocess.run(command, stdout=2, check=True)
        for cached in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(making / cached)
            (making / cached).mkdir()
        whole = making.with_name(f"{making.name}.tar")
        pack = [
            "tar",
            "--create",
            "--numeric-owner",
            "--one-file-system",
            f"--file={whole}",
            f"--directory={making}",
            ".",
        ]
        subprocess.run(pack, check=True)
        whole.rename(tar)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return tar


def install() -> None:
    """Have buildah and podman on this machine."""
    apt_install(*PACKAGES)
