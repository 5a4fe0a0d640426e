"""What launcher and job agree on about a base model: which of its files are read, and what the hub's refusals mean."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Final

from job.contract.errors import ModelInvalid

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The files of a model's folder that decide which tokens a text becomes."""

HUB: Final = "https://huggingface.co"
"""Where hub ids are looked up, unless HF_ENDPOINT says otherwise."""

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
"""Names the shards. transformers (5.17) looks for these two, unless config.json names another."""
_CONFIG: Final = ("config.json", "generation_config.json", INDEX)
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_TRANSIENT: Final = frozenset({408, 425, 429})


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which names the same files forever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_weights(name: str) -> bool:
    """Whether a file that `model_files` names holds weights; the others are small, and say how to read text."""
    return name.endswith(".safetensors")


def model_files(names: Iterable[str], *, where: str) -> list[str]:
    """The files that are read of a base model's folder, sorted.

    Weights are what transformers loads, model.safetensors or its shards; other names count only where none is named
    so. Repositories often hold the same weights twice (consolidated.safetensors, original/...), and those would double
    the download.

    Args:
        names: of all files in it; those in folders below are ignored.
        where: what errors call it.

    Raises:
        ModelInvalid: it is no model's folder, or its weights are pickles only: those can run code, and are never
            loaded.
    """
    here = {name for name in names if "/" not in name}
    if "config.json" not in here:
        raise ModelInvalid(
            f"base model {where} has no config.json",
            hint="name a folder that save_pretrained(..., safe_serialization=True) wrote",
        )
    safe = {name for name in here if name.endswith(".safetensors")}
    weights = {name for name in safe if name.startswith("model")} or safe
    if weights:
        return sorted(weights | (here & {*_CONFIG, *TOKENIZER_FILES}))
    if any(fnmatchcase(name, pattern) for name in here for pattern in _PICKLES):
        raise ModelInvalid(
            f"base model {where} holds its weights as pickles only: loading them could run anything",
            hint="load it once where you trust it, and save it with save_pretrained(safe_serialization=True)",
        )
    raise ModelInvalid(
        f"base model {where} has no *.safetensors",
        hint="its folder is what save_pretrained(..., safe_serialization=True) writes, weights included",
    )


def refuse_weights(names: Collection[str], index: bytes | None, *, model: str) -> ModelInvalid | None:
    """Why transformers would not find a base model's weights, or not all of them; None where it would.

    Args:
        names: of the files that there are.
        index: the bytes of INDEX; None where there is none.
        model: what errors call it.
    """
    if WHOLE in names:
        return None
    hint = "fetch its files again, or save it once with save_pretrained(..., safe_serialization=True)"
    if index is None:
        weights = min(filter(is_weights, names), default="weights of other names")
        return ModelInvalid(f"base model {model} has {weights}, but neither {WHOLE} nor {INDEX}", hint=hint)
    try:
        shards = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ModelInvalid(f"the {INDEX} of base model {model} names no files", hint=hint)
    missing = sorted(map(str, shards.difference(names)))
    if not missing:
        return None
    return ModelInvalid(
        f"base model {model} lacks {len(missing)} of the {len(shards)} files that its {INDEX} names: {missing[0]}",
        hint=hint,
    )


def hub_refusal(
    model: str, revision: str | None, *, endpoint: str, status: int, code: str, message: str, token: bool
) -> ModelInvalid | None:
    """What an error of the hub means to whoever named the model; None where asking again may help.

    Args:
        model: its id.
        endpoint: of the hub.
        status: of the answer; `code` and `message`: its headers X-Error-Code and X-Error-Message, empty when absent.
        token: whether one was sent.

    Source: `hf_raise_for_status` of huggingface_hub 1.16, and the answers of huggingface.co.
    """
    page, tokens = f"{endpoint}/{model}", f"{endpoint}/settings/tokens"
    if status >= 500 or status in _TRANSIENT:
        return None
    if status == 401 and token:  # a good token that is not enough is answered with 403 or 404
        return ModelInvalid(
            f"the hub does not accept the token that base model {model} was asked for with",
            hint=f"make a new one on {tokens}, and set HF_TOKEN or run `hf auth login`",
        )
    match code:
        case "GatedRepo" if token:
            return ModelInvalid(
                f"base model {model} is gated, and the account of this token has not been let in",
                hint=f"accept its terms on {page}; a fine-grained token needs the right to read gated repositories",
            )
        case "GatedRepo":
            return ModelInvalid(
                f"base model {model} is gated, and there is no token",
                hint=f"accept its terms on {page}, then set HF_TOKEN (made on {tokens}) or run `hf auth login`",
            )
        case "RevisionNotFound":
            return ModelInvalid(f"base model {model} has no revision {revision!r}", hint=f"see {page}/commits/main")
        case "EntryNotFound":
            return ModelInvalid(
                f"base model {model} lacks a file at revision {revision!r}", hint=f"see {page}/tree/{revision}"
            )
    if code == "RepoNotFound" or status in (401, 404):
        why = "this token may not read it" if token else "there is no token"
        return ModelInvalid(
            f"base model {model} does not exist on the hub, or is private and {why}",
            hint=f"look at {page}" + ("" if token else f"; for a private one set HF_TOKEN (made on {tokens})"),
        )
    return ModelInvalid(f"the hub refuses base model {model}: {message or f'status {status}'}", hint=f"look at {page}")
