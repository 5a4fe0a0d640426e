"""Promise: an adapter is published whole, by one attempt, with papers that say the truth; or not at all."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from job.checkpoints import digest_file, fetch_verified
from job.contract.errors import NotFound, Unreachable
from job.contract.passport import DatasetPassport, Passport
from job.contract.records import AdapterManifest
from job.publish import CARD, PASSPORT, model_card, publish, write_papers
from job.storage import FileStore, Store
from job.tiny import write_tiny_model
from tests.contract.examples import START, passport, recipe
from tests.doubles import Death, DyingStore, FlakyStore
from tests.job.kit import RUN

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
WEIGHTS = {"adapter_config.json": b"{}\n", "adapter_model.safetensors": b"weights" * 1000}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder)
    return folder


def adapter_folder(path: Path, base: Path, *, papers: Passport | None = None, weights: bytes = b"") -> Path:
    """What an attempt has on its disk before it publishes."""
    path.mkdir(parents=True)
    for name, data in WEIGHTS.items():
        (path / name).write_bytes(data + weights)
    write_papers(papers or passport(), base, path)
    return path


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return adapter_folder(tmp_path / "adapter", base)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "bucket")


def manifest_in(store: Store) -> AdapterManifest | None:
    try:
        return AdapterManifest.from_bytes(store.get(RUN.adapter_manifest), name="adapter.json")
    except NotFound:
        return None


def read_whole(store: Store, manifest: AdapterManifest, folder: Path) -> dict[str, bytes]:
    """Every file that the manifest names, verified."""
    for name, digest in manifest.files.items():
        fetch_verified(store, RUN.adapter_file(manifest.attempt, name), folder / name, digest)
    return {name: (folder / name).read_bytes() for name in manifest.files}


# The papers.


def test_the_papers_are_complete(folder: Path, base: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*WEIGHTS, *TOKENIZER, PASSPORT, CARD}
    for name in TOKENIZER:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert Passport.from_bytes((folder / PASSPORT).read_bytes(), name=PASSPORT) == passport()
    assert (folder / CARD).read_text(encoding="utf-8") == model_card(passport())


def test_the_base_models_own_weights_and_config_are_not_delivered(folder: Path) -> None:
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists()


def test_equal_passports_are_equal_papers(tmp_path: Path, base: Path) -> None:
    one, two = (adapter_folder(tmp_path / name, base) for name in ("one", "two"))
    assert {p.name: digest_file(p) for p in one.iterdir()} == {p.name: digest_file(p) for p in two.iterdir()}


def front_matter(card: str) -> dict[str, Any]:
    empty, matter, _ = card.split("---\n", 2)
    assert empty == ""
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def cells(card: str, first: str) -> list[str]:
    """The rest of the table row that begins so."""
    [line] = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def with_base(name: str) -> Passport:
    changed = passport().recipe.base_model.model_copy(update={"id": name})
    return passport().model_copy(update={"recipe": recipe().model_copy(update={"base_model": changed})})


@pytest.mark.parametrize(
    "name", ["org/model", "builtin:tiny", "./my model: the #1", '/models/"quoted"', "~", "./größe/模型", "/a\\b", "1e3"]
)
def test_the_front_matter_is_yaml_and_names_the_base_whatever_its_name(name: str) -> None:
    matter = front_matter(model_card(with_base(name)))
    assert matter == {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "ftjob"],
    }


@pytest.mark.parametrize("name", ["org/model", './"quoted" \\ folder', "builtin:tiny"])
def test_the_code_on_the_card_is_python_and_loads_the_base_by_its_name(name: str) -> None:
    card = model_card(with_base(name))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    loaded = json.loads(code.split("AutoModelForCausalLM.from_pretrained(")[1].split(")\n")[0])
    assert loaded == ("tiny" if name == "builtin:tiny" else name)
    assert ("python -m job.tiny" in card) == (name == "builtin:tiny")


def test_the_card_says_the_numbers_of_the_passport() -> None:
    papers = passport()
    data: DatasetPassport = papers.dataset
    card = model_card(papers)
    assert "# my-run\n" in card
    assert cells(card, "method") == ["qlora, rank 16, alpha 32, dropout 0.0"]
    assert cells(card, "dataset") == [f"9 rows trained, 1 held out, sha256 `{data.train.sha256}`"]
    assert cells(card, "trained tokens") == ["300 (100 an epoch)"]
    assert cells(card, "learning rate") == ["0.0002, cosine"]
    assert cells(card, "chosen") == ["step 3, epoch 1: the lowest held-out loss"]
    assert cells(card, "held-out loss") == ["1.0000 nats per token"]
    assert cells(card, "attempts") == ["1, 0 steps repeated"]
    assert cells(card, "1") == ["3", "1.0000"]


def test_the_card_of_an_adapter_that_landed_says_both_ways_to_go_on() -> None:
    """The money may have ended or the time, and more of the other does not help."""
    papers = passport()
    assert "Not complete" not in model_card(papers)
    card = model_card(papers.model_copy(update={"complete": False}))
    assert f"`ftjob launch --run {papers.run_id}` with `--budget +USD` or `--by TIME` goes on" in card


def test_the_card_of_another_run_says_its_numbers() -> None:
    """Keeps the test above honest: nothing on the card is fixed."""
    first = passport().attempts[0]
    papers = passport().model_copy(
        update={
            "recipe": recipe(
                method="lora",
                base_model={"id": "org/model", "revision": "abc"},
                lora={"rank": 3, "alpha": 5, "dropout": 0.25, "dora": True},
                training={"scheduler": "linear"},
            ),
            "learning_rate": 0.03,
            "attempts": (first, first.model_copy(update={"attempt": 2, "steps_repeated": 4})),
            "chosen": passport().chosen.model_copy(update={"step": 8, "epoch": 2.5, "held_out_loss": None}),
            "epochs": (*passport().epochs, passport().epochs[0].model_copy(update={"epoch": 2, "held_out_loss": None})),
        }
    )
    card = model_card(papers)
    assert front_matter(card)["tags"] == ["lora", "lora", "ftjob"]
    assert "`org/model` at revision `abc`" in card
    assert cells(card, "method") == ["lora, rank 3, alpha 5, dropout 0.25, DoRA"]
    assert cells(card, "learning rate") == ["0.03, linear"]
    assert cells(card, "chosen")[0].startswith("step 8, epoch 2.5: ")
    assert cells(card, "held-out loss") == ["none"]
    assert cells(card, "attempts") == ["2, 4 steps repeated"]
    assert cells(card, "2") == ["3", ""]


# The publication.


def test_what_is_published_is_the_folder_every_file_with_its_digest(
    store: FileStore, folder: Path, tmp_path: Path
) -> None:
    assert publish(store, RUN, passport(), folder, attempt=2)
    manifest = manifest_in(store)
    assert manifest is not None
    assert read_whole(store, manifest, tmp_path / "read") == {p.name: p.read_bytes() for p in folder.iterdir()}
    chosen = passport().chosen
    assert (manifest.attempt, manifest.complete, manifest.created_at) == (2, True, START)
    assert (manifest.step, manifest.epoch, manifest.held_out_loss) == (chosen.step, chosen.epoch, chosen.held_out_loss)


def test_of_two_attempts_the_second_loses_and_none_of_its_files_is_named(
    store: FileStore, tmp_path: Path, base: Path
) -> None:
    later = passport().model_copy(update={"created_at": START + timedelta(seconds=1)})
    first = adapter_folder(tmp_path / "first", base)
    second = adapter_folder(tmp_path / "second", base, papers=later, weights=b"other")
    assert publish(store, RUN, passport(), first, attempt=1)
    before = store.get(RUN.adapter_manifest)
    assert not publish(store, RUN, later, second, attempt=2)
    assert store.get(RUN.adapter_manifest) == before
    manifest = manifest_in(store)
    assert manifest is not None
    assert manifest.attempt == 1
    assert read_whole(store, manifest, tmp_path / "read") == {p.name: p.read_bytes() for p in first.iterdir()}


def test_publishing_again_after_a_lost_answer_is_ones_own_publication(store: FileStore, folder: Path) -> None:
    assert publish(store, RUN, passport(), folder, attempt=1)
    assert publish(store, RUN, passport(), folder, attempt=1)


def test_out_of_reach_nothing_is_published_and_it_may_be_tried_again(
    store: FileStore, folder: Path, tmp_path: Path
) -> None:
    flaky = FlakyStore(store)
    flaky.cut()
    with pytest.raises(Unreachable):
        publish(flaky, RUN, passport(), folder, attempt=1)
    assert manifest_in(store) is None
    flaky.mend()
    assert publish(flaky, RUN, passport(), folder, attempt=1)
    manifest = manifest_in(store)
    assert manifest is not None
    read_whole(store, manifest, tmp_path / "read")


WRITES = len(WEIGHTS) + len(TOKENIZER) + 3  # passport, card, manifest


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("die_at", range(1, WRITES + 1))
def test_dying_at_any_write_leaves_a_whole_adapter_or_none_and_the_next_attempt_delivers(
    store: FileStore, folder: Path, tmp_path: Path, die_at: int, when: Literal["before", "after"]
) -> None:
    dying = DyingStore(store, die_at=die_at, when=when)
    with pytest.raises(Death):
        publish(dying, RUN, passport(), folder, attempt=1)
    manifest = manifest_in(store)
    assert (manifest is not None) == ((die_at, when) == (WRITES, "after"))
    if manifest is not None:
        read_whole(store, manifest, tmp_path / "read")
    assert publish(store, RUN, passport(), folder, attempt=2) == (manifest is None)
    final = manifest_in(store)
    assert final is not None
    assert final.attempt == (2 if manifest is None else 1)
    assert read_whole(store, final, tmp_path / "again") == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_sweep_above_dies_at_every_write_there_is(store: FileStore, folder: Path) -> None:
    counting = DyingStore(store, die_at=None)
    assert publish(counting, RUN, passport(), folder, attempt=1)
    assert counting.writes == WRITES
