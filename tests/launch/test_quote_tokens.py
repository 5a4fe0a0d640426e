"""Promise: tokens and steps are those that the job will have, or are said to be an estimate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.contract.recipe import Recipe
from job.dataset.reader import LineNumber, fingerprint, read_rows
from job.dataset.render import RenderedRow
from job.dataset.split import split
from job.tiny import write_tiny_model
from job.tokenising import Rendering, render_rows
from launch.steps import Lengths, pack, work_of
from launch.tokens import Sample, estimate, measure, ratio_error, take_sample

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.jsonl"


def sample_of(path: Path, most: int = 2000) -> Sample:
    return take_sample(path, fingerprint(path, name="rows"), most=most)


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    lines = [json.dumps({"prompt": "?", "completion": text}) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    return path


def recipe_of(held_out: object = None, **training: object) -> Recipe:
    return Recipe.model_validate(
        {
            "base_model": {"id": "builtin:tiny"},
            "dataset": {"train": "rows.jsonl", "held_out": held_out},
            "training": training,
        }
    )


def lengths_of(tokens: Sequence[int], *, of_rows: int | None = None) -> Lengths:
    rows = of_rows or len(tokens)
    sizes = tuple(4 * each for each in tokens)
    how = "counted" if rows == len(tokens) else "sampled"
    return Lengths(tuple(tokens), sizes, rows, sum(sizes) * rows // len(tokens), how, 0.0, "by hand")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 7, 100, 101])
def test_a_sample_is_spread_evenly_over_the_rows_and_blank_lines_are_none(tmp_path: Path, count: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [f"row {i}" for i in range(count)])
    sample = sample_of(path, most=10)
    numbers = [int(json.loads(line)["completion"].split()[1]) for line in sample.lines]
    assert len(numbers) == min(10, count)
    assert sample.whole == (count <= 10)
    gaps = [b - a for a, b in pairwise(numbers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_the_tokens_of_a_sample_are_scaled_by_bytes_and_say_how_sure_they_are(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = write_rows(tmp_path / "rows.jsonl", [draw.choice("xä€") * draw.randrange(1, 900) for _ in range(3000)])
    recipe = recipe_of(max_length=4096)
    exact = work_of(recipe, measure(sample_of(path, most=3000), base_model="builtin:tiny", why=""), None)
    sampled = measure(sample_of(path, most=300), base_model="builtin:tiny", why="")
    assert sampled.how == "sampled"
    assert "sampled 300 of 3,000 rows" in sampled.basis
    guessed = work_of(recipe, sampled, None)
    assert guessed.tokens_per_epoch == pytest.approx(exact.tokens_per_epoch, rel=4 * sampled.spread)
    assert guessed.steps == pytest.approx(exact.steps, rel=0.03)
    assert sampled.spread < 0.02  # by rows it would be 4 %


def test_an_error_of_a_ratio_is_what_is_seen_when_samples_are_drawn_again_and_again() -> None:
    draw = random.Random(1)
    sizes = [draw.randrange(100, 4000) for _ in range(2000)]
    tokens = [round(size / draw.uniform(3, 5)) for size in sizes]
    truth = sum(tokens) / sum(sizes)
    found, errors = [], []
    for _ in range(200):
        chosen = draw.sample(range(2000), 100)
        t, s = [tokens[i] for i in chosen], [sizes[i] for i in chosen]
        found.append(sum(t) / sum(s) / truth - 1)
        errors.append(ratio_error(t, s, of=2000))
    seen = (sum(each**2 for each in found) / 200) ** 0.5
    assert seen == pytest.approx(sum(errors) / 200, rel=0.2)


def test_without_a_tokenizer_it_is_an_estimate_and_says_why() -> None:
    lengths = measure(sample_of(QUICKSTART), base_model="org/model", why="transformers is not installed")
    assert lengths.how == "estimated"
    assert lengths.spread >= 0.15
    assert "transformers is not installed" in lengths.basis
    rows = list(read_rows(QUICKSTART, name="q"))
    assert lengths.tokens == tuple(estimate(row) for row in rows)


def test_the_split_is_the_jobs() -> None:
    cut = [10 * i + 10 for i in range(57)]
    rows = [RenderedRow(LineNumber(i), ids=(0,) * length, labels=()) for i, length in enumerate(cut)]
    for seed, share in ((42, 0.1), (7, 0.5)):
        train, held_out = split(rows, held_out=share, seed=seed)
        work = work_of(recipe_of(share, seed=seed, packing=False, batch_size=1, epochs=1), lengths_of(cut), None)
        assert work.tokens_per_epoch == sum(len(row.ids) for row in train)
        assert work.evaluated_batches == len(held_out)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300))
def test_packing_keeps_every_token_and_overfills_nothing(lengths: list[int]) -> None:
    packed = pack(lengths, 64)
    assert sum(packed) == sum(lengths)
    assert max(packed) <= 64
    assert sum(2 * each <= 64 for each in packed) <= 1  # two half-empty ones would have been one


def test_rows_that_are_too_long_are_counted_as_they_are_cut() -> None:
    work = work_of(recipe_of(max_length=100, packing=False, batch_size=2), lengths_of([50, 150, 250, 50]), None)
    assert work.tokens_per_epoch == 300
    assert work.cut_share == 0.5


def test_padding_is_to_the_longest_of_a_batch() -> None:
    alone = work_of(recipe_of(packing=False, batch_size=1), lengths_of([10, 1000]), None)
    pairs = work_of(recipe_of(packing=False, batch_size=2), lengths_of([10, 1000]), None)
    assert alone.batch_tokens == 505
    assert pairs.batch_tokens == pytest.approx(2 * (0.25 * 10 + 0.75 * 1000))


def test_a_held_out_file_of_its_own_is_evaluated_whole() -> None:
    recipe = recipe_of("held.jsonl", packing=False, batch_size=2)
    work = work_of(recipe, lengths_of([10] * 8), lengths_of([10] * 5))
    assert (work.sequences, work.evaluated_batches) == (8, 3)
    sampled = work_of(recipe, lengths_of([10] * 8, of_rows=80), lengths_of([10] * 5, of_rows=50))
    assert (sampled.sequences, sampled.evaluated_batches) == (80, 25)


@pytest.mark.slow
def test_tokens_and_sequences_are_those_of_the_job(tmp_path: Path) -> None:
    """Loads the training stack: the job's own rendering and packing are asked."""
    from job.batches import to_dataset

    write_tiny_model(tmp_path)
    rendering = Rendering(tmp_path, max_length=10_000)
    rows = list(render_rows(read_rows(QUICKSTART, name="q"), rendering, processes=1))
    rendered = [row for row in rows if isinstance(row, RenderedRow)]
    assert len(rendered) == len(rows)
    tokens = [len(row.ids) for row in rendered]
    assert tuple(tokens) == measure(sample_of(QUICKSTART), base_model="builtin:tiny", why="").tokens
    rendered = rendered * 6  # more than TRL packs at once
    packed = to_dataset(rendered, packing=True, max_length=192)
    assert sorted(map(len, packed["input_ids"])) == sorted(pack(tokens * 6, 192))


@pytest.mark.slow
def test_the_interval_between_saves_is_the_jobs() -> None:
    """Loads the training stack, for job.callbacks."""
    from job.callbacks import MEAN_SECONDS_BETWEEN_INTERRUPTIONS, best_interval
    from launch.interruptions import SAVE_MEAN_SECONDS, UPLOAD_BYTES_PER_SECOND, saving

    assert MEAN_SECONDS_BETWEEN_INTERRUPTIONS == SAVE_MEAN_SECONDS
    for parameters in (1_000, 40_000_000, 4_000_000_000):
        interval, blocking = saving(parameters, None)
        assert interval == best_interval(blocking, parameters * 12 / UPLOAD_BYTES_PER_SECOND)
    assert saving(1_000, 5.0)[0] == 300
