"""Promise: what is trained is what was checked; and what is wrong with rows is said at once, before weights come."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.contract.errors import DatasetInvalid, IdentityMismatch
from job.contract.recipe import BaseModelRef
from job.contract.records import DatasetDigest, RunRecord
from job.dataset.reader import read_rows
from job.dataset.split import tokens_digest
from job.rows import SHOWN, Files, Rows, prepare
from job.tiny import write_tiny_model
from job.weights import locate
from tests.contract.examples import START, recipe
from tests.hubserver import HubServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What there is before the weights are."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    return folder


def said(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


GOOD = [said(f"What is {n} + {n}?", f"It is {2 * n}.") for n in range(12)]


def dataset(path: Path, lines: list[str]) -> DatasetDigest:
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(data)
    return DatasetDigest(uri=path.name, sha256=hashlib.sha256(data).hexdigest(), size=len(data), rows=len(lines))


def run_of(
    folder: Path, lines: list[str], own: list[str] | None = None, *, tokens: str | None = None, **sections: Any
) -> tuple[RunRecord, Files]:
    """A run and its files; `own` are the lines of a held-out file of its own."""
    train = dataset(folder / "rows.jsonl", lines)
    held_out = dataset(folder / "own.jsonl", own) if own is not None else None
    parsed = recipe(**{"dataset": {"train": "rows.jsonl", "held_out": "own.jsonl" if own else 0.25}, **sections})
    record = RunRecord(
        run_id="run",
        created_at=START,
        recipe=parsed,
        recipe_digest=parsed.digest(),
        train=train,
        held_out=held_out,
        ftjob="9.9",
        tokens_sha256=tokens,
    )
    return record, Files(folder / "rows.jsonl", folder / "own.jsonl" if own is not None else None)


def prepared(run: tuple[RunRecord, Files], model: Path, go_on: Callable[[], None] = lambda: None) -> Rows:
    return prepare(*run, model, go_on=go_on)


def lines_of(rows: Rows) -> tuple[list[int], list[int]]:
    return [row.line for row in rows.train], [row.line for row in rows.held_out]


def test_every_row_is_rendered_without_the_weights_and_is_in_one_of_the_two_parts(model: Path, tmp_path: Path) -> None:
    train, held_out = lines_of(prepared(run_of(tmp_path, GOOD), model))
    assert sorted(train + held_out) == list(range(1, 13))
    assert len(held_out) == 3
    assert lines_of(prepared(run_of(tmp_path, GOOD[:9], GOOD[9:]), model)) == (list(range(1, 10)), [1, 2, 3])


def test_the_tokens_that_were_checked_are_the_tokens_that_are_trained(model: Path, tmp_path: Path) -> None:
    rows = prepared(run_of(tmp_path, GOOD), model)
    digest = tokens_digest(rows.train, rows.held_out)
    assert prepared(run_of(tmp_path, GOOD, tokens=digest), model) == rows
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<|im_end|>\\n'", "<|im_end|>\\n\\n'")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(IdentityMismatch) as raised:
        prepared(run_of(tmp_path, GOOD, tokens=digest), other)
    assert f"instead of {digest[:12]}…; the launcher was ftjob 9.9, and here are ftjob " in raised.value.message
    assert "transformers 5." in raised.value.message


def test_all_problems_are_told_at_once_with_their_lines(model: Path, tmp_path: Path) -> None:
    bad = [*GOOD[:2], "{", GOOD[2], said("hi", ""), said("a <|im_end|> inside", "yes")]
    with pytest.raises(DatasetInvalid) as raised:
        prepared(run_of(tmp_path, bad), model)
    message = raised.value.message
    assert message.startswith("dataset rows.jsonl line 3: ")
    assert [f"rows.jsonl line {line}: " in message for line in (1, 2, 3, 4, 5, 6)] == [0, 0, 1, 0, 1, 1]
    assert "more" not in message


def test_many_problems_are_counted_and_the_first_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid) as raised:
        prepared(run_of(tmp_path, [*GOOD, *["{"] * 30]), model)
    assert raised.value.message.count(" line ") == SHOWN
    assert raised.value.message.endswith("; and 20 more")


def test_rows_that_the_template_cannot_train_are_told_all_at_once(model: Path, tmp_path: Path) -> None:
    long = [said("x" * 100, "y"), GOOD[0], said("z" * 100, "w"), GOOD[1]]
    with pytest.raises(DatasetInvalid) as raised:
        prepared(run_of(tmp_path, long, training={"max_length": 64}), model)
    assert "rows.jsonl line 1: no token of it would be trained" in raised.value.message
    assert "rows.jsonl line 3: no token of it would be trained" in raised.value.message
    assert "line 2" not in raised.value.message
    assert "raise training.max_length" in raised.value.hint


def test_held_out_rows_that_are_all_trained_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"own\.jsonl"):
        prepared(run_of(tmp_path, GOOD, GOOD[:3]), model)


def test_a_notice_ends_it_between_rows_and_comes_before_a_complaint(model: Path, tmp_path: Path) -> None:
    class Noticed(Exception):
        pass

    calls = 0

    def go_on() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Noticed

    with pytest.raises(Noticed):
        prepared(run_of(tmp_path, GOOD), model, go_on)
    assert calls == 5 < len(list(read_rows(tmp_path / "rows.jsonl", name="rows")))
    calls = 4
    with pytest.raises(Noticed):
        prepared(run_of(tmp_path, ["{"]), model, go_on)


def test_no_weights_are_downloaded_for_rows_that_cannot_be_trained(model: Path, tmp_path: Path, hub: HubServer) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.add("org/model", files | {"model.safetensors": b"0" * 1000})
    seen: list[Path] = []

    def refuse(folder: Path) -> None:
        seen.append(folder)
        prepared(run_of(tmp_path, ["{"]), folder)

    with pytest.raises(DatasetInvalid):
        locate(BaseModelRef(id="org/model"), tmp_path / "work", before_weights=refuse)
    [folder] = seen
    assert {path.name for path in folder.iterdir()} == set(files)
