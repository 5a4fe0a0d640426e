"""Fixtures for all tests: no cloud of the developer's, and a real S3 server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.s3server import S3Server, cloudless


@pytest.fixture(scope="session", autouse=True)
def _nobodys_cloud() -> Iterator[None]:
    """No test can reach, or be changed by, the account and settings of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in cloudless().items():
            patch.setenv(name, value)
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
