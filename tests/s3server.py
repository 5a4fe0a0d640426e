"""A real S3 server (moto) as a process of its own, behind a TCP proxy that can be cut."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import boto3

HOST: Final = "127.0.0.1"
BUCKET: Final = "ftjob-test"


class Proxy:
    """Passes bytes between its own port and a server's, until it is cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._left: int | None = None
        self._cuts_then = True
        self.breaks = 0
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = _listen(0)
        self.port: Final = int(self._listener.getsockname()[1])
        self._start(self._accept, self._listener)

    def cut(self) -> None:
        """From now on connections are refused; those there are break."""
        listener, self._listener = self._listener, None
        if listener is not None:
            _close(listener)
        self._break()

    def mend(self) -> None:
        """Connections work again, on the same port."""
        self._left = None
        if self._listener is None:
            self._listener = _listen(self.port)
            self._start(self._accept, self._listener)

    def cut_after(self, size: int) -> None:
        """Cut when so many more bytes, both directions counted, have passed."""
        self._left, self._cuts_then = size, True

    def break_after(self, size: int) -> None:
        """Break the connections there are when so many more bytes have passed; new ones work at once."""
        self._left, self._cuts_then = size, False

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)

    def _start(self, target: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [old for old in self._threads if old.is_alive()] + [thread]
        thread.start()

    def _break(self) -> None:
        with self._lock:
            for connection in self._open:
                _close(connection)
            self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # cut
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                _close(client)
                continue
            server.settimeout(None)
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            self._start(self._pump, client, server)
            self._start(self._pump, server, client)
            if self._listener is not listener:
                self._break()  # cut while this connection was made

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                last = self._spend(len(data))
                if last is not None:
                    sink.sendall(data[:last])
                    if self._cuts_then:
                        self.cut()
                    self._break()
                    return
                sink.sendall(data)
        with self._lock:
            for connection in (source, sink):
                self._open.discard(connection)
                _close(connection)

    def _spend(self, size: int) -> int | None:
        """How many of these bytes are the last to pass, for exactly one of several connections; None: all pass."""
        with self._lock:
            if self._left is None:
                return None
            last, self._left = self._left, self._left - size
            if self._left > 0:
                return None
            self._left = None
            self.breaks += 1
            return last


class S3Server:
    """moto's S3 server, and one bucket. All objects are lost when it is killed; `cut` and `mend` keep them."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self.proxy = Proxy((HOST, self._port))

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL should be."""
        return f"http://{HOST}:{self.proxy.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this server, and nobody's real account."""
        return {
            **cloudless(),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }

    def uri(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def start(self) -> None:
        """Returns when it answers, with an empty bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self._port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **cloudless()})
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self._port), timeout=1):
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto did not start: {self._log.read_text()}")
            time.sleep(0.05)
        self.make_bucket(BUCKET)

    def make_bucket(self, name: str) -> None:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{HOST}:{self._port}",
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        client.create_bucket(Bucket=name)
        client.close()

    def kill(self) -> None:
        """SIGKILL; whatever it held is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def cut(self) -> None:
        """Out of reach: connections are refused, those there are break. Nothing is lost."""
        self.proxy.cut()

    def mend(self) -> None:
        self.proxy.mend()

    def close(self) -> None:
        self.proxy.close()
        self.kill()


def cloudless() -> dict[str, str]:
    """Variables under which AWS's tools find no account, no settings of the developer, no proxy and no metadata."""
    return {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": f"{HOST},localhost",
        "no_proxy": f"{HOST},localhost",
    }


def _listen(port: int) -> socket.socket:
    return socket.create_server((HOST, port), backlog=64, reuse_port=False)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes up whoever waits in recv or accept
    connection.close()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with _listen(0) as probe:
        return int(probe.getsockname()[1])
