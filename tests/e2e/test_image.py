"""Promise: the image trains as nobody in particular, is stopped and started again without a trace, and keeps no secret.

It is built by buildah from this checkout's Dockerfile, on a Debian that stands in for its base image, with torch's CPU
build; podman runs it. Dataset and bucket are folders of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from job.contract.environ import JobEnviron
from job.contract.layout import RunLayout
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.passport import Passport
from job.contract.records import AdapterManifest, AttemptEnd
from job.storage import open_store
from launch.begin import new_record
from launch.recipe_file import read_recipe
from launch.resolve import resolve
from tests.e2e.containers import BASE, Containers, PipSettings, install
from tests.machine import require_disposable_machine
from tests.watching import events_in

pytestmark = [pytest.mark.machine, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "examples"
JOB: Final = "localhost/ftjob:job"
INSIDE: Final = "localhost/ftjob:inside"
REVISION: Final = "0123456789abcdef0123456789abcdef01234567"
USER: Final = 10001
GRACE_SECONDS: Final = 25

# As a cloud's machine starts it, but for the GPU.
HARDENED: Final = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@dataclass(frozen=True)
class Built:
    """The images, and what must not be found in them."""

    containers: Containers
    secret: str
    build_arguments: tuple[str | Path, ...]


@pytest.fixture(scope="module")
def built(_nobodys_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    require_disposable_machine()
    install()
    folder = tmp_path_factory.mktemp("images")
    settings, secret = PipSettings.here(), f"secret-{uuid.uuid4().hex}"
    conf = folder / "pip.conf"
    conf.write_text(f"# {secret}\n{settings.conf}")
    arguments: list[str | Path] = [f"--build-arg=BASE={BASE}", f"--build-arg=REVISION={REVISION}"]
    arguments += ["--build-arg=LOCK=requirements.cpu.lock", f"--secret=id=pip.conf,src={conf}"]
    if settings.ca is not None:
        ca = folder / "ca.pem"
        ca.write_bytes(f"# {secret}\n".encode() + settings.ca.read_bytes())
        arguments.append(f"--secret=id=ca.pem,src={ca}")
    if not settings.has_torch_for_cpu:
        arguments.append("--build-arg=PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
    arguments += [f"--volume={folder}:{folder}:ro" for folder in settings.folders]
    containers = Containers(folder)
    try:
        containers.make_base()
        containers.build(ROOT, *arguments, tag=JOB)
        yield Built(containers, secret, tuple(arguments))
    finally:
        containers.remove()


@dataclass(frozen=True)
class ImageRun:
    """A run of the quickstart, with a bucket of its own. Each attempt has a new disk, as on a new machine."""

    containers: Containers
    folder: Path
    run_id: str

    @classmethod
    def create(cls, containers: Containers, folder: Path, run_id: str) -> ImageRun:
        bucket = folder / "bucket"
        bucket.mkdir(parents=True)
        for path in (bucket, *folder.parents):  # pytest's folders are for its own user only
            if path.is_relative_to(folder.parents[1]):
                path.chmod(path.stat().st_mode | 0o011)
        resolved = resolve(read_recipe(EXAMPLES / "quickstart.json"), folder=EXAMPLES, bucket=bucket.as_uri())
        record = new_record(resolved, run_id=run_id, now=datetime.now(UTC))
        open_store(resolved.bucket).put_new(RunLayout(run_id).recipe, record.to_bytes())
        for path in (bucket, *bucket.rglob("*")):
            os.chown(path, USER, USER)
        return cls(containers, folder, run_id)

    @property
    def bucket(self) -> Path:
        return self.folder / "bucket"

    def log(self, attempt: int) -> Path:
        return self.folder / f"{attempt}.jsonl"

    def name(self, attempt: int) -> str:
        return f"{self.run_id}-{attempt}"

    def start(self, attempt: int) -> subprocess.Popen[bytes]:
        environ = JobEnviron(
            run_id=self.run_id,
            bucket=self.bucket.as_uri(),
            workdir="/ftjob/work",
            grace_seconds=GRACE_SECONDS - 5,
            heartbeat_seconds=1,
            image_digest="sha256:" + "0" * 64,
        )
        variables = [f"--env={name}={value}" for name, value in environ.variables().items()]
        folders = [f"--volume={self.bucket}:{self.bucket}", f"--volume={EXAMPLES}:{EXAMPLES}:ro"]
        disk = f"--volume={self.name(attempt)}:/ftjob"
        name = f"--name={self.name(attempt)}"
        return self.containers.start(name, *HARDENED, disk, *folders, *variables, JOB, log=self.log(attempt))

    def events(self, attempt: int) -> list[dict[str, Any]]:
        return events_in(self.log(attempt).read_bytes())

    def stop_in_training(self, attempt: int, process: subprocess.Popen[bytes]) -> None:
        """`podman stop` after the first committed checkpoint."""
        while not any(event["event"] == "checkpoint.committed" for event in self.events(attempt)):
            assert process.poll() is None, self.log(attempt).read_text()
            time.sleep(0.02)
        self.containers.ask("podman", "stop", "--time", str(GRACE_SECONDS), self.name(attempt))

    def adapter(self) -> tuple[AdapterManifest, Passport, str]:
        """Manifest, passport, and the weights' sha256 as the manifest states it."""
        store, layout = open_store(self.bucket.as_uri()), RunLayout(self.run_id)
        manifest = AdapterManifest.from_bytes(store.get(layout.adapter_manifest), name="adapter.json")
        (passport,) = self.bucket.rglob("adapter/*/passport.json")
        digest = manifest.files["adapter_model.safetensors"].sha256
        return manifest, Passport.from_bytes(passport.read_bytes(), name="passport.json"), digest


