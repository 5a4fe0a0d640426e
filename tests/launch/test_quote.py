"""Promise: nobody is surprised by the bill, and what cannot be known is not told."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from job.contract.layout import Key
from job.contract.recipe import BaseModelRef, Recipe
from job.contract.records import DatasetDigest
from job.contract.submission import Offer
from job.storage import open_store
from launch.bill import _launches, _poisson
from launch.facts import ModelFacts, look_at
from launch.hub import Hub, Pinned
from launch.quote import Facts, Quote, make_quote, refusal
from launch.render_quote import duration, quote_lines
from launch.shape import LLAMA_8B, LLAMA_70B
from launch.steps import Lengths, work_of
from launch.tokens import measure, take_sample
from tests.hubserver import HubServer
from tests.launch.kit import small_model
from tests.launch.test_quote_speeds import LLAMA_8B_CONFIG, recipe_of

LENGTHS = Lengths((500,) * 100, (2000,) * 100, 10_000, 20_000_000, "sampled", 0.01, "sampled 100 of 10,000 rows")
FACTS = Facts(LLAMA_8B, 16 * 10**9, LENGTHS)
FACTS_70B = Facts(LLAMA_70B, 141 * 10**9, LENGTHS)


def offer(gpu: str = "H100", *, cloud: str = "nebius", spot: bool = False, usd: float | None = 2.0) -> Offer:
    return Offer(cloud=cloud, region="here", gpu=gpu, gpus=1, spot=spot, usd_per_hour=usd)


def quote(*offers: Offer | None, facts: Facts = FACTS, recipe: Recipe | None = None) -> Quote:
    return make_quote(recipe or recipe_of(), facts, offers or (offer(),))


def usd(found: Quote) -> tuple[float, float]:
    assert found.chosen.usd is not None
    return found.chosen.usd.p50, found.chosen.usd.p90


def test_the_lengths_of_rows_tell_what_they_attend_to_and_how_long_the_longest_is() -> None:
    alone = Recipe.model_validate(
        recipe_of().model_dump(exclude={"output"}) | {"dataset": {"train": "s3://mine/rows.jsonl", "held_out": None}}
    )
    short = Lengths((100, 300), (1, 1), 2, 2, "counted", 0.0, "")
    work = work_of(alone, short, None)
    assert work.longest == 300
    assert work.within == (100**2 + 300**2) / 400 / 2
    assert work_of(alone, Lengths((100, 4000), (1, 1), 2, 2, "counted", 0.0, ""), None).longest == 2048  # cut
    assert work_of(alone, Lengths((100, 300), (1, 1), 9, 9, "sampled", 0.0, ""), None).longest == 2048


def test_a_quote_is_a_value_that_can_be_stored_and_is_the_same_every_time() -> None:
    first = quote(offer(spot=True), offer("H200"))
    assert quote(offer(spot=True), offer("H200")) == first
    assert Quote.model_validate_json(first.model_dump_json()) == first


def test_the_items_add_up_to_the_bill() -> None:
    found = quote().chosen
    assert found.seconds is not None
    assert sum(item.seconds.p50 for item in found.items) == pytest.approx(found.seconds.p50, rel=0.05)
    assert found.usd is not None
    assert found.usd.p50 == pytest.approx(found.seconds.p50 / 3600 * 2.0)
    names = [item.name for item in found.items]
    assert names == ["provisioning", "image", "weights", "loading", "training", "evaluating", "saving"]
    assert all(item.basis for item in found.items)


def test_spot_machines_are_expected_to_be_taken_away_and_that_is_paid_for() -> None:
    long = recipe_of(epochs=100)
    calm, taken = quote(recipe=long), quote(offer(spot=True), recipe=long)
    assert calm.chosen.interruptions == 0
    assert taken.chosen.interruptions > 0.5
    assert usd(taken)[0] > usd(calm)[0]
    assert usd(taken)[1] > usd(calm)[1]
    item = taken.chosen.items[-1]
    assert item.name == "interruptions"
    assert item.seconds.p90 > 2 * 500  # two starts or more, in bad luck
    assert "repeats" in item.basis


def test_an_announced_interruption_repeats_no_work() -> None:
    aws = quote(offer(cloud="aws", spot=True), recipe=recipe_of(epochs=100)).chosen.items[-1]
    assert "no work: the notice is answered" in aws.basis


def test_more_work_costs_more_and_a_dearer_hour_too() -> None:
    once, thrice = quote(recipe=recipe_of(epochs=1)), quote(recipe=recipe_of(epochs=3))
    assert usd(once)[0] < usd(thrice)[0] < 3 * usd(once)[0]  # the start is paid for once
    assert usd(quote(offer(usd=4.0)))[0] == pytest.approx(2 * usd(quote())[0])
    assert usd(quote(facts=FACTS_70B))[0] > 4 * usd(quote())[0]
    for found in (once, thrice, quote(offer(spot=True))):
        assert usd(found)[0] < usd(found)[1]


def test_what_is_less_known_has_a_wider_bill() -> None:
    def width(found: Quote) -> float:
        p50, p90 = usd(found)
        return p90 / p50

    guessed = Lengths(LENGTHS.tokens, LENGTHS.sizes, 10_000, 20_000_000, "estimated", 0.3, "estimated")
    long = recipe_of(epochs=10)
    assert width(quote(facts=Facts(LLAMA_8B, 16 * 10**9, guessed), recipe=long)) > width(quote(recipe=long))
    widths = [width(quote(offer(gpu), recipe=long)) for gpu in ("H200", "H100", "L40S")]
    assert widths == sorted(widths)


def test_a_cluster_of_ones_own_takes_time_and_no_dollars() -> None:
    found = quote(offer(cloud="slurm", usd=None))
    assert found.chosen.usd is None
    assert found.chosen.seconds is not None
    assert quote_lines(found)[1].startswith("takes    ")
    assert refusal(found, max_usd=0.01) is None


@pytest.mark.parametrize(
    ("facts", "gpu", "why"),
    [
        (FACTS, "T4", "does not compute in bf16"),
        (FACTS, "Quantum", "nobody measured Quantum"),
        (Facts("the hub is out of reach", None, LENGTHS), "H100", "the hub is out of reach"),
        (Facts(LLAMA_8B, 0, "the dataset was not read"), "H100", "the dataset was not read"),
    ],
)
def test_what_is_not_known_is_said_with_its_reason_and_refuses_nothing(facts: Facts, gpu: str, why: str) -> None:
    found = quote(offer(gpu), facts=facts)
    assert found.chosen.seconds is None
    assert why in found.chosen.unknown
    assert any(line.startswith("costs    not known: ") and why in line for line in quote_lines(found))
    assert refusal(found, max_usd=0.01) is None


def test_a_budget_under_p50_is_refused_with_what_would_do() -> None:
    found = quote(offer(usd=20.0), offer("L40S", usd=0.2))
    p50, p90 = usd(found)
    refused = refusal(found, max_usd=p50 - 0.01)
    assert refused is not None
    assert f"${p50:.2f} (p50)" in refused.message
    assert f"--budget {math.ceil(p90 * 100) / 100:.2f}" in refused.hint
    assert "L40S on demand at nebius/here" in refused.hint
    assert "--anyway" in refused.hint
    assert refusal(found, max_usd=p50 + 0.01) is None
    assert refusal(found) is None


def test_a_part_of_the_work_that_is_offered_for_a_budget_keeps_it() -> None:
    found = quote()
    budget = usd(found)[0] * 0.6
    refused = refusal(found, max_usd=budget)
    assert refused is not None
    share = next(int(word[:-1]) for word in refused.hint.split() if word.endswith("%")) / 100
    rows = round(10_000 * share)
    fewer = Lengths(LENGTHS.tokens, LENGTHS.sizes, rows, 2000 * rows, "sampled", 0.01, "")
    assert refusal(quote(facts=Facts(LLAMA_8B, 16 * 10**9, fewer)), max_usd=budget * 1.03) is None


def test_a_model_that_does_not_fit_is_refused_with_what_would_fit() -> None:
    found = quote(offer("A100"), offer("H200"), facts=FACTS_70B)
    refused = refusal(found)
    assert refused is not None
    assert "does not fit on A100" in refused.message
    assert "base weights in NF4 32.9" in refused.message
    assert "--gpu H200" in refused.hint
    assert "--anyway" in refused.hint
    assert refusal(quote(offer("H200"), offer("A100"), facts=FACTS_70B)) is None


def test_inputs_that_the_machines_own_memory_cannot_hold_are_refused_before_money() -> None:
    recipe = recipe_of(batch_size=12, max_length=8192, packing=False)
    small, large = (offer().model_copy(update={"instance_type": "a3", "memory_gib": gib}) for gib in (117.0, 2000.0))
    assert refusal(quote(large, facts=FACTS_70B, recipe=recipe)) is None
    refused = refusal(quote(small, facts=FACTS_70B, recipe=recipe))
    assert refused is not None
    assert "does not fit on a3" in refused.message
    assert "and it has 117" in refused.message
    assert "batch_size" in refused.hint
    assert "--anyway" in refused.hint


def test_every_number_that_is_shown_has_its_basis_beside_it() -> None:
    lines = quote_lines(quote(offer(spot=True), offer("A100"), facts=FACTS_70B, recipe=recipe_of(epochs=5)))
    text = "\n".join(lines)
    for word in (
        "sampled 100 of 10,000 rows",
        "(p50)",
        "(p90)",
        "assumed",
        "datasheet",
        "largest: what layers keep for the backward pass 33.6, base weights in NF4 32.9",
        "it takes what is free, and 43.5 GiB would do, slower: 52 layers keep everything but gate and up",
    ):
        assert word in text
    assert any(
        line.startswith("  else") and line.endswith("A100 on demand nebius/here, memory: does not fit")
        for line in lines
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(14.4, "14 s"), (59.4, "59 s"), (185, "3:05 min"), (3599, "1:00 h"), (7500, "2:05 h")]
)
def test_durations_are_as_fine_as_matters(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_weights_of_this_machine_are_not_downloaded() -> None:
    here = recipe_of().model_copy(update={"base_model": BaseModelRef(id="/models/x")})
    assert "weights" in [item.name for item in quote(None).chosen.items]
    assert [item.name for item in quote(None, recipe=here).chosen.items][:2] == ["loading", "training"]


def test_the_imagined_launches_are_what_they_should_be() -> None:
    draws = _launches()
    assert sum(draw.speed for draw in draws) == pytest.approx(0, abs=1e-6)
    assert sum(draw.speed**2 for draw in draws) / len(draws) == pytest.approx(1, abs=0.02)
    assert sum(draw.speed * draw.rate for draw in draws) / len(draws) == pytest.approx(0, abs=0.15)
    luck = [random.Random(0).random() for _ in range(1)] + [draw.luck for draw in draws]
    assert sum(_poisson(1.7, each) for each in luck) / len(luck) == pytest.approx(1.7, abs=0.05)
    assert _poisson(0.0, 0.999) == 0


# -------------------------------------------------------------------------------------------------- what it rests on


def model_from(hub: Hub, pinned: Pinned, folder: Path = Path("/nowhere")) -> ModelFacts:
    return look_at(pinned, hub=hub, variables={"HF_HOME": "/nowhere"}, folder=folder)


def facts_from(hub: Hub, pinned: Pinned) -> Facts:
    return model_from(hub, pinned).quoted(LENGTHS, None)


def test_the_shape_comes_from_the_hub_with_the_commit_that_was_pinned(hub: HubServer) -> None:
    files = {"config.json": json.dumps(LLAMA_8B_CONFIG).encode(), "model.safetensors": b"1" * 100}
    commit = hub.add("org/model", files)
    asking = Hub(hub.endpoint, pauses=())
    pinned = asking.pin(BaseModelRef(id="org/model"))
    hub.add("org/model", files | {"config.json": b"{}"})
    facts = facts_from(asking, pinned)
    assert facts.shape == LLAMA_8B
    assert facts.base_bytes == pinned.bytes
    assert {seen.path for seen in hub.asked_for("config.json")} == {f"/org/model/resolve/{commit}/config.json"}
    assert not hub.asked_for("model.safetensors")


@pytest.mark.parametrize("config", [b"{", b"[]", b"{}", b'{"model_type": "mixtral"}'])
def test_a_config_that_tells_nothing_leaves_the_shape_unknown(hub: HubServer, config: bytes) -> None:
    hub.add("org/model", {"config.json": config, "model.safetensors": b"1"})
    asking = Hub(hub.endpoint, pauses=())
    assert isinstance(facts_from(asking, asking.pin(BaseModelRef(id="org/model"))).shape, str)


def test_a_hub_that_is_out_of_reach_leaves_the_quote_unknown_and_says_so() -> None:
    pinned = Pinned(BaseModelRef(id="org/model", revision="0123456789" * 4))
    facts = facts_from(Hub("http://127.0.0.1:9", pauses=()), pinned)
    assert "out of reach" in str(facts.shape)
    assert facts.base_bytes is None
    assert "out of reach" in quote(facts=facts).unknown


def test_a_folder_of_this_machine_tells_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B_CONFIG))
    facts = facts_from(Hub(pauses=()), Pinned(BaseModelRef(id=str(tmp_path)), bytes=5))
    assert facts.shape == LLAMA_8B
    missing = facts_from(Hub(pauses=()), Pinned(BaseModelRef(id=str(tmp_path / "gone"))))
    assert "has no config.json" in str(missing.shape)


def test_a_folder_in_a_bucket_tells_its_shape(s3_uri: str) -> None:
    store = open_store(f"{s3_uri}/model")
    pinned = Pinned(BaseModelRef(id=f"{s3_uri}/model"), bytes=5)
    assert "has no config.json" in str(facts_from(Hub(pauses=()), pinned).shape)
    store.put_new(Key("config.json"), json.dumps(LLAMA_8B_CONFIG).encode())
    assert facts_from(Hub(pauses=()), pinned).shape == LLAMA_8B


def test_the_hubs_tokenizer_is_fetched_once_and_one_that_is_here_is_not_fetched(hub: HubServer, tmp_path: Path) -> None:
    files = small_model() | {"generation_config.json": b"{}"}
    commit = hub.add("org/model", files)
    asking = Hub(hub.endpoint, pauses=())
    pinned = asking.pin(BaseModelRef(id="org/model"))
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for _ in range(2):
        found = model_from(asking, pinned, tmp_path / "kept")
        assert found.tokenizer is not None
        assert {path.name: path.read_bytes() for path in Path(found.tokenizer).iterdir()} == {
            name: files[name] for name in wanted
        }
        assert "<|im_end|>" in found.control_tokens
    assert len(hub.asked_for("tokenizer.json")) == 1
    assert not hub.asked_for("model.safetensors")
    # Half of it in Hugging Face's own cache is not enough: stop tokens stand in the other half.
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    variables = {"HF_HOME": str(tmp_path)}
    (snapshot / "tokenizer.json").write_bytes(files["tokenizer.json"])
    look_at(pinned, hub=asking, variables=variables, folder=tmp_path / "again")
    assert len(hub.asked_for("tokenizer.json")) == 2
    for name in wanted:
        (snapshot / name).write_bytes(files[name])
    cached = look_at(pinned, hub=asking, variables=variables, folder=tmp_path / "never")
    assert cached.tokenizer == str(snapshot)
    assert len(hub.asked_for("tokenizer.json")) == 2
    assert not (tmp_path / "never").exists()


def test_a_hub_that_goes_away_in_between_leaves_no_half_a_tokenizer(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/model", small_model())
    pinned = Hub(hub.endpoint, pauses=()).pin(BaseModelRef(id="org/model"))
    found = model_from(Hub("http://127.0.0.1:9", pauses=()), pinned, tmp_path / "kept")
    assert found.tokenizer is None
    assert "out of reach" in found.why
    found = model_from(Hub(hub.endpoint, pauses=()), pinned, tmp_path / "kept")
    assert found.tokenizer is not None
    assert Path(found.tokenizer, "tokenizer.json").read_bytes() == small_model()["tokenizer.json"]


def test_the_quickstart_is_counted_to_the_step() -> None:
    """45 steps and 14,905 tokens an epoch are what the job's own journal says of it."""
    root = Path(__file__).parents[2] / "examples"
    recipe: dict[str, Any] = json.loads((root / "quickstart.json").read_text())
    digest = DatasetDigest(uri="x", sha256="0" * 64, size=(root / "quickstart.jsonl").stat().st_size, rows=240)
    sample = take_sample(root / "quickstart.jsonl", digest)
    lengths = measure(sample, base_model="builtin:tiny", why="")
    facts = model_from(Hub(), Pinned(BaseModelRef(id="builtin:tiny"))).quoted(lengths, None)
    found = make_quote(Recipe.model_validate(recipe), facts, [None])
    assert found.work is not None
    assert (found.work.steps, found.work.tokens_per_epoch) == (45, 14_905)
    assert found.chosen.usd is None
    assert found.chosen.seconds is not None
    assert 8 < found.chosen.seconds.p50 < 16
