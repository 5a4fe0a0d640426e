"""Fixtures for all tests: no cloud of the developer's, and a real S3 server."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.ceph import Ceph, install_ceph
from tests.hubserver import HubServer
from tests.machine import require_disposable_machine
from tests.s3server import S3Server, cloudless

if TYPE_CHECKING:
    from tests.job.running import Zygote


@pytest.fixture(scope="session", autouse=True)
def _nobodys_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test can reach, or be changed by, the account and settings of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "HF_", "HUGGING")):
                patch.delenv(name)
        for name, value in cloudless().items():
            patch.setenv(name, value)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        # One for all tests: what is rendered for one of them need not be rendered for the others.
        patch.setenv("FTJOB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        yield


@pytest.fixture(scope="session")
def s3_process(_nobodys_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One moto server for all tests: a start costs more than a second."""
    server = S3Server(tmp_path_factory.mktemp("moto") / "log.txt")
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, and the environment that leads to it. It is in reach again after the test."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    yield s3_process
    s3_process.mend()


@pytest.fixture
def s3_uri(s3_server: S3Server) -> str:
    """A place of its own for each test."""
    return s3_server.uri(uuid.uuid4().hex)


@pytest.fixture(scope="session")
def ceph_cluster(_nobodys_cloud: None) -> Iterator[Ceph]:
    """One Ceph for all tests that are marked `machine` and ask for it: a start takes some twenty seconds."""
    require_disposable_machine()
    install_ceph()
    # Not pytest's own folder: its path is too long for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="ceph-"))
    server = Ceph(folder)
    try:
        server.start()
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


@pytest.fixture
def ceph(ceph_cluster: Ceph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ceph]:
    """Ceph, and the environment that leads to it as the bucket's owner. It lives again after the test."""
    for name, value in ceph_cluster.environment().items():
        monkeypatch.setenv(name, value)
    yield ceph_cluster
    ceph_cluster.proxy.disarm()
    if not ceph_cluster.gateway_lives:
        ceph_cluster.start_gateway()
    ceph_cluster.allow_guest()


@pytest.fixture
def ceph_uri(ceph: Ceph) -> str:
    """A place of its own for each test."""
    return ceph.uri(uuid.uuid4().hex)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, an empty cache, and the environment that leads to both."""
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """What forks attempts, once for all tests of a module."""
    from tests.job.running import Zygote

    made = Zygote()
    yield made
    made.close()