def finish(process: subprocess.Popen[bytes], seconds: float = 600) -> int:
    try:
        return process.wait(seconds)
    finally:
        process.kill()
        process.wait()


def shell(built: Built, script: str, folder: Path, *arguments: str, image: str = JOB) -> str:
    """What a script says in the image."""
    log = folder / "log.txt"
    code = built.containers.run("--entrypoint=/bin/sh", *arguments, image, "-euc", script, log=log)
    assert code == 0, log.read_text()
    return log.read_text()


# ---------------------------------------------------------------------------------------------------------- the job


def test_a_stopped_job_goes_on_in_a_new_container_and_delivers_the_identical_adapter(
    built: Built, tmp_path: Path
) -> None:
    untouched = ImageRun.create(built.containers, tmp_path / "untouched", "untouched")
    assert finish(untouched.start(1)) == EXIT_CODES[Outcome.DONE], untouched.log(1).read_text()

    stopped = ImageRun.create(built.containers, tmp_path / "stopped", "stopped")
    process = stopped.start(1)
    stopped.stop_in_training(1, process)
    assert finish(process) == EXIT_CODES[Outcome.PREEMPTED], stopped.log(1).read_text()
    key = RunLayout("stopped").end(1)
    end = AttemptEnd.from_bytes(open_store(stopped.bucket.as_uri()).get(key), name=key)
    _, passport, digest = untouched.adapter()
    assert 0 < end.step < len(passport.losses)  # in the middle
    assert "SIGTERM" in end.message

    assert finish(stopped.start(2)) == EXIT_CODES[Outcome.DONE], stopped.log(2).read_text()
    (restored,) = [event for event in stopped.events(2) if event["event"] == "attempt.restored"]
    assert restored["step"] == end.step  # nothing was repeated
    assert stopped.adapter()[2] == digest
    assert passport.image_digest == "sha256:" + "0" * 64
    for run, attempt in ((untouched, 1), (stopped, 1), (stopped, 2)):
        (started,) = [event for event in run.events(attempt) if event["event"] == "job.started"]
        assert started["pid"] == 1
    assert {path.stat().st_uid for path in stopped.bucket.rglob("*")} == {USER}


