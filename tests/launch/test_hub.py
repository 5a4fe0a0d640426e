"""What the hub says of a base model, told apart, before anything is created."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from job.contract.errors import ModelInvalid, Unreachable
from job.contract.recipe import BaseModelRef
from launch.hub import Hub
from tests.hubserver import HubServer, is_large

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"1" * 100,
    "model-00002-of-00002.safetensors": b"2" * 50,
    "model.safetensors.index.json": b"{}",
}
NOT_READ = {
    "README.md": b"hello",
    "consolidated.safetensors": b"12" * 75,
    "original/model.safetensors": b"12" * 75,
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
}
NOBODY = Hub("http://127.0.0.1:9", pauses=())


def asking(server: HubServer, token: str | None = None) -> Hub:
    return Hub(server.endpoint, token, pauses=())


def ref(name: str = "org/model", revision: str | None = None) -> BaseModelRef:
    return BaseModelRef(id=name, revision=revision)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1", "a branch/with?everything#in it"])
def test_a_revision_becomes_the_commit_it_names_now(hub: HubServer, revision: str | None) -> None:
    commit = hub.add("org/model", FILES | NOT_READ, branch=revision or "main")
    hub.add("org/model", FILES, branch="another")
    pinned = asking(hub).pin(ref(revision=revision))
    assert pinned.ref == ref(revision=commit)
    assert pinned.files == tuple(sorted(FILES))
    assert pinned.bytes == sum(map(len, FILES.values()))
    assert pinned.caveat == ""


def test_a_pinned_reference_pins_to_itself_whatever_its_branch_does(hub: HubServer) -> None:
    hub.add("org/model", FILES)
    first = asking(hub).pin(ref())
    hub.add("org/model", FILES | {"config.json": b"[]"})
    assert asking(hub).pin(first.ref) == first
    assert asking(hub).pin(ref()).ref != first.ref


def test_weights_under_other_names_are_taken_where_none_have_the_usual_one(hub: HubServer) -> None:
    hub.add("old-model", {"config.json": b"{}", "weights.safetensors": b"1"})
    assert asking(hub).pin(ref("old-model")).files == ("config.json", "weights.safetensors")


def gated(hub: HubServer) -> None:
    hub.add("org/model", FILES, gated=True)


def private(hub: HubServer) -> None:
    hub.add("org/model", FILES, private=True)


def public(hub: HubServer) -> None:
    hub.add("org/model", FILES)


def nothing(hub: HubServer) -> None:
    """No model at all."""


def pickles(hub: HubServer) -> None:
    hub.add("org/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})


def no_weights(hub: HubServer) -> None:
    hub.add("org/model", {"config.json": b"{}", "onnx/model.safetensors": b"1"})


def no_config(hub: HubServer) -> None:
    hub.add("org/model", {"model.safetensors": b"1"})


PAGE = "{hub}/org/model"
TOKENS = "{hub}/settings/tokens"
REFUSALS: dict[str, tuple[Any, str | None, str | None, str, tuple[str, ...]]] = {
    # the world, the token, the revision -> what is said, and what the hint holds
    "missing, no token": (
        nothing,
        None,
        None,
        "does not exist on the hub, or is private and there is no token",
        (PAGE,),
    ),
    "missing": (nothing, "hf_good", None, "does not exist on the hub, or is private and this token may not", (PAGE,)),
    "private, no token": (private, None, None, "or is private and there is no token", (PAGE, TOKENS, "HF_TOKEN")),
    "private, another's token": (private, "hf_good", None, "or is private and this token may not read it", (PAGE,)),
    "gated, no token": (gated, None, None, "is gated, and there is no token", (PAGE, "HF_TOKEN", "hf auth login")),
    "gated, not let in": (gated, "hf_good", None, "is gated, and the account of this token has not", (PAGE, "terms")),
    "a token of nobody": (gated, "hf_bad", None, "does not accept the token", (TOKENS, "HF_TOKEN")),
    "no such revision": (public, None, "v9", "has no revision 'v9'", (f"{PAGE}/commits/main",)),
    "no such commit": (public, None, "0" * 40, f"has no revision '{'0' * 40}'", (f"{PAGE}/commits/main",)),
    "pickles": (pickles, None, None, "as pickles only", ("safe_serialization",)),
    "no weights": (no_weights, None, None, r"no \*.safetensors", ("safe_serialization",)),
    "no config": (no_config, None, None, "no config.json", ("save_pretrained",)),
}


@pytest.mark.parametrize(("world", "token", "revision", "said", "hints"), REFUSALS.values(), ids=REFUSALS)
def test_every_refusal_says_which_it_is_and_where_to_go(
    hub: HubServer, world: Any, token: str | None, revision: str | None, said: str, hints: tuple[str, ...]
) -> None:
    world(hub)
    hub.account("hf_good")
    with pytest.raises(ModelInvalid, match=said) as caught:
        asking(hub, token).pin(ref(revision=revision))
    assert "org/model" in caught.value.message
    for hint in hints:
        assert hint.format(hub=hub.endpoint) in caught.value.hint
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize("world", [gated, private])
def test_whoever_was_let_in_gets_the_commit(hub: HubServer, world: Any) -> None:
    world(hub)
    token = hub.account("hf_member", "org/model")
    assert asking(hub, token).pin(ref()).bytes == sum(map(len, FILES.values()))


def test_a_hub_that_is_out_of_reach_or_ill_is_no_fault_of_the_model(hub: HubServer) -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9 is out of reach: .*refused") as caught:
        NOBODY.pin(ref())
    assert "HF_ENDPOINT" in caught.value.hint
    hub.add("org/model", FILES)
    for status in (429, 500, 503):
        hub.failing = status
        with pytest.raises(Unreachable, match=f"status {status}"):
            asking(hub).pin(ref())


def test_a_question_is_asked_again(hub: HubServer) -> None:
    hub.add("org/model", FILES)
    hub.proxy.break_after(10)
    with pytest.raises(Unreachable):
        asking(hub).pin(ref())
    hub.proxy.break_after(10)
    assert dataclasses.replace(asking(hub), pauses=(0.01,)).pin(ref()).files
    assert hub.proxy.breaks == 2


def test_a_whole_commit_is_taken_without_a_hub_and_it_is_said_that_nobody_checked() -> None:
    given = ref(revision="0123456789" * 4)
    pinned = NOBODY.pin(given)
    assert pinned.ref == given
    assert "nobody checked" in pinned.caveat
    assert "127.0.0.1:9" in pinned.caveat
    with pytest.raises(Unreachable):
        NOBODY.pin(ref(revision="0123456789abcdef"))


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"sha": "main", "siblings": []}', b'{"sha": 1}'])
def test_what_answers_and_is_no_hub_is_named(hub: HubServer, answer: bytes) -> None:
    hub.pages["/api/models/org/model/revision/main"] = answer
    with pytest.raises(Unreachable, match="not as a hub does"):
        asking(hub).pin(ref())


@pytest.mark.parametrize("endpoint", ["nonsense", "file:///etc", "http://[", "ftp://127.0.0.1/"])
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(ModelInvalid, match="is not an address of a hub") as caught:
        Hub(endpoint, pauses=()).pin(ref())
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["a/b/c", "org/", "/x", "org/mo del", "org/..", "../x/y", "org/model?x", "gs:x", "ö/m"]
)
def test_what_is_no_hub_id_is_refused_without_asking(hub: HubServer, name: str) -> None:
    with pytest.raises(ModelInvalid, match="neither a hub id nor a folder"):
        asking(hub).pin(ref(name))
    assert hub.seen == []


def test_a_renamed_model_is_found_and_the_token_is_shown_to_nobody_but_the_hub(hub: HubServer) -> None:
    hub.add("org/new", FILES)
    hub.add("org/model", FILES)
    token = hub.account("hf_member")
    there = "/api/models/org/new/revision/main?blobs=true"
    hub.redirects["/api/models/org/model/revision/main"] = there
    asking(hub, token).pin(ref())
    hub.redirects["/api/models/org/model/revision/main"] = f"http://localhost:{hub.proxy.port}{there}"
    asking(hub, token).pin(ref())
    shown = [(seen.host, seen.token) for seen in hub.asked_for("org/new/revision/main")]
    assert shown == [("127.0.0.1", token), ("localhost", None)]


def test_no_weights_are_downloaded_to_pin_them(hub: HubServer) -> None:
    hub.add("org/model", FILES)
    asking(hub).pin(ref())
    assert [seen for seen in hub.seen if is_large(seen.path)] == []


# ------------------------------------------------------------------------------------------------------ who asks


def test_the_token_is_the_one_that_hugging_faces_tools_would_use(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    home = {"HF_HOME": str(tmp_path)}
    assert Hub.of(home).token == "hf_file"
    assert Hub.of(home | {"HF_TOKEN": "hf_said"}).token == "hf_said"
    assert Hub.of({"HF_HOME": str(tmp_path / "none")}).token is None
    assert Hub.of({"XDG_CACHE_HOME": str(tmp_path / "none")}).token is None
    assert Hub.of({"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HOME": "/none"}).token == "hf_file"


def test_the_endpoint_is_hugging_faces_unless_told() -> None:
    assert Hub.of({"HF_HOME": "/none"}).endpoint == "https://huggingface.co"
    assert Hub.of({"HF_HOME": "/none", "HF_ENDPOINT": "http://mirror/"}).endpoint == "http://mirror"


def test_a_hub_can_be_printed_without_its_token() -> None:
    assert "hf_" not in repr(Hub(token="hf_secret"))
