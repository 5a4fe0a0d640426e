"""A Slurm cluster on this host: munge, sshd, slurmctld and two nodes with pretended GPUs, all on loopback.

The nodes are two slurmd of the same machine. Jobs run as a user of their own, who is there only as long as the cluster.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Final

from tests.e2e.slurm.processes import MARK, do, end, kill_all, of_user, wait_until
from tests.s3server import HOST, free_port

PACKAGES: Final = (
    *("slurmctld", "slurmd", "slurm-client", "munge", "openssh-server", "openssh-client"),
    *("rsync", "socat", "netcat-openbsd", "procps", "iproute2", "patchelf"),
)
"""Debian's names. SkyPilot reaches nodes through ssh, rsync, socat and nc."""

USER: Final = "ftjobslurm"
NODES: Final = ("ftjobgpu0", "ftjobgpu1")
GPUS: Final = 2
HOSTS: Final = Path("/etc/hosts")
HOSTS_LINE: Final = f"{HOST} {' '.join(NODES)}\n"
SSHD_RUN: Final = Path("/run/sshd")
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SSHD_CONFIG: Final = Template("""\
Port $ssh_port
ListenAddress 127.0.0.1
HostKey $keys/host
PidFile none
AuthorizedKeysFile $keys/id.pub
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100:30:200
MaxSessions 100
Subsystem sftp internal-sftp
PrintMotd no
SetEnv SLURM_CONF=$etc/slurm.conf
""")

SLURM_CONF: Final = Template("""\
ClusterName=ftjob
SlurmctldHost=$host($address)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$run/munge.socket
CryptoType=crypto/munge
SlurmctldPort=$slurmctld_port
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=10
InactiveLimit=0
Waittime=0
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=10
PreemptMode=OFF
PropagateResourceLimits=NONE
PlugStackConfig=/dev/null
$nodes
PartitionName=spot Nodes=$names Default=YES MaxTime=24:00:00 DefaultTime=01:00:00 State=UP OverSubscribe=NO
""")


