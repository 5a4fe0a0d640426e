"""A real S3 server with real accounts: Ceph's object gateway, its monitor and one disk, on the loopback interface.

What moto cannot show: wrong keys and missing rights are refused, what was answered is on the disk, and a gateway that
was killed comes back with all of it. The daemons run as processes of ours in a folder of ours, on ports of ours.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import boto3

from tests.machine import apt_install
from tests.s3server import BUCKET, HOST, Proxy, cloudless

PACKAGES: Final = ("ceph-common", "ceph-mon", "ceph-osd", "radosgw")
DISK_BYTES: Final = 10 * 2**30
"""Of the sparse file that stands in for a disk."""
START_SECONDS: Final = 120.0
_COMMAND_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.1

# The daemons trust each other (one machine, one owner); the accounts of the object gateway are real.
_CONFIG: Final = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port},v1:127.0.0.1:{mon_port_v1}
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pgp num = 4
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/$name.log
crash dir = {folder}/crash
osd memory target = 939524096
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = {disk}
[client.rgw.a]
rgw data = {folder}/rgw
keyring = {folder}/rgw/keyring
rgw frontends = beast endpoint=127.0.0.1:{port}
ms mon client mode = crc
rgw run sync thread = false
"""


@dataclass(frozen=True)
class Account:
    """A user of the object gateway."""

    name: str
    key_id: str
    secret: str

    @property
    def variables(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.key_id, "AWS_SECRET_ACCESS_KEY": self.secret}


OWNER: Final = Account("owner", "FTJOBOWNER", "owner-secret-0123456789")
"""Owns the bucket, and may do everything with it."""
GUEST: Final = Account("guest", "FTJOBGUEST", "guest-secret-0123456789")
"""May do what the bucket's policy grants; nothing to begin with."""


