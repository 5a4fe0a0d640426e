"""One host that is everything: a Slurm cluster, SkyPilot's API server, and the Python that jobs run with.

It changes the machine while it is up: packages, a user, two names in /etc/hosts. Only the packages stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tests.e2e.slurm.apiserver import ApiServer
from tests.e2e.slurm.cluster import PACKAGES, SlurmCluster, forget_nodes, remove_user
from tests.e2e.slurm.interpreter import make_interpreter
from tests.e2e.slurm.processes import PREFIX, command_line, kill_all, marked, of_user
from tests.machine import apt_install

LOG_LINES: Final = 30


class SlurmHost:
    """All of it below one folder, which everybody can reach.

    Args:
        folder: exists, is empty and belongs to this host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self.python: Final = folder / "python" / "venv" / "bin" / "python"
        """Runs ftjob's job as the cluster's user: with torch, SkyPilot and this checkout."""
        self.cluster: Final = SlurmCluster(folder)
        self.server: Final = ApiServer(folder, self.python, self.cluster)

    @property
    def environment(self) -> dict[str, str]:
        """What clients of SkyPilot, `ftjob` among them, need beyond their own environment."""
        return self.server.environment

    def up(self) -> None:
        """Raises TimeoutError or subprocess.SubprocessError when a part does not come up; `down` cleans up after it."""
        assert make_interpreter(self.folder / "python") == self.python
        self.cluster.up()
        self.server.up()

    def down(self) -> None:
        """Nothing of it is left but its folder. Idempotent."""
        self.server.down()
        self.cluster.down()
        # Controllers of jobs outlive the server that started them.
        kill_all(marked)

    def trainers(self) -> list[int]:
        """The pids of the jobs of ftjob that run on the cluster."""
        return [pid for pid in of_user(self.cluster.uid) if command_line(pid)[1:4] == ["-P", "-m", "job"]]

    def said(self, run_id: str) -> list[dict[str, Any]]:
        """The events of a run that its jobs have written on the nodes, as long as SkyPilot keeps them there."""
        events = []
        for path in self.cluster.home.glob(".sky_clusters/*/sky_logs/*/tasks/run.log"):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):  # other output, or a line that is being written
                    event = json.loads(line)
                    if isinstance(event, dict) and event.get("run_id") == run_id:
                        events.append(event)
        return events

    def logs(self) -> list[Path]:
        """Everything that the parts wrote: daemons, API server, controllers, SkyPilot on the nodes."""
        places = (
            (self.cluster.log_folder, "*.log"),
            (self.server.home, "sky_logs/**/*.log"),
            (self.server.home, ".sky/**/*.log"),
            (self.cluster.home, "**/*.log"),
            (self.cluster.home, "**/slurm-*.out"),
        )
        return sorted({path for folder, pattern in places for path in folder.glob(pattern) if path.is_file()})

    def report(self) -> str:
        """The last lines of every log."""
        parts = []
        for path in self.logs():
            with contextlib.suppress(OSError):
                last = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
                parts += [f"--- {path.relative_to(self.folder)}", *last]
        return "\n".join(parts)

    def save_logs(self, target: Path) -> None:
        """Copy every log to where it outlives the host."""
        for path in self.logs():
            with contextlib.suppress(OSError):
                copy = target / path.relative_to(self.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)


@contextlib.contextmanager
def slurm_host(logs: Path) -> Iterator[SlurmHost]:
    """A host that is up, and gone afterwards, whatever happens. One at a time on a machine.

    Args:
        logs: an empty folder, for the logs of a host that does not come up.
    """
    with (Path(tempfile.gettempdir()) / "ftjob-tests-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Of tests that were killed: whoever holds the lock owns all there is.
        kill_all(marked)
        remove_user()
        forget_nodes()
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/"):
            shutil.rmtree(path)
        apt_install(*PACKAGES)
        # Not below pytest's folder, which others cannot reach.
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        folder.chmod(0o755)
        host = SlurmHost(folder)
        try:
            try:
                host.up()
            except BaseException:
                host.save_logs(logs)
                raise
            yield host
        finally:
            host.down()
            shutil.rmtree(folder)
