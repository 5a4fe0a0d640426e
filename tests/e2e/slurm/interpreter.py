"""A Python that the cluster's user can run: the environment of the tests, linked together below their folder.

The tests may run in an environment that only its owner can reach, such as a pyenv Python below /root. Nodes need one
with SkyPilot, torch and this checkout, and SkyPilot's server one with a shim that must not come into the developer's.
Files are hard links where they can be, which takes seconds and no space; what may be written is a copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.e2e.slurm.processes import do

ROOT: Final = Path(__file__).parents[3]
OURS: Final = ("job", "launch")
SHIM: Final = Path(__file__).with_name("poll_faster.py")
EVERYBODY_READS: Final = 0o444


def make_interpreter(folder: Path) -> Path:
    """Build the environment in `folder`, which does not exist yet and which everybody can reach.

    Returns:
        Its interpreter. The shim that polls faster sleeps in it until POLL_FASTER_VARIABLE is set.
    """
    folder.mkdir()
    folder.chmod(0o755)
    base = _base_python(folder)
    do(base, "-m", "venv", "--without-pip", "--symlinks", folder / "venv")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    # Our own packages would be written through a link: what is there of ftjob is left out, and copied from here.
    link_tree(Path(sysconfig.get_path("purelib")), packages, keep=lambda name: not _is_ours(name))
    for name in OURS:
        shutil.copytree(ROOT / name, packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SHIM, packages / SHIM.name)
    (packages / "poll_faster.pth").write_text("import poll_faster\n")
    for path in [packages / SHIM.name, packages / "poll_faster.pth", *_everything_in(packages, OURS)]:
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else EVERYBODY_READS))
    python = folder / "venv" / "bin" / "python"
    # Without compiled modules "import sky" takes 12 s, and the server gives up on its own workers.
    compiled = [packages / name for name in ("sky", *OURS)]
    do(python, "-m", "compileall", "-q", *compiled)
    return python


def link_tree(source: Path, target: Path, *, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Everything in `source`, readable for everybody; `keep` says which names at its top."""
    for at, folders, files in os.walk(source):
        here = target / Path(at).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        here.chmod(0o755)
        if at == str(source):
            folders[:] = [name for name in folders if keep(name)]
            files = [name for name in files if keep(name)]
        for name in [*files, *(name for name in folders if (Path(at) / name).is_symlink())]:
            _link(Path(at) / name, here / name)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.stat().st_mode & EVERYBODY_READS == EVERYBODY_READS:
        with contextlib.suppress(OSError):  # another file system, or too many links
            os.link(source, target)
            return
    shutil.copy2(source, target)
    target.chmod(target.stat().st_mode | EVERYBODY_READS | (0o111 if os.access(source, os.X_OK) else 0))


def _base_python(folder: Path) -> Path:
    """The interpreter behind this environment, or a copy of it where others cannot reach it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = Path(sys.base_prefix).resolve()
    binary = (prefix / "bin" / version).resolve()
    if all(parent.stat().st_mode & 0o001 for parent in binary.parents):
        return binary
    copy = folder / "base"
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": str(prefix), "base": str(prefix)}))
    link_tree(library, copy / "lib" / version, keep=lambda name: name not in ("site-packages", "test"))
    shared = sorted((prefix / "lib").glob("libpython*"))
    for path in shared:
        _link(path, copy / "lib" / path.name)
    (copy / "bin").mkdir()
    (copy / "bin").chmod(0o755)
    shutil.copy(binary, copy / "bin" / version)
    if shared:  # the binary names the folder of its library, which is out of reach
        do("patchelf", "--set-rpath", "$ORIGIN/../lib", copy / "bin" / version)
    return copy / "bin" / version


def _is_ours(name: str) -> bool:
    return name in OURS or name.startswith("__editable__")


def _everything_in(packages: Path, names: tuple[str, ...]) -> list[Path]:
    return [path for name in names for path in (packages / name, *(packages / name).rglob("*"))]
