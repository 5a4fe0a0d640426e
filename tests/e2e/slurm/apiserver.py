"""An API server of SkyPilot's own for the test: its own home, its own port, managed jobs inside the server."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tests.e2e.slurm.cluster import PATH, USER, SlurmCluster
from tests.e2e.slurm.processes import MARK, end, wait_until
from tests.s3server import HOST, free_port

CLUSTER: Final = "ftjobtest"
"""What SkyPilot calls the cluster: `infra: slurm/ftjobtest`."""
HEALTH: Final = "/api/health"
START_SECONDS: Final = 120.0
TMP: Final = Path("/tmp")  # noqa: S108 - SkyPilot's own choice
IN_TMP: Final = {"jobs_ha_recovery.log", "pool_ha_recovery.log", "skypilot_graceful_shutdown.lock"}
"""What a server leaves there under fixed names."""

# The order of a login shell on the node: what is installed there by "curl | sh" elsewhere comes from a folder here.
CURL: Final = """\
#!/bin/bash
# SkyPilot installs uv on a node with: curl -LsSf https://astral.sh/uv/install.sh | UV_INSTALL_DIR=... sh
for word in "$@"; do
  case "$word" in *astral.sh/uv/install.sh*)
    echo 'mkdir -p "$UV_INSTALL_DIR" && cp {uv} "$UV_INSTALL_DIR/uv"'; exit 0 ;;
  esac
done
echo "there is no network for: curl $*" >&2
exit 6
"""
UV: Final = """\
#!/bin/bash
# SkyPilot's runtime on a node is the environment of the tests, not a Python from GitHub and packages from PyPI.
case "$1 $2" in
  "venv "*) for word in "$@"; do case "$word" in */skypilot-runtime) ln -sfn {venv} "$word"; exit 0 ;; esac; done ;;
  "-V "*) echo "uv 0"; exit 0 ;;
  "pip list") echo "skypilot {version}"; exit 0 ;;
  "pip install"|"pip uninstall") exit 0 ;;
esac
echo "$(date +%T) uv $*" >> {refused}
exit 1
"""

CONFIG: Final = """\
allowed_clouds: [slurm]
jobs: {{controller: {{consolidation_mode: true}}}}
slurm:
  provision_timeout: 60
  cluster_configs:
    {cluster}:
      workdir: {workdir}
      tmpdir: {tmpdir}
      pricing: {{cpu: 0.01, memory: 0.001, accelerators: {{H100: 2.5}}}}
"""
SSH_CONFIG: Final = """\
Host {cluster}
  HostName {host}
  Port {port}
  User {user}
  IdentityFile {key}
  IdentitiesOnly yes
"""
ACCELERATORS: Final = """\
AcceleratorName,Clouds
H100,"['AWS', 'GCP']"
"""
"""SkyPilot knows no accelerator without this table, which it would download."""


@dataclass(frozen=True)
class ManagedJob:
    """What SkyPilot's own database says of a managed job."""

    status: str
    recoveries: int


class ApiServer:
    """The server below `folder`, and the home of its clients."""

    def __init__(self, folder: Path, python: Path, cluster: SlurmCluster) -> None:
        self._folder, self._python, self._cluster = folder, python, cluster
        self.home: Final = folder / "home"
        self.port: Final = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._in_tmp = {name for name in IN_TMP if (TMP / name).exists()}

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, beyond its own environment, to talk to this server and to no other."""
        return {
            "HOME": str(self.home),
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self.port),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            # A client that finds no server starts one: never one that outlives the tests.
            "SKYPILOT_DISABLE_LOCAL_API_SERVER": "1",
        }

    def up(self) -> None:
        """Returns when the server answers.

        Raises:
            TimeoutError: it does not.
        """
        self._prepare_node()
        self._write_home()
        environ = self.environment | {
            "PATH": f"{self._python.parent}:{PATH}",
            MARK: str(self._folder),
            "TMPDIR": str(self._folder / "tmp"),
            "FTJOB_TEST_HEALTH_URL": f"http://{HOST}:{self.port}{HEALTH}",
            # SkyPilot starts one controller of jobs for each 0.8 GB that it believes to have, and workers by cores.
            "SKYPILOT_POD_MEMORY_GB_LIMIT": "6",
            "SKYPILOT_POD_CPU_CORE_LIMIT": "2",
        }
        del environ["SKYPILOT_DISABLE_LOCAL_API_SERVER"]
        log = self._cluster.log_folder / "api-server.log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [self._python, "-c", "import sky; sky.api_start(foreground=True)"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.home,
                start_new_session=True,
            )
        wait_until(lambda: self._answers(log), f"SkyPilot's API server answers, see {log}", seconds=START_SECONDS)

    def down(self) -> None:
        """Ends the server; what it started on its own is for whoever knows the mark."""
        if self._process is not None:
            end(self._process)
            self._process = None
        for name in IN_TMP - self._in_tmp:
            (TMP / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            user = (self.home / ".sky" / "user_hash").read_text().strip()
            shutil.rmtree(TMP / f"sky_ssh_{user}")  # sockets of ssh connections

    def managed_job(self, name: str) -> ManagedJob:
        """How the newest managed job of that name is, by the server's database: asking the server takes seconds."""
        path = self.home / ".sky" / "spot_jobs.db"
        asked = "select status, recovery_count from spot where task_name = ? order by spot_job_id desc"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
            row = database.execute(asked, (name,)).fetchone()
        return ManagedJob(*row) if row else ManagedJob("PENDING", 0)

    def _answers(self, log: Path) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise TimeoutError(f"SkyPilot's API server ended: {log.read_text()[-4000:]}")
        asked = http.client.HTTPConnection(HOST, self.port, timeout=5)
        with contextlib.closing(asked), contextlib.suppress(OSError, http.client.HTTPException):
            asked.request("GET", HEALTH)
            return asked.getresponse().status == http.HTTPStatus.OK
        return False

    def _prepare_node(self) -> None:
        """What stands in for the internet on the node: first on the path of the cluster's user."""
        shims, refused = self._folder / "shims", self._folder / "log" / "uv.log"
        shims.mkdir()
        shims.chmod(0o755)
        refused.touch()
        refused.chmod(0o666)
        uv = UV.format(venv=self._python.parents[1], version=version("skypilot"), refused=refused)
        for name, text in (("curl", CURL.format(uv=shims / "uv")), ("uv", uv)):
            (shims / name).write_text(text)
            (shims / name).chmod(0o755)
        for name in (".bashrc", ".profile"):
            (self._cluster.home / name).write_text(f"export PATH={shims}:/usr/local/bin:/usr/bin:/bin\n")
            shutil.chown(self._cluster.home / name, USER, USER)  # SkyPilot adds lines
        temporary = self._folder / "tmp"
        temporary.mkdir()
        temporary.chmod(0o1777)

    def _write_home(self) -> None:
        slots = {
            "cluster": CLUSTER,
            "host": HOST,
            "user": USER,
            "port": self._cluster.ssh_port,
            "key": self._cluster.ssh_key,
            "workdir": self._cluster.home,
            "tmpdir": self._folder / "tmp",
        }
        for name, text in {
            ".slurm/config": SSH_CONFIG.format(**slots),
            ".sky/config.yaml": CONFIG.format(**slots),
            ".sky/catalogs/v8/common/accelerators.csv": ACCELERATORS,
        }.items():
            path = self.home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
