"""Promise: it does not matter where the base model lay. Whole attempts of the real job, on real servers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from job.contract.layout import Key
from job.contract.metrics import Heartbeat
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import AttemptEnd
from job.storage import open_store
from job.tiny import write_tiny_model
from tests.hubserver import HubServer
from tests.job.running import Run, Zygote, start

pytestmark = pytest.mark.slow


TOKEN: Final = "hf_" + "s" * 30


@dataclass
class World:
    """A hub, and a process whose attempts use it."""

    hub: HubServer
    zygote: Zygote


@pytest.fixture(scope="module")
def world(_nobodys_cloud: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    server = HubServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.endpoint)
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub-cache")))
        patch.setenv("HF_TOKEN", TOKEN)
        zygote = Zygote()
    server.tokens.add(TOKEN)
    yield World(server, zygote)
    zygote.close()
    server.close()


def run_on(folder: Path, model: dict[str, Any]) -> Run:
    return start(folder, recipe={"base_model": model, "training": {"epochs": 1}})


def end_of(run: Run) -> AttemptEnd:
    key = run.layout.end(1)
    return AttemptEnd.from_bytes(open_store(run.bucket).get(key), name=key)


def test_a_model_from_the_hub_or_a_bucket_gives_the_adapter_of_the_local_folder(
    tmp_path: Path, world: World, s3_uri: str
) -> None:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    commit = world.hub.add("org/tiny", folder, gated=True)
    world.hub.account(TOKEN, "org/tiny")
    for file in folder.iterdir():
        open_store(s3_uri).put_file(Key(file.name), file)
    models: dict[str, dict[str, Any]] = {
        "local": {"id": str(folder)},
        "hub": {"id": "org/tiny", "revision": commit},
        "bucket": {"id": s3_uri},
    }
    runs = {name: run_on(tmp_path / f"run-{name}", model) for name, model in models.items()}
    for run in runs.values():
        assert world.zygote.attempt(run.environ(), run.log) == 0, run.log.read_text()[-3000:]
    assert len({run.weights()[0] for run in runs.values()}) == 1
    passports = {name: run.passport() for name, run in runs.items()}
    assert passports["local"].base_model.files == passports["hub"].base_model.files
    assert passports["local"].base_model.files == passports["bucket"].base_model.files
    assert passports["hub"].base_model.revision == commit
    for run in (runs["hub"], runs["bucket"]):
        beats = [line.phase for line in run.story().lines[1] if isinstance(line, Heartbeat)]
        told = [phase for phase in beats if phase.startswith("downloading the base model: 0.0 of ")]
        assert told, beats
        assert beats.index(told[0]) < len(beats) - 1 - beats[::-1].index("loading the model")
        assert "ssss" not in run.log.read_text()
    assert "downloading" not in runs["local"].log.read_text()


def test_a_job_stopped_in_mid_download_ends_at_once_and_the_next_one_goes_on(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    (folder / "generation_config.json").write_text('{"max_length": 20}')
    weights = (folder / "model.safetensors").read_bytes()
    run = run_on(tmp_path / "run", {"id": "org/stopped", "revision": world.hub.add("org/stopped", folder)})
    world.hub.hold_at(len(weights) // 2)
    code = world.zygote.attempt(run.environ(), run.log, kill_at="weights.downloading", with_signal=signal.SIGTERM)
    assert code == EXIT_CODES[Outcome.PREEMPTED]
    assert "SIGTERM" in end_of(run).message
    world.hub.release()
    assert world.zygote.attempt(run.environ(), run.log) == 0


def test_a_hub_that_stays_away_asks_for_another_attempt_and_a_refusal_does_not(tmp_path: Path, world: World) -> None:
    away = run_on(tmp_path / "away", {"id": "org/model", "revision": "0" * 40})
    refused = run_on(tmp_path / "refused", {"id": "org/model", "revision": "0" * 40})
    assert world.zygote.attempt(refused.environ(), refused.log) == EXIT_CODES[Outcome.BAD_INPUT]
    world.hub.proxy.cut()
    assert world.zygote.attempt(away.environ(final_retry_seconds=0.1), away.log) == EXIT_CODES[Outcome.PREEMPTED]
    world.hub.proxy.mend()
    assert f"cannot be downloaded from {world.hub.endpoint} for now" in end_of(away).message
    assert "does not exist on the hub" in end_of(refused).message
    logged = [json.loads(line) for line in refused.log.read_text().splitlines()]
    assert [line["outcome"] for line in logged if line["event"] == "job.ended"] == ["bad_input"]
