"""Stands in for `python -m job`: a real process that keeps the contract and trains nothing.

Its one argument is JSON:
  steps, step_seconds    how far and how fast
  ends                   {attempt: [step, how]}: how an attempt ends before its time: an exit code, "kill" or "crash"
  deaf                   ignores SIGTERM
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from typing import Any

from job.contract.environ import JobEnviron
from job.contract.errors import AlreadyExists
from job.contract.layout import RunLayout
from job.contract.metrics import Committed, Evaluated, Heartbeat, MetricLine, Published, Restored, Step, dump_lines
from job.contract.metrics import parse_lines as parse
from job.contract.outcome import EXIT_CODES, Outcome
from job.contract.records import AdapterManifest, AttemptClaim, AttemptEnd, FileDigest, Hardware
from job.storage import open_store

ADAPTER_FILES = {"adapter_config.json": b'{"r": 16}\n', "adapter_model.safetensors": bytes(range(256)) * 40}


class FakeJob:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.environ = JobEnviron.read(os.environ)
        self.store = open_store(self.environ.bucket)
        self.layout = RunLayout(self.environ.run_id)
        self.stopped = False
        self.sequence = 0
        self.nonce = os.urandom(8).hex()
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_: object) -> None:
        self.stopped = not self.plan.get("deaf", False)

    def run(self) -> int:
        self.attempt = self.claim()
        step = self.restored_step()
        total = int(self.plan.get("steps", 4))
        end_at, how = self.plan.get("ends", {}).get(str(self.attempt), (None, None))
        self.log("job.started", step=step)
        self.write(
            Restored(
                at=now(),
                step=step,
                checkpoint=f"step-{step:08d}-a0001" if step else None,
                total_steps=total,
                epochs=1,
                train_rows=4,
                hardware=Hardware(device="cpu", name="a processor", memory_bytes=1, count=1),
            )
        )
        while step < total:
            if step == end_at:
                return self.leave(step, how)
            time.sleep(float(self.plan.get("step_seconds", 0.02)))
            step += 1
            self.write(
                Step(
                    at=now(),
                    step=step,
                    epoch=step / total,
                    loss=3.0 - step / 10,
                    grad_norm=1.0,
                    learning_rate=1e-4,
                    tokens=100,
                    seconds=0.1,
                    rows=(step,),
                ),
                Heartbeat(at=now(), phase="training"),
            )
            if step % 2 == 0 or self.stopped:
                self.commit(step)
            if self.stopped:
                return self.end(Outcome.PREEMPTED, step, "stopped from outside")
        self.write(Evaluated(at=now(), step=step, epoch=1, held_out_loss=1.5))
        return self.publish(step) if total != end_at else self.leave(step, how)

    def claim(self) -> int:
        for attempt in range(1, 10_000):
            claim = AttemptClaim(
                attempt=attempt,
                nonce=self.nonce,
                claimed_at=now(),
                pid=os.getpid(),
                host="here",
                infra=self.environ.infra,
                submission=self.environ.submission,
                machine_id="here",
                up_seconds=0,
                heartbeat_seconds=self.environ.heartbeat_seconds,
            )
            try:
                self.store.put_new(self.layout.claim(attempt), claim.to_bytes())
            except AlreadyExists:
                continue
            return attempt
        raise AssertionError("no attempt is free")

    def restored_step(self) -> int:
        found = [
            line
            for info in self.store.list(self.layout.metrics)
            for line in parse(self.store.get(info.key), name=info.key)
        ]
        return max((line.step for line in found if isinstance(line, Committed)), default=0)

    def commit(self, step: int) -> None:
        self.write(
            Committed(
                at=now(),
                checkpoint=f"step-{step:08d}-a{self.attempt:04d}",
                step=step,
                size=10,
                blocking_seconds=0.0,
                seconds=0.0,
            )
        )

    def leave(self, step: int, how: Any) -> int:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "crash":
            raise RuntimeError("the fake job crashed")
        outcomes = {code: outcome for outcome, code in EXIT_CODES.items()}
        return self.end(outcomes[how], step, f"told to end with {how}")

    def publish(self, step: int) -> int:
        digests = {}
        for name, data in ADAPTER_FILES.items():
            self.store.put_new(self.layout.adapter_file(self.attempt, name), data)
            digests[name] = FileDigest(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest = AdapterManifest(
            attempt=self.attempt,
            complete=True,
            created_at=now(),
            step=step,
            epoch=1.0,
            held_out_loss=1.5,
            files=digests,
        )
        self.store.put_new(self.layout.adapter_manifest, manifest.to_bytes())
        self.write(Published(at=now(), step=step))
        return self.end(Outcome.DONE, step, "done")

    def end(self, outcome: Outcome, step: int, message: str) -> int:
        end = AttemptEnd(
            attempt=self.attempt,
            nonce=self.nonce,
            ended_at=now(),
            outcome=outcome,
            step=step,
            message=message,
            elapsed=0,
        )
        self.store.put_new(self.layout.end(self.attempt), end.to_bytes())
        self.log("job.ended", outcome=outcome)
        return EXIT_CODES[outcome]

    def write(self, *lines: MetricLine) -> None:
        self.store.put_new(self.layout.metrics_object(self.attempt, self.sequence), dump_lines(list(lines)))
        self.sequence += 1

    def log(self, event: str, **values: object) -> None:
        print(json.dumps({"event": event, "attempt": self.attempt, **values}), file=sys.stderr, flush=True)  # noqa: T201


def now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(FakeJob(json.loads(sys.argv[1])).run())
