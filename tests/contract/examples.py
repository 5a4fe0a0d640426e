"""One valid value of each record, and the shortest recipe."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from job.contract.budget import Budget
from job.contract.ledger import Ledger
from job.contract.metrics import Committed, Evaluated, Heartbeat, MetricLine, Published, Restored, Step
from job.contract.outcome import Outcome
from job.contract.passport import BaseModelPassport, Chosen, DatasetPassport, Passport
from job.contract.receipt import receipt_of
from job.contract.recipe import Recipe
from job.contract.records import (
    AdapterManifest,
    AttemptClaim,
    AttemptEnd,
    AttemptSummary,
    CheckpointManifest,
    DatasetDigest,
    EpochResult,
    FileDigest,
    Hardware,
    Identity,
    Record,
    RunRecord,
    StepLoss,
    Versions,
)
from job.contract.submission import Offer, Submission

START: Final = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SHA: Final = "0123456789abcdef" * 4
GPU: Final = Hardware(device="cuda", name="NVIDIA H100", memory_bytes=80 * 2**30, count=1)
FILES: Final = {
    "adapter_model.safetensors": FileDigest(size=7, sha256=SHA),
    "sub/é.json": FileDigest(size=0, sha256=SHA),
}
VERSIONS: Final = Versions(**dict.fromkeys(Versions.model_fields, "1.2.3"))
DATASET: Final = DatasetDigest(uri="s3://b/rows.jsonl", sha256=SHA, size=1000, rows=10)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def recipe_data(**sections: Any) -> dict[str, Any]:
    return {"base_model": {"id": "org/model"}, "dataset": {"train": "rows.jsonl"}, **sections}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(recipe_data(**sections))


def claim(attempt: int = 1, seconds: float = 0) -> AttemptClaim:
    return AttemptClaim(
        attempt=attempt,
        nonce="n",
        claimed_at=at(seconds),
        pid=17,
        host="host",
        infra={"cloud": "local"},
        submission=1,
        machine_id="boot/1.00",
        up_seconds=60.5,
        heartbeat_seconds=15,
    )


def end(outcome: Outcome, attempt: int = 1, step: int = 0, seconds: float = 0) -> AttemptEnd:
    return AttemptEnd(
        attempt=attempt,
        nonce="n",
        ended_at=at(seconds),
        outcome=outcome,
        step=step,
        message="said",
        hint="try",
        elapsed=seconds,
    )


def submission() -> Submission:
    offer = Offer(cloud="aws", region="us-east-1", instance_type="p5", gpu="H100", gpus=1, spot=True, usd_per_hour=1.5)
    return Submission(
        submission=1,
        nonce="n",
        submitted_at=START,
        backend="skypilot",
        offers=(offer,),
        image=f"registry.example/ftjob@sha256:{SHA}",
        last_attempt=21,
        budget=Budget(max_usd=40),
    )


def identity() -> Identity:
    return Identity(
        recipe=SHA,
        train=SHA,
        held_out=None,
        tokens=SHA,
        base_model=SHA,
        world_size=1,
        threads=1,
        versions=VERSIONS,
        hardware=GPU,
    )


def checkpoint(held_out_loss: float | None = 1.5) -> CheckpointManifest:
    return CheckpointManifest(
        step=400,
        attempt=2,
        epoch=1.25,
        reason="interval",
        created_at=START,
        finished=False,
        held_out_loss=held_out_loss,
        identity=identity(),
        files=FILES,
    )


def adapter() -> AdapterManifest:
    return AdapterManifest(
        attempt=2, complete=True, created_at=START, step=900, epoch=3, held_out_loss=None, files=FILES
    )


def run_record() -> RunRecord:
    return RunRecord(
        run_id="my-run",
        created_at=START,
        recipe=recipe(lora={"target_modules": ["q_proj", "v_proj"]}),
        recipe_digest=recipe().digest(),
        train=DATASET,
        held_out=None,
        ftjob="0.1.0",
    )


def passport() -> Passport:
    return Passport(
        run_id="my-run",
        created_at=START,
        recipe=recipe(),
        recipe_sha256=recipe().digest(),
        learning_rate=2e-4,
        seed=42,
        base_model=BaseModelPassport(id="org/model", revision=None, parameters=1, files=FILES),
        dataset=DatasetPassport(
            train=DATASET,
            held_out=None,
            train_rows=9,
            held_out_rows=1,
            trained_tokens_per_epoch=100,
            trained_tokens=300,
            tokens_sha256=SHA,
            chat_template_sha256=SHA,
            tokenizer_sha256=SHA,
        ),
        versions=VERSIONS,
        git_commit=None,
        ftjob_commit=None,
        image_digest="sha256:x",
        hardware=GPU,
        threads=1,
        attempts=(
            AttemptSummary(
                attempt=1,
                started_at=START,
                ended_at=None,
                ended="running",
                restored_step=0,
                last_step=3,
                steps_done=3,
                steps_repeated=0,
                hardware=GPU,
            ),
        ),
        epochs=(EpochResult(epoch=1, step=3, held_out_loss=1.0),),
        losses=(StepLoss(step=1, epoch=0.1, loss=2.0), StepLoss(step=2, epoch=0.2, loss=0.1 + 0.2)),
        chosen=Chosen(step=3, epoch=1, held_out_loss=1.0, why="the lowest held-out loss"),
        complete=True,
        receipt=receipt_of(Ledger()),
        exact=True,
    )


def records() -> list[Record]:
    return [run_record(), submission(), claim(), end(Outcome.PREEMPTED), checkpoint(), adapter(), passport()]


def restored(number: int, seconds: float = 0) -> Restored:
    return Restored(at=at(seconds), step=number, checkpoint=None, total_steps=10, epochs=1, train_rows=9, hardware=GPU)


def step(number: int, seconds: float = 0, loss: float = 1.0) -> Step:
    return Step(
        at=at(seconds),
        step=number,
        epoch=number / 10,
        loss=loss,
        grad_norm=1,
        learning_rate=1e-4,
        tokens=100,
        seconds=0.5,
        rows=(1, 2),
    )


def heartbeat(phase: str, seconds: float = 0) -> Heartbeat:
    return Heartbeat(at=at(seconds), phase=phase)


def lines() -> list[MetricLine]:
    return [
        heartbeat("loading\nweights "),
        restored(0, 1),
        step(1, 2),
        Evaluated(at=at(3), step=1, epoch=1, held_out_loss=1.0),
        Committed(at=at(4), checkpoint="step-00000001-a0001", step=1, size=9, blocking_seconds=0.1, seconds=1),
        Published(at=at(5), step=1),
    ]