class SlurmCluster:
    """The cluster below `folder`, which everybody can reach. `down` undoes `up`, also after a failed one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._etc, self._run, self._keys = folder / "etc", folder / "run", folder / "keys"
        self.log_folder: Final = folder / "log"
        self.home: Final = folder / "home-of-user"
        """Of the cluster's user."""
        self.ssh_key: Final = self._keys / "id"
        self.ssh_port: Final = free_port()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._made_sshd_run = False

    @property
    def uid(self) -> int:
        return pwd.getpwnam(USER).pw_uid

    def up(self) -> None:
        """Returns when both nodes are idle and the user can log in.

        Raises:
            TimeoutError: a daemon does not come up; its log tells why.
        """
        for path in (self._etc, self._run, self._keys, self.log_folder, self._folder / "state", self._folder / "spool"):
            path.mkdir(mode=0o755)
        self._add_user()
        # SkyPilot's executor on the node resolves the node's own name.
        with HOSTS.open("a") as file:
            file.write(HOSTS_LINE)
        self._start_munge()
        self._start_sshd()
        self._start_slurm()

    def down(self) -> None:
        """No process, no user, and /etc as it was. Idempotent."""
        with contextlib.suppress(subprocess.SubprocessError):  # the controller may never have come up
            self.run("scancel", "--user", USER, "--signal=KILL", seconds=10)
        for process in reversed(self._daemons.values()):
            end(process)
        self._daemons.clear()
        remove_user()
        if self._made_sshd_run:
            SSHD_RUN.rmdir()
            self._made_sshd_run = False
        forget_nodes()

    # ------------------------------------------------------------------------------------------- what breaks the world

    def jobs(self) -> list[int]:
        """Ids of the Slurm jobs that wait or run."""
        return [int(line) for line in self.run("squeue", "--noheader", "--format=%i").split()]

    def node_of(self, job: int) -> str:
        """The node that a job runs on; empty while it waits."""
        return self.run("squeue", "--noheader", "--format=%N", f"--jobs={job}").strip()

    def cancel(self, job: int) -> None:
        """Take a job's node from it, with the notice that Slurm gives: TERM, ten seconds, KILL."""
        self.run("scancel", str(job))

    def take_down(self, node: str) -> None:
        """The node is gone, and everything that ran on it, without a notice."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=spot")
        # Slurm does not ask a node that is down to end its jobs, and this one has not really lost its power.
        kill_all(lambda: self._processes_on(node))

    def bring_up(self, node: str) -> None:
        """The node takes jobs again. Idempotent."""
        if self._state(node).startswith("down"):
            self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def _state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").strip()

    def _processes_on(self, node: str) -> Iterator[int]:
        """What the user runs on one node: Slurm tells each process which node it is on."""
        sign = f"SLURMD_NODENAME={node}".encode()
        for pid in of_user(self.uid):
            with contextlib.suppress(OSError):
                if sign in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    yield pid

    def run(self, *command: str, seconds: float = 30) -> str:
        """What a Slurm command prints.

        Raises:
            subprocess.SubprocessError: it failed, or did not answer in time.
        """
        return subprocess.run(
            command, env=self._environ(), stdout=subprocess.PIPE, text=True, timeout=seconds, check=True
        ).stdout

    # --------------------------------------------------------------------------------------------------- its parts

    def _environ(self) -> dict[str, str]:
        return {"PATH": PATH, "SLURM_CONF": str(self._etc / "slurm.conf"), MARK: str(self._folder)}

    def _start(self, name: str, *command: str | Path) -> None:
        with (self.log_folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )

    def _wait(self, name: str, probe: Sequence[str | Path], answer: str = "") -> None:
        def answers() -> bool:
            code = self._daemons[name].poll()
            if code is not None:
                raise TimeoutError(f"{name} ended with {code}: {(self.log_folder / f'{name}.log').read_text()}")
            asked = subprocess.run(probe, env=self._environ(), capture_output=True, text=True, check=False)
            return asked.returncode == 0 and answer in asked.stdout

        wait_until(answers, f"{name} answers", seconds=60)

    def _add_user(self) -> None:
        # -p "*": sshd without PAM refuses an account that is locked ("!"), as new ones are.
        do("useradd", "--no-create-home", "--home-dir", self.home, "--shell", "/bin/bash", "-p", "*", USER)
        self.home.mkdir(mode=0o755)
        shutil.chown(self.home, USER, USER)

    def _start_munge(self) -> None:
        key = self._etc / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        socket_path = self._run / "munge.socket"
        self._start(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}"),
            *(f"--pid-file={self._run}/munged.pid", f"--seed-file={self._run}/munged.seed"),
        )
        self._wait("munged", ["munge", f"--socket={socket_path}", "--no-input"])

    def _start_sshd(self) -> None:
        for name in ("id", "host"):
            do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._keys / name)
        self._made_sshd_run = not SSHD_RUN.exists()
        SSHD_RUN.mkdir(exist_ok=True)  # where sshd locks itself in; Debian's service makes it at boot
        config = self._etc / "sshd_config"
        config.write_text(SSHD_CONFIG.substitute(ssh_port=self.ssh_port, keys=self._keys, etc=self._etc))
        self._start("sshd", "/usr/sbin/sshd", "-D", "-e", "-f", config)
        options = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        self._wait("sshd", ["ssh", *options, "-p", str(self.ssh_port), "-i", self.ssh_key, f"{USER}@{HOST}", "true"])

    def _start_slurm(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr={HOST} Port={free_port()} CPUs=64 RealMemory=200000"
            f" Gres=gpu:h100:{GPUS} State=UNKNOWN"
            for node in NODES
        ]
        text = SLURM_CONF.substitute(
            folder=self._folder,
            run=self._run,
            host=host,
            address=HOST,
            slurmctld_port=free_port(),
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (self._etc / "slurm.conf").write_text(text)
        # Slurm wants a device for each GPU; a second /dev/null will do.
        devices = self._folder / "dev"
        devices.mkdir(mode=0o755)
        lines = []
        for node in NODES:
            (self._folder / "spool" / node).mkdir()
            for number in range(GPUS):
                os.mknod(devices / f"{node}-{number}", 0o020666, os.makedev(1, 3))
            lines.append(f"NodeName={node} Name=gpu Type=h100 File={devices}/{node}-[0-{GPUS - 1}]\n")
        (self._etc / "gres.conf").write_text("".join(lines))
        self._start("slurmctld", "slurmctld", "-D", "-f", self._etc / "slurm.conf")
        for node in NODES:
            self._start(f"slurmd-{node}", "slurmd", "-D", "-f", self._etc / "slurm.conf", "-N", node)
        for node in NODES:
            self._wait(f"slurmd-{node}", ["sinfo", "--noheader", f"--nodes={node}", "--format=%T"], "idle")


def remove_user() -> None:
    """End everything that the cluster's user runs, then remove the user. Idempotent."""
    try:
        uid = pwd.getpwnam(USER).pw_uid
    except KeyError:
        return
    kill_all(lambda: of_user(uid))
    for path in Path(tempfile.gettempdir()).iterdir():
        if path.lstat().st_uid == uid:  # SkyPilot's scripts, on the node
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    do("userdel", USER)


def forget_nodes() -> None:
    """Take the nodes out of /etc/hosts. Written in place: containers mount this file, and it cannot be replaced."""
    text = HOSTS.read_text()
    if HOSTS_LINE in text:
        HOSTS.write_text(text.replace(HOSTS_LINE, ""))
