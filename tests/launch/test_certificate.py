"""Promise: the certificate is clean for equal runs, and names whatever is not equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.metrics import Committed, Evaluated, Heartbeat, MetricLine, Restored, Step
from job.contract.records import FileDigest
from launch.certificate import Certificate, Evidence, certify
from tests.contract.examples import GPU, at

PER_EPOCH, EPOCHS, ROWS = 3, 2, 6
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPUTED = ("epoch", "loss", "grad_norm", "learning_rate", "tokens", "rows")

Lines = list[tuple[int, MetricLine]]


def begin(step: int) -> Restored:
    checkpoint = f"step-{step:08d}-a0001" if step else None
    total = PER_EPOCH * EPOCHS
    return Restored(
        at=at(0), step=step, checkpoint=checkpoint, total_steps=total, epochs=EPOCHS, train_rows=ROWS, hardware=GPU
    )


def train(number: int, second: float) -> Step:
    """What every attempt computes at this step; only the clock differs."""
    place = (number - 1) % PER_EPOCH
    return Step(
        at=at(second),
        step=number,
        epoch=number / PER_EPOCH,
        loss=2 / number,
        grad_norm=0.1 * number,
        learning_rate=1e-3 / number,
        tokens=90 + number,
        seconds=second,
        rows=(2 * place + 1, 2 * place + 2),
    )


def evaluate(epoch: int, second: float) -> Evaluated:
    return Evaluated(at=at(second), step=epoch * PER_EPOCH, epoch=epoch, held_out_loss=1.5 / epoch)


def adapter() -> dict[str, FileDigest]:
    names = (WEIGHTS, CONFIG, "passport.json")
    return {name: FileDigest(size=9, sha256=f"{number:x}" * 64) for number, name in enumerate(names, start=1)}


def untouched() -> Evidence:
    lines: Lines = [(1, Heartbeat(at=at(0), phase="training")), (1, begin(0))]
    for number in range(1, 7):
        lines.append((1, train(number, number)))
        if number % PER_EPOCH == 0:
            lines.append((1, evaluate(number // PER_EPOCH, number)))
    return Evidence(lines, adapter())


def killed() -> Evidence:
    """Died after step 4, went on from the checkpoint of step 2: steps 3 and 4 and the first evaluation come twice."""
    save = Committed(at=at(2), checkpoint="step-00000002-a0001", step=2, size=9, blocking_seconds=0.1, seconds=0.2)
    first: list[MetricLine] = [begin(0), train(1, 11), train(2, 12), save, train(3, 13), evaluate(1, 13), train(4, 14)]
    second: list[MetricLine] = [begin(2), train(3, 23), evaluate(1, 23), *(train(n, 20 + n) for n in (4, 5, 6))]
    lines: Lines = [*((1, line) for line in first), *((2, line) for line in [*second, evaluate(2, 29)])]
    # The passport tells the attempts apart, and is not compared.
    return Evidence(lines, adapter() | {"passport.json": FileDigest(size=10, sha256="f" * 64)})


def failed(certificate: Certificate) -> dict[str, str]:
    return {check.claim: check.found for check in certificate.checks if not check.holds}


def changed(evidence: Evidence, index: int, **fields: Any) -> Evidence:
    """With other values in one line."""
    lines = list(evidence.lines)
    attempt, line = lines[index]
    lines[index] = (attempt, line.model_copy(update=fields))
    return replace(evidence, lines=lines)


def without(evidence: Evidence, *indices: int) -> Evidence:
    return replace(evidence, lines=[line for i, line in enumerate(evidence.lines) if i not in indices])


def where(evidence: Evidence, kind: type[Step | Evaluated], step: int) -> list[int]:
    """Indices of the lines of a kind at a step."""
    return [i for i, (_, line) in enumerate(evidence.lines) if isinstance(line, kind) and line.step == step]


def every(evidence: Evidence, step: int, **fields: Any) -> Evidence:
    """With other values in each line of one step."""
    for index in where(evidence, Step, step):
        evidence = changed(evidence, index, **fields)
    return evidence


ROWS_ONCE = "each row was trained exactly once an epoch"
REPEATS = "repeated steps were repeated exactly"
LOSSES = "every training loss is equal"
HELD_OUT = "every held-out loss is equal"


def test_equal_runs_have_a_clean_certificate_that_says_how_much_was_compared() -> None:
    certificate = certify(untouched(), killed())
    assert certificate.clean
    assert {check.claim: check.found for check in certificate.checks} == {
        ROWS_ONCE: "6 rows x 2 epochs",
        REPEATS: "2 steps",
        LOSSES: "6 steps",
        HELD_OUT: "2 evaluations",
        f"{WEIGHTS} is equal, byte for byte": f"sha256 {'1' * 64}",
        f"{CONFIG} is equal, byte for byte": f"sha256 {'2' * 64}",
    }


def last(evidence: Evidence, kind: type[Step | Evaluated], step: int) -> int:
    return where(evidence, kind, step)[-1]


FAULTS: dict[str, tuple[Callable[[Evidence], Evidence], str, str]] = {
    "a row missing": (lambda e: every(e, 5, rows=(3,)), ROWS_ONCE, "epoch 2: 5 of 6 rows, 0 more than once"),
    "a row twice": (lambda e: every(e, 5, rows=(3, 4, 1)), ROWS_ONCE, "epoch 2: 6 of 6 rows, 1 more than once"),
    "a row in place of another": (
        lambda e: every(e, 5, rows=(3, 1)),
        ROWS_ONCE,
        "epoch 2: 5 of 6 rows, 1 more than once",
    ),
    "a step missing": (lambda e: without(e, *where(e, Step, 5)), ROWS_ONCE, "step 5 is missing"),
    "the last step missing": (
        lambda e: without(e, *where(e, Step, 6)),
        ROWS_ONCE,
        "2 steps beyond the last whole epoch",
    ),
    "no step at all": (lambda e: replace(e, lines=[]), ROWS_ONCE, "no steps on record"),
    "a repeated step that differs": (
        lambda e: changed(e, where(e, Step, 4)[0], loss=0.75),
        REPEATS,
        "step 4: loss 0.75, then 0.5",
    ),
    "a repeated evaluation that differs": (
        lambda e: changed(e, where(e, Evaluated, 3)[0], held_out_loss=1.25),
        REPEATS,
        "step 3: held-out loss 1.25, then 1.5",
    ),
    "a loss": (lambda e: every(e, 4, loss=0.75), LOSSES, "step 4: 0.5 untouched, 0.75 killed"),
    "a loss missing": (lambda e: without(e, *where(e, Step, 2)), LOSSES, "step 2: 1.0 untouched, missing killed"),
    "a held-out loss": (
        lambda e: changed(e, last(e, Evaluated, 6), held_out_loss=0.5),
        HELD_OUT,
        "epoch 2, step 6: 0.75 untouched, 0.5 killed",
    ),
    "a held-out loss missing": (
        lambda e: without(e, last(e, Evaluated, 6)),
        HELD_OUT,
        "epoch 2, step 6: 0.75 untouched, missing killed",
    ),
    "other weights": (
        lambda e: replace(e, adapter={**e.adapter, WEIGHTS: FileDigest(size=9, sha256="e" * 64)}),
        f"{WEIGHTS} is equal, byte for byte",
        f"{'1' * 64} untouched, {'e' * 64} killed",
    ),
    "no weights": (
        lambda e: replace(e, adapter={CONFIG: e.adapter[CONFIG]}),
        f"{WEIGHTS} is equal, byte for byte",
        f"{'1' * 64} untouched, missing killed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_killed_run_is_named_and_the_whole_is_not_clean(fault: str) -> None:
    spoil, claim, said = FAULTS[fault]
    certificate = certify(untouched(), spoil(killed()))
    assert not certificate.clean
    assert said in failed(certificate)[claim]


def test_many_differences_are_counted_and_the_first_five_told() -> None:
    other = untouched()
    for number in range(1, 7):
        other = every(other, number, loss=9.0)
    assert failed(certify(other, killed())).keys() == {LOSSES}
    assert failed(certify(other, killed()))[LOSSES].endswith("; and 1 more")


def different(value: Any) -> st.SearchStrategy[Any]:
    match value:
        case tuple():
            return st.lists(st.integers(1, ROWS), max_size=4).map(tuple).filter(lambda rows: rows != value)
        case int():
            return st.integers(0, 2**31).filter(lambda number: number != value)
        case _:
            # Losses that differ in the last bit differ.
            return st.floats(allow_nan=False).filter(lambda number: number != value)


@st.composite
def one_change(draw: st.DrawFn) -> tuple[Evidence, Evidence]:
    """Both runs' evidence with one value, one line or one digest of either changed."""
    pair = [untouched(), killed()]
    which = draw(st.integers(0, 1))
    evidence = pair[which]
    steps = [i for i, (_, line) in enumerate(evidence.lines) if isinstance(line, Step)]
    evaluations = [i for i, (_, line) in enumerate(evidence.lines) if isinstance(line, Evaluated)]
    match draw(st.sampled_from(["step", "evaluation", "missing", "file"])):
        case "step":
            index, name = draw(st.sampled_from(steps)), draw(st.sampled_from(COMPUTED))
            other = draw(different(getattr(evidence.lines[index][1], name)))
            pair[which] = changed(evidence, index, **{name: other})
        case "evaluation":
            index = draw(st.sampled_from(evaluations))
            other = draw(different(getattr(evidence.lines[index][1], "held_out_loss")))  # noqa: B009
            pair[which] = changed(evidence, index, held_out_loss=other)
        case "missing":
            line = evidence.lines[draw(st.sampled_from(steps + evaluations))][1]
            assert isinstance(line, Step | Evaluated)
            pair[which] = without(evidence, *where(evidence, type(line), line.step))
        case "file":
            name = draw(st.sampled_from([WEIGHTS, CONFIG]))
            digest = FileDigest(size=draw(st.sampled_from([9, 8])), sha256=draw(st.sampled_from(["d" * 64, "c" * 64])))
            pair[which] = replace(evidence, adapter={**evidence.adapter, name: digest})
    return pair[0], pair[1]


@given(one_change())
def test_any_single_change_of_the_evidence_makes_it_not_clean(pair: tuple[Evidence, Evidence]) -> None:
    certificate = certify(*pair)
    assert not certificate.clean
    assert all(found for found in failed(certificate).values())
