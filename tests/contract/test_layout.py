"""Every key: what is written is what readers of listings understand, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.errors import BadInput
from job.contract.layout import CheckpointName, Key, RunLayout, check_run_id, is_key, run_of_recipe_key
from job.storage import check_key

RUN_IDS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
LAYOUTS = st.builds(RunLayout, RUN_IDS)
ATTEMPTS = st.integers(0, 9999)
NAMES = st.builds(CheckpointName, st.integers(0, 99_999_999), ATTEMPTS)
FILES = st.text(min_size=1).filter(is_key)


def readers(layout: RunLayout, key: str) -> dict[str, object]:
    """What each reader makes of a key, without those that do not know it."""
    answers = {
        "claim": layout.claimed_attempt(key),
        "end": layout.ended_attempt(key),
        "manifest": layout.committed_checkpoint(key),
        "file": layout.checkpoint_of_file(key),
        "metrics": layout.metrics_position(key),
        "recipe": run_of_recipe_key(key),
    }
    return {name: answer for name, answer in answers.items() if answer is not None}


@given(LAYOUTS, ATTEMPTS, st.integers(0, 999_999), NAMES)
def test_every_key_is_read_as_what_it_was_written_as_and_by_one_reader_only(
    layout: RunLayout, attempt: int, sequence: int, name: CheckpointName
) -> None:
    assert readers(layout, layout.claim(attempt)) == {"claim": attempt}
    assert readers(layout, layout.end(attempt)) == {"end": attempt}
    assert readers(layout, layout.checkpoint_manifest(name)) == {"manifest": name}
    assert readers(layout, layout.metrics_object(attempt, sequence)) == {"metrics": (attempt, sequence)}
    assert readers(layout, layout.recipe) == {"recipe": layout.run_id}
    assert readers(layout, layout.adapter_manifest) == {}
    assert readers(layout, layout.adapter_file(attempt, "a.json")) == {}


@given(LAYOUTS, NAMES, FILES)
def test_a_file_of_a_checkpoint_is_known_by_its_checkpoint(layout: RunLayout, name: CheckpointName, file: str) -> None:
    key = layout.checkpoint_file(name, file)
    assert readers(layout, key) == {"file": name}
    assert key == layout.checkpoint_files(name) + file
    assert str(check_key(key)) == key


@given(LAYOUTS, ATTEMPTS, st.integers(0, 999_999), NAMES)
def test_every_key_is_one_that_a_store_takes(
    layout: RunLayout, attempt: int, sequence: int, name: CheckpointName
) -> None:
    for key in (
        layout.recipe,
        layout.claim(attempt),
        layout.end(attempt),
        layout.checkpoint_manifest(name),
        layout.checkpoint_file(name, "a/b"),
        layout.metrics_object(attempt, sequence),
        layout.adapter_file(attempt, "a/b"),
        layout.adapter_manifest,
    ):
        assert str(check_key(key)) == key
        assert key.startswith(layout.root)


@given(LAYOUTS, RUN_IDS, ATTEMPTS, NAMES)
def test_keys_of_another_run_are_left_alone(layout: RunLayout, other: str, attempt: int, name: CheckpointName) -> None:
    if other == layout.run_id:
        other = "x" if layout.run_id != "x" else "y"
    foreign = RunLayout(other)
    for key in (foreign.claim(attempt), foreign.end(attempt), foreign.checkpoint_manifest(name)):
        assert readers(layout, key) == {}


@given(LAYOUTS, st.text())
def test_no_reader_breaks_on_a_key_that_is_none_of_ours(layout: RunLayout, text: str) -> None:
    for key in (text, layout.root + text, layout.attempts + text, layout.checkpoints + text, layout.metrics + text):
        for name, answer in readers(layout, key).items():
            match name, answer:
                case "claim", int(attempt):
                    assert layout.claim(attempt) == key
                case "end", int(attempt):
                    assert layout.end(attempt) == key
                case "manifest", CheckpointName() as checkpoint:
                    assert layout.checkpoint_manifest(checkpoint) == key
                case "metrics", (int(attempt), int(sequence)):
                    assert layout.metrics_object(attempt, sequence) == key
                case "file", CheckpointName() as checkpoint:
                    assert key.startswith(layout.checkpoint_files(checkpoint))
                case _:
                    assert RunLayout(str(answer)).recipe == key


@pytest.mark.parametrize(
    "rest",
    [
        *[
            "attempts/1.json",
            "attempts/00001.json",
            "attempts/0001.json.tmp",
            "attempts/\u0660\u0660\u0660\u0661.json",
            "attempts/0001",
        ],
        *["attempts/0001.end.json/x", "checkpoints/step-00000400-a0001", "checkpoints/step-400-a0001.json"],
        *["checkpoints/step-00000400-a0001.json\n", "checkpoints/step-00000400-a0001/", "metrics/a0001-1.jsonl"],
        *["xattempts/0001.json", "recipe.jsonl", "Recipe.json", ""],
    ],
)
def test_what_only_looks_like_a_key_is_none(rest: str) -> None:
    layout = RunLayout("my-run")
    assert readers(layout, layout.root + rest) == {}


@given(NAMES)
def test_a_checkpoints_name_is_read_as_it_was_written(name: CheckpointName) -> None:
    assert CheckpointName.parse(str(name)) == name


@given(NAMES, NAMES)
def test_checkpoints_sort_alike_as_names_and_as_keys(one: CheckpointName, other: CheckpointName) -> None:
    assert (one < other) == (str(one) < str(other)) == ((one.step, one.attempt) < (other.step, other.attempt))


@pytest.mark.parametrize(
    "text", ["", "step-1-a1", "step-00000001-a0001 ", "step-00000001-a0001\n", "step--0000001-a0001"]
)
def test_what_is_no_checkpoints_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a checkpoint"):
        CheckpointName.parse(text)


def test_a_number_too_wide_for_its_key_is_refused_instead_of_written_where_no_reader_looks() -> None:
    layout = RunLayout("r")
    calls: list[Callable[[], Key]] = [
        lambda: layout.claim(10_000),
        lambda: layout.claim(-1),
        lambda: layout.end(10_000),
        lambda: layout.metrics_object(1, 1_000_000),
        lambda: layout.metrics_object(10_000, 1),
        lambda: layout.checkpoint_manifest(CheckpointName(100_000_000, 1)),
        lambda: layout.adapter_file(10_000, "x"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="does not fit into"):
            call()


@pytest.mark.parametrize("run_id", ["a", "0", "a-b", "a" * 63, "2026-my-run"])
def test_a_run_id_is_a_dns_label(run_id: str) -> None:
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "..", "a" * 64, "é", "a\n", "a b", "\u0661"]
)
def test_anything_else_is_no_run_id(run_id: str) -> None:
    with pytest.raises(BadInput, match="is not a run id"):
        check_run_id(run_id)
    with pytest.raises(BadInput, match="is not a run id"):
        RunLayout(run_id)
    assert run_of_recipe_key(f"runs/{run_id}/recipe.json") is None


@pytest.mark.parametrize("text", ["a", "a/b", "a.b", "..a", "a..", "a b", "é/世", "-", "a\n"])
def test_names_of_objects(text: str) -> None:
    assert is_key(text)
    assert Key(str(check_key(text))) == text


@pytest.mark.parametrize(
    "text", ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "./a", "a\\b", "\0", "\ud800"]
)
def test_what_could_leave_a_store_is_no_name(text: str) -> None:
    assert not is_key(text)