def test_an_unusable_environment_ends_with_two(built: Built, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert built.containers.run(*HARDENED, JOB, log=log) == EXIT_CODES[Outcome.BAD_INPUT]
    (ended,) = [json.loads(line) for line in log.read_text().splitlines() if "job.ended" in line]
    assert "FTJOB_RUN_ID" in ended["message"]


def test_it_runs_as_its_own_user_who_writes_only_its_own_folder(built: Built, tmp_path: Path) -> None:
    script = """
    echo "$(id -u):$(id -g) $HOME"
    find / -xdev -writable ! -type l ! -path '/proc/*' ! -path '/dev/*' ! -path '/*tmp' 2> /dev/null || true
    """
    who, *writable = shell(built, script, tmp_path).splitlines()
    assert who == f"{USER}:{USER} /ftjob"
    # /run/lock is Debian's, for everybody.
    assert {path for path in writable if path != "/run/lock"} == {"/ftjob", "/ftjob/cache", "/ftjob/work"}


def test_a_new_volume_is_its_own(built: Built, tmp_path: Path) -> None:
    volume = f"--volume={uuid.uuid4().hex}:/ftjob"
    shell(built, "touch /ftjob/here $FTJOB_WORKDIR/here /ftjob/cache/here", tmp_path, *HARDENED, volume)


def test_bytecode_is_there_and_is_used(built: Built, tmp_path: Path) -> None:
    """Where it is not, or is taken for stale, each attempt compiles thousands of files that it cannot write."""
    said = shell(built, "python -v -c 'import torch, job.attempt' 2>&1", tmp_path)
    assert said.count("# code object from '/opt/ftjob/") > 500  # read from a .pyc
    assert said.count("# code object from /opt/ftjob/") == 0  # compiled from a .py
    assert "# code object from '/opt/ftjob/lib/python3.11/site-packages/job/__pycache__/" in said


def test_triton_finds_what_it_compiles_with(built: Built, tmp_path: Path) -> None:
    """Its kernels' launchers are compiled where the GPU is, at their first use, against this Python."""
    shell(
        built,
        """
        headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include", sysconfig.get_default_scheme()))')
        printf '#include <Python.h>\\n#include <stdint.h>\\nPyObject *one(void) { return Py_None; }\\n' > /tmp/one.c
        gcc -O3 -shared -fPIC -I"$headers" /tmp/one.c -o /tmp/one.so
        """,
        tmp_path,
        *HARDENED,
    )


# ------------------------------------------------------------------------------------------------- what is in the image


def test_nothing_is_left_of_the_build_but_what_was_to_be_built(built: Built) -> None:
    left = []
    layers = built.containers.layers(JOB)[1:]  # the lowest is the base
    assert len(layers) >= 3
    for layer in layers:
        for folder, folders, files in os.walk(layer):
            at = "/" + os.path.relpath(folder, layer).removeprefix(".")
            left += [f"{at}/{name}" for name in folders if name in (".cache", ".git")]
            left += [f"{at}/{name}" for name in files if name in ("pip.conf", "ca.pem") or name.endswith(".whl")]
        left += [path for path in ("/src", "/tests", "/root/.netrc") if (layer / path[1:]).exists()]
        left += [path.name for path in (layer / "var/lib/apt/lists").glob("*_Packages*")]
        left += [str(path) for path in (layer / "tmp").glob("*")]
    assert left == []


def test_no_secret_of_the_build_is_in_a_layer_or_in_the_history(built: Built) -> None:
    assert built.secret not in json.dumps(built.containers.inspect(JOB))
    assert built.secret not in built.containers.ask("podman", "history", "--no-trunc", JOB)
    layers = built.containers.layers(JOB)
    command = ["grep", "--recursive", "--files-with-matches", "--devices=skip", built.secret, *map(str, layers)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, ""), found.stderr


def test_nothing_enters_the_build_but_what_the_dockerfile_copies(built: Built, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    for path in (
        ".git/config",
        ".env",
        "job/.env",
        "job/__pycache__/a.pyc",
        "tests/a.py",
        "key.pem",
        "job/a.py",
        "README.md",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / ".dockerignore").write_bytes((ROOT / ".dockerignore").read_bytes())
    built.containers.build(tmp_path, tag="localhost/context")
    (layer,) = built.containers.layers("localhost/context")
    found = {str(path.relative_to(layer)) for path in layer.rglob("*") if path.is_file()}
    assert found == {"job/a.py", "README.md"}


def test_the_labels_say_which_ftjob_it_is(built: Built) -> None:
    labels = built.containers.inspect(JOB)["Labels"]
    told = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert (told["title"], told["revision"], told["licenses"]) == ("ftjob", REVISION, "Apache-2.0")
    assert told["version"]
    assert told["description"]


def test_inside_has_what_skypilot_looks_for_and_no_host_keys(built: Built, tmp_path: Path) -> None:
    built.containers.build(ROOT, *built.build_arguments, "--target=inside", tag=INSIDE)
    script = """
    test "$(id -u)" = 0
    for tool in curl fusermount3 gcc nc patch lspci pgrep rsync sshd sudo wget; do
        PATH=$PATH:/usr/sbin command -v $tool > /dev/null || echo "no $tool"
    done
    ls /etc/ssh/ssh_host_* 2> /dev/null || true
    """
    assert shell(built, script, tmp_path, image=INSIDE) == ""
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "log.txt").unlink()
    code = built.containers.run("--entrypoint=python", INSIDE, "-P", "-m", "job", log=tmp_path / "log.txt")
    assert code == EXIT_CODES[Outcome.BAD_INPUT]
