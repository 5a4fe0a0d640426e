"""Promise: a run is its recipe and its data: no variable of a shell or a cluster changes it, or tells others of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from job.variables import settle
from tests.job.running import PATIENCE, Run, start

REPOSITORY = Path(__file__).parents[2]
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
SUMS = {"MKL_CBWR": "COMPATIBLE", "ACCELERATE_MIXED_PRECISION": "bf16"}


@contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """(where it listens, what it was asked)."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            heard.append(self.rfile.readline().decode(errors="replace"))
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        server.server_close()


def live(run: Run, **variables: str) -> None:
    """One attempt, with these variables beside ours."""
    silenced = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")
    inherited = {name: value for name, value in os.environ.items() if name not in silenced}
    done = subprocess.run(
        [sys.executable, "-m", "job"],
        env=inherited | variables | run.environ().variables(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_what_a_shell_or_a_cluster_says_changes_no_byte_and_nobody_hears_of_it(tmp_path: Path) -> None:
    plain, said = (start(tmp_path / name) for name in ("plain", "said"))
    live(plain)
    with listener() as (uri, heard):
        live(said, **RANKS, **SUMS, HF_ENDPOINT=uri, KUBEFLOW_TRAINER_SERVER_URL=uri)
    assert heard == []
    assert said.trained() == plain.trained()
    assert said.weights() == plain.weights()


def test_what_is_no_librarys_own_business_stays() -> None:
    ours = {"PATH": "/bin", "HF_HOME": "/cache", "OMP_NUM_THREADS": "2", "MKL_THREADING_LAYER": "GNU", "RANKS": "3"}
    found = ours | RANKS | SUMS
    settle(found)
    assert ours.items() <= found.items()
    assert not found.keys() & (RANKS | SUMS).keys()


@pytest.mark.parametrize(("said", "used"), [(None, "0"), ("", ""), ("2,3", "2"), ("GPU-1", "GPU-1")])
def test_one_gpu_is_seen(said: str | None, used: str) -> None:
    found = {} if said is None else {"CUDA_VISIBLE_DEVICES": said}
    settle(found)
    assert found["CUDA_VISIBLE_DEVICES"] == used
