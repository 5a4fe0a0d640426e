"""Promise: a checkpoint is resumed only by what would compute the same bits; whatever differs is named."""

from __future__ import annotations

import pytest

from job.contract.errors import BadInput, IdentityMismatch
from job.contract.identity import DECISIVE_VERSIONS, check_resumable
from job.contract.records import Hardware, Identity, Versions
from tests.contract.examples import GPU, SHA, VERSIONS, identity

OTHER = "f" * 64
DECISIVE: dict[str, tuple[object, str]] = {
    "recipe": (OTHER, "the recipe changed"),
    "train": (OTHER, "the train dataset changed"),
    "held_out": (OTHER, "the held-out dataset changed"),
    "tokens": (OTHER, "the rendered tokens (chat template, tokenizer or split) changed"),
    "base_model": (OTHER, "the files of the base model changed"),
    "world_size": (2, "the number of GPUs was 1 and is 2"),
    "threads": (4, "the number of CPU threads was 1 and is 4"),
}


def with_versions(**changed: str) -> Identity:
    return identity().model_copy(update={"versions": VERSIONS.model_copy(update=changed)})


def with_hardware(**changed: object) -> Identity:
    return identity().model_copy(update={"hardware": GPU.model_copy(update=changed)})


def refusal(saved: Identity, here: Identity) -> str:
    with pytest.raises(IdentityMismatch) as raised:
        check_resumable(saved, here)
    return raised.value.message


def test_the_same_is_resumed_without_a_word() -> None:
    assert check_resumable(identity(), identity()) == []


def test_every_field_of_an_identity_is_decided_about() -> None:
    """A new field must be put into one of the tables; forgotten, it would never be compared."""
    assert set(Identity.model_fields) == {*DECISIVE, "versions", "hardware"}
    assert set(DECISIVE_VERSIONS) < set(Versions.model_fields)


@pytest.mark.parametrize("field", DECISIVE)
def test_each_decisive_field_is_refused_by_name_and_alone(field: str) -> None:
    value, says = DECISIVE[field]
    message = refusal(identity(), identity().model_copy(update={field: value}))
    assert message.endswith(f": {says}")


def test_a_held_out_file_that_came_or_went_is_refused() -> None:
    with_file = identity().model_copy(update={"held_out": SHA})
    assert "held-out" in refusal(with_file, identity())
    assert "held-out" in refusal(identity(), with_file)


@pytest.mark.parametrize("library", DECISIVE_VERSIONS)
def test_each_library_that_computes_is_refused_by_name_with_both_versions(library: str) -> None:
    message = refusal(identity(), with_versions(**{library: "9.9"}))
    assert message.endswith(f": {library} was 1.2.3 and is 9.9")


@pytest.mark.parametrize("library", sorted(set(Versions.model_fields) - set(DECISIVE_VERSIONS)))
def test_what_acts_only_through_the_tokens_may_differ(library: str) -> None:
    assert check_resumable(identity(), with_versions(**{library: "9.9"})) == []


def test_everything_that_differs_is_named_at_once_and_is_the_persons_to_mend() -> None:
    here = with_versions(**dict.fromkeys(DECISIVE_VERSIONS, "9.9")).model_copy(
        update={field: value for field, (value, _) in DECISIVE.items()}
    )
    with pytest.raises(BadInput) as raised:
        check_resumable(identity(), here)
    for _, says in DECISIVE.values():
        assert says in raised.value.message
    for library in DECISIVE_VERSIONS:
        assert f"{library} was 1.2.3 and is 9.9" in raised.value.message
    assert raised.value.message.count("; ") == len(DECISIVE) + len(DECISIVE_VERSIONS) - 1
    assert raised.value.hint


@pytest.mark.parametrize("changed", [{"name": "NVIDIA A100"}, {"device": "cpu"}, {"count": 8}])
def test_other_hardware_warns_and_goes_on(changed: dict[str, object]) -> None:
    [warning] = check_resumable(identity(), with_hardware(**changed))
    assert "the hardware was NVIDIA H100" in warning


def test_a_warning_names_both_machines() -> None:
    [warning] = check_resumable(identity(), with_hardware(name="NVIDIA A100"))
    assert warning == "the hardware was NVIDIA H100 and is NVIDIA A100"


def test_more_memory_changes_no_bit() -> None:
    assert check_resumable(identity(), with_hardware(memory_bytes=141 * 2**30)) == []


def test_other_hardware_does_not_hide_a_refusal() -> None:
    here = with_hardware(name="NVIDIA A100").model_copy(update={"recipe": OTHER})
    assert refusal(identity(), here).endswith(": the recipe changed")


def test_hardware_is_told_apart_by_what_rounds() -> None:
    card = Hardware(device="cuda", name="X", memory_bytes=1, count=1)
    assert not card.computes_unlike(card.model_copy(update={"memory_bytes": 2}))
    assert card.computes_unlike(card.model_copy(update={"count": 2}))
