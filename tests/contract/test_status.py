"""The status of a run: promises held over every combination of what can be known."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest

from job.contract.outcome import Outcome
from job.contract.status import BackendState, Status, derive_status


@dataclass(frozen=True)
class Known:
    published: bool
    complete: bool
    attempts: int
    last_end: Outcome | None
    backend: BackendState
    asked_to_stop: bool = False

    @property
    def status(self) -> Status:
        return derive_status(
            published=self.published,
            complete=self.complete,
            attempts=self.attempts,
            last_end=self.last_end,
            backend=self.backend,
            asked_to_stop=self.asked_to_stop,
        )


ALL = [
    Known(*combination)
    for combination in itertools.product([False, True], [False, True], [0, 1, 7], [None, *Outcome], BackendState)
]
UNFINISHED = [known for known in ALL if not (known.published and known.complete)]


def of(*states: BackendState) -> list[Known]:
    return [known for known in UNFINISHED if known.backend in states]


def test_every_combination_has_a_status_and_every_status_a_combination() -> None:
    assert len(ALL) == 2 * 2 * 3 * 6 * len(BackendState)
    assert {known.status for known in ALL} == set(Status)


def test_a_finished_adapter_is_success_whatever_else_is_known() -> None:
    finished = [known for known in ALL if known.published and known.complete]
    assert {known.status for known in finished} == {Status.SUCCEEDED}


def test_nothing_else_is_success() -> None:
    assert Status.SUCCEEDED not in {known.status for known in UNFINISHED}


def test_could_not_ask_is_never_ended() -> None:
    assert {known.status for known in of(BackendState.UNREACHABLE)} == {Status.UNKNOWN}


def test_unknown_means_could_not_ask_and_nothing_else() -> None:
    assert {known.backend for known in ALL if known.status is Status.UNKNOWN} == {BackendState.UNREACHABLE}


def test_what_a_backend_still_works_on_is_never_over() -> None:
    working = of(BackendState.QUEUED, BackendState.ALIVE, BackendState.RECOVERING)
    assert not any(known.status.is_over for known in working)


def test_what_a_backend_has_let_go_is_always_over() -> None:
    let_go = of(BackendState.GONE, BackendState.CANCELLED, BackendState.FAILED)
    assert all(known.status.is_over for known in let_go)


def test_what_a_person_cancelled_is_cancelled_and_nothing_else_is() -> None:
    assert {known.status for known in of(BackendState.CANCELLED)} == {Status.CANCELLED}
    assert {known.backend for known in ALL if known.status is Status.CANCELLED} == {BackendState.CANCELLED}


def test_what_was_asked_to_stop_through_the_bucket_is_cancelled_once_it_is_let_go_unless_it_ended_otherwise() -> None:
    for known in UNFINISHED:
        asked = replace(known, asked_to_stop=True).status
        let_go = known.backend in (BackendState.GONE, BackendState.FAILED) and not known.published
        if let_go and known.last_end in (None, Outcome.PREEMPTED):
            assert asked is Status.CANCELLED
        else:
            assert asked is known.status


def test_a_process_without_an_attempt_is_pending_with_one_running_and_after_an_end_recovering() -> None:
    for known in of(BackendState.ALIVE):
        if known.attempts == 0:
            assert known.status is Status.PENDING
        elif known.last_end is None:
            assert known.status is Status.RUNNING
        else:
            assert known.status is Status.RECOVERING


def test_queued_is_pending_and_recovering_is_recovering() -> None:
    assert {known.status for known in of(BackendState.QUEUED)} == {Status.PENDING}
    assert {known.status for known in of(BackendState.RECOVERING)} == {Status.RECOVERING}


def test_gone_after_a_final_failure_is_failed() -> None:
    for known in of(BackendState.GONE):
        if known.last_end in (Outcome.FAILED, Outcome.BAD_INPUT):
            assert known.status is Status.FAILED


def test_gone_after_a_kill_or_a_preemption_is_interrupted_so_that_it_can_go_on() -> None:
    for known in of(BackendState.GONE):
        if known.last_end in (None, Outcome.PREEMPTED, Outcome.DONE) and not known.published:
            assert known.status is Status.INTERRUPTED


def test_a_landed_adapter_is_out_of_budget_and_no_failure() -> None:
    for known in of(BackendState.GONE, BackendState.FAILED):
        if known.last_end is Outcome.OUT_OF_BUDGET:
            assert known.status is Status.OUT_OF_BUDGET


def test_a_failure_that_the_backend_saw_is_one_even_without_an_end_record() -> None:
    for known in of(BackendState.FAILED):
        if not known.published and known.last_end is not Outcome.OUT_OF_BUDGET:
            assert known.status is Status.FAILED


@pytest.mark.parametrize("status", Status)
def test_over_means_that_only_a_person_changes_it(status: Status) -> None:
    going = {Status.PENDING, Status.RUNNING, Status.RECOVERING, Status.UNKNOWN}
    assert status.is_over == (status not in going)