class TriggerProxy(Proxy):
    """A proxy that does something in the very moment when so many more bytes have passed, and passes them all."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._bytes_left = 0
        self._action: Callable[[], None] | None = None
        super().__init__(target)

    def after(self, size: int, action: Callable[[], None]) -> None:
        """Do it, once, when so many more bytes have passed; both directions counted."""
        with self._lock:
            self._bytes_left, self._action = size, action

    def disarm(self) -> None:
        """Do nothing any more."""
        with self._lock:
            self._action = None

    def _spend(self, size: int) -> int | None:
        with self._lock:
            self._bytes_left -= size
            action = self._action if self._bytes_left <= 0 else None
            if action is not None:
                action()
                self._action = None
        return super()._spend(size)


class Ceph:
    """One monitor, one disk, one object gateway, two accounts, one bucket of the owner's.

    Args:
        folder: short: the paths of unix sockets in it must stay below 108 bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "ceph.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._output: IO[bytes] | None = None
        self._granted: set[str] = set()
        mon, mon_v1, self._port = _free_ports(3)
        self._addresses = f"[v2:{HOST}:{mon},v1:{HOST}:{mon_v1}]"
        self._fsid = str(uuid.uuid4())
        for name in ("mon", "osd", "rgw", "run", "crash"):
            (folder / name).mkdir(parents=True)
        self._config.write_text(
            _CONFIG.format(
                fsid=self._fsid,
                mon_port=mon,
                mon_port_v1=mon_v1,
                port=self._port,
                folder=folder,
                disk=DISK_BYTES,
            )
        )
        self.proxy = TriggerProxy((HOST, self._port))

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.proxy.port}"

    def environment(self, account: Account = OWNER) -> dict[str, str]:
        """What a process needs to use this server as that account."""
        return {**cloudless(), "AWS_ENDPOINT_URL": self.endpoint, **account.variables}

    def uri(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def start(self) -> None:
        """Returns when the gateway answers, with an empty bucket.

        Raises:
            RuntimeError: a daemon did not start; with what it said.
        """
        self._output = (self._folder / "output.txt").open("ab")
        self._start_monitor()
        self._start_disk()
        for account in (OWNER, GUEST):
            self._admin(
                *["user", "create", "--uid", account.name, "--display-name", account.name],
                *["--access-key", account.key_id, "--secret-key", account.secret],
            )
        self.start_gateway()
        with self.client() as client:
            client.create_bucket(Bucket=BUCKET)

    def start_gateway(self) -> None:
        """Returns when it answers."""
        self._spawn("radosgw", "-n", "client.rgw.a")

        def answers() -> bool:
            # It takes connections before it can serve them.
            connection = http.client.HTTPConnection(HOST, self._port, timeout=2)
            try:
                connection.request("GET", "/")
                return connection.getresponse().status == http.client.OK
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()

        self._wait("radosgw", answers)

    def kill_gateway(self) -> None:
        """SIGKILL, whatever it is doing."""
        gateway = self._daemons.pop("radosgw")
        gateway.send_signal(signal.SIGKILL)
        gateway.wait()

    @property
    def gateway_lives(self) -> bool:
        return "radosgw" in self._daemons

    @contextlib.contextmanager
    def client(self, account: Account = OWNER) -> Iterator[Any]:
        """A client of boto3's own, straight to the gateway."""
        with contextlib.closing(
            boto3.client(
                "s3",
                endpoint_url=f"http://{HOST}:{self._port}",
                region_name="us-east-1",
                aws_access_key_id=account.key_id,
                aws_secret_access_key=account.secret,
            )
        ) as made:
            yield made

    def allow_guest(self, *actions: str) -> None:
        """Replace what the guest may do with the bucket and all in it, such as "s3:GetObject"."""
        if set(actions) == self._granted:
            # Every change of a policy waits for a gateway that was killed, for half a minute.
            return
        self._granted = set(actions)
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{GUEST.name}"]},
            "Action": list(actions),
            "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        with self.client() as client:
            if actions:
                client.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))
            else:
                client.delete_bucket_policy(Bucket=BUCKET)

    def close(self) -> None:
        """Leave no process behind."""
        self.proxy.close()
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        if self._output is not None:
            self._output.close()

    def _start_monitor(self) -> None:
        map_file = self._folder / "monmap"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._addresses, str(map_file))
        self._ceph("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(map_file))
        self._spawn("ceph-mon", "-i", "a")
        self._wait("ceph-mon", lambda: bool(self._asked("status")))

    def _start_disk(self) -> None:
        disk = str(uuid.uuid4())
        self._ceph("ceph", "osd", "new", disk)
        self._ceph("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._spawn("ceph-osd", "-i", "0")
        self._wait(
            "ceph-osd", lambda: json.loads(self._asked("osd", "stat", "--format=json") or "{}")["num_up_osds"] == 1
        )
        # Even where nobody asks for credentials, a client reads its keyring.
        self._run(
            "ceph-authtool", "--create-keyring", str(self._folder / "rgw/keyring"), "--gen-key", "-n", "client.rgw.a"
        )

    def _admin(self, *arguments: str) -> None:
        self._ceph("radosgw-admin", "-n", "client.rgw.a", *arguments)

    def _asked(self, *arguments: str) -> str:
        """The cluster's answer; empty while it does not answer."""
        command = ["ceph", "--conf", str(self._config), "--connect-timeout", "5", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
        return done.stdout if done.returncode == 0 else ""

    def _ceph(self, program: str, *arguments: str) -> None:
        self._run(program, "--conf", str(self._config), *arguments)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} failed: {done.stderr[:2000]}")

    def _spawn(self, program: str, *arguments: str) -> None:
        command = [program, "--conf", str(self._config), *arguments, "--foreground"]
        self._daemons[program] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, start_new_session=True
        )

    def _wait(self, program: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._daemons[program].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not start: {(self._folder / 'output.txt').read_text()[-3000:]}")
            time.sleep(_LOOK_SECONDS)


def install_ceph() -> None:
    """Debian's own packages. Nothing is started: there is no configuration of theirs."""
    apt_install(*PACKAGES)


def _free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to outgoing connections: one of a dead gateway would not stay free."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1_000):
        if len(found) == count:
            break
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            found.append(port)
    return found
