"""Promise: bench/peers.py times whole training steps of other stacks, and says why where it cannot."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import load_bench
from tests.test_bench_steps import bench as steps
from tests.test_bench_steps import quantised

SCRIPT = Path(__file__).parents[1] / "bench" / "peers.py"

bench, stacks = load_bench("peers"), load_bench("stacks")


@pytest.mark.parametrize("packed", [False, True], ids=["full rows", "packed rows"])
def test_trl_is_trained_on_a_model_in_memory_and_all_its_tokens_are_counted(packed: bool) -> None:
    setting = bench.Setting("trl", "tiny", 2, recompute=not packed, packed=packed, length=96)
    found = bench.timed(setting, steps=2, warm_up=1)
    assert found.trouble is None
    assert setting.tokens == (190 if packed else 192)
    assert found.tokens_per_second == pytest.approx(
        setting.tokens / ((found.seconds[0] + found.seconds[1]) / 2), rel=1e-6
    )
    assert abs(found.loss - math.log(bench.SHAPES["tiny"].vocabulary) - 0.5) < 0.2
    assert found.gib is None
    assert dict(found.versions).keys() >= {"trl", "peft", "bitsandbytes", "torch"}


def test_the_model_is_quantised_as_that_of_the_job_is() -> None:
    shape = bench.SHAPES["tiny"]
    peers, job = stacks.random_model(stacks.model_config(shape)), steps.build(shape, steps.SMOKE[0].recipe())
    assert quantised(peers) == quantised(job)
    assert len(quantised(peers)) == 14
    assert peers.is_loaded_in_4bit


def test_weights_are_given_back_in_the_dtype_of_the_checkpoint() -> None:
    """Axolotl's kernels multiply bf16 activations by what bitsandbytes gives back, and by nothing else."""
    model = stacks.random_model(stacks.model_config(bench.SHAPES["tiny"]), dtype=torch.bfloat16)
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert len(states) == 14
    assert {state.dtype for state in states} == {torch.bfloat16}


def test_a_peer_that_is_not_there_or_fails_is_an_answer_of_one_line(tmp_path: Path) -> None:
    """Found in PEERS_SITE, and broken: its error is said, and no other line follows."""
    for name in ("liger_kernel", "liger_kernel-9.9.dist-info"):
        (tmp_path / "liger" / name).mkdir(parents=True)
    (tmp_path / "liger" / "liger_kernel-9.9.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 9.9\n")
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--peer", "liger", "--shape", "tiny", "--batch", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PEERS_SITE": str(tmp_path)},
    )
    found = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 1
    assert found["versions"]["liger-kernel"] == "9.9"
    assert found["tokens_per_second"] is None
    assert found["trouble"]


def test_what_is_not_installed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    missing = [name for name, peer in bench.PEERS.items() if peer.packages[0] not in dict(bench.versions(peer))]
    bench.main(["--list"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown if line.endswith("not installed")] == missing
    for name in missing[:1]:
        assert bench.main(["--json", "--peer", name, "--shape", "8B", "--batch", "8"]) == 1
        assert "is not installed" in json.loads(capsys.readouterr().out)["trouble"]


@pytest.mark.parametrize(("batch", "recompute"), [(8, True), (4, False)])
def test_a_batch_alone_means_the_setting_of_the_list(
    batch: int, recompute: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [(each.peer, each.shape, each.batch) for each in bench.SETTINGS]
    assert len(keys) == len(set(keys))
    if "unsloth" in dict(bench.versions(bench.PEERS["unsloth"])):
        pytest.skip("Unsloth is installed here")
    bench.main(["--json", "--peer", "unsloth", "--shape", "8B", "--batch", str(batch)])
    assert json.loads(capsys.readouterr().out)["setting"]["recompute"] is recompute


def test_a_batch_without_its_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--batch", "8"])
    assert ended.value.code == 2
    assert "--peer" in capsys.readouterr().err
