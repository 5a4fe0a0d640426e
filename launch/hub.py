"""The hub, asked from the person's side: which commit a revision is now, what its files weigh, and whether this person
may have them. Plain HTTP: the launcher has no huggingface_hub.

Endpoints and headers: https://huggingface.co/docs/hub/api, and huggingface_hub 1.16 (`HfApi.model_info`).
"""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote, urljoin, urlsplit

from job.contract.base_model import HUB, hub_refusal, is_commit, model_files
from job.contract.errors import ModelInvalid, Unreachable
from job.contract.recipe import BaseModelRef

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SILENCE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Pinned:
    """A base model that means the same files for ever, as far as its place can promise that.

    Args:
        ref: absolute; on the hub with a commit as its revision.
        files: the names of the files that the job reads; empty when they are not known.
        bytes: of all of them.
        caveat: what could not be checked, for the person to read; empty when everything was.
    """

    ref: BaseModelRef
    files: tuple[str, ...] = ()
    bytes: int = 0
    caveat: str = ""


@dataclass(frozen=True)
class Hub:
    """A hub, and who asks it. `pauses`: seconds between the tries of one question."""

    endpoint: str = HUB
    token: str | None = field(default=None, repr=False)
    pauses: tuple[float, ...] = (0.5, 1.0)

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Hub:
        """The one that these variables lead to, with the token that Hugging Face's own tools would use."""
        endpoint = variables.get("HF_ENDPOINT", "").strip().rstrip("/") or HUB
        return cls(endpoint, _token(variables))

    def pin(self, ref: BaseModelRef) -> Pinned:
        """The commit that a reference means now; proves that its files may be had.

        Raises:
            ModelInvalid: it does not exist, is gated or private to this person, or has no safetensors.
            Unreachable: the hub cannot be asked, and the reference does not name a commit.
        """
        if not _HUB_ID.fullmatch(ref.id):
            raise ModelInvalid(
                f"base model {ref.id!r} is neither a hub id nor a folder",
                hint='a hub id is "owner/name"; a folder begins with "./", "/", "s3://" or "file:///"',
            )
        if not _is_address(self.endpoint):
            raise ModelInvalid(f"{self.endpoint} is not an address of a hub", hint="check HF_ENDPOINT")
        revision = ref.revision or "main"
        asked = f"{self.endpoint}/api/models/{ref.id}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            info = self._info(asked, ref)
            commit = info["sha"]
            sizes = {file["rfilename"]: int(file.get("size") or 0) for file in info["siblings"]}
            files = model_files(sizes, where=f"{ref.id} at revision {revision}")
            # Everybody may read about a gated model; only a file shows who may have it.
            self._ask("HEAD", f"{self.endpoint}/{ref.id}/resolve/{commit}/config.json", ref)
        except Unreachable as error:
            if not is_commit(ref.revision):
                raise
            return Pinned(ref, caveat=f"nobody checked that {ref.id} can be downloaded: {error.message}")
        pinned = ref.model_copy(update={"revision": commit})
        return Pinned(pinned, files=tuple(files), bytes=sum(sizes[name] for name in files))

    def file(self, ref: BaseModelRef, name: str) -> bytes:
        """A small file of a pinned reference, whole.

        Raises:
            ModelInvalid: it is not there, or not for this person.
            Unreachable: the hub cannot be asked.
        """
        return self._ask(
            "GET", f"{self.endpoint}/{ref.id}/resolve/{quote(ref.revision or 'main', safe='')}/{name}", ref
        )

    def _info(self, url: str, ref: BaseModelRef) -> Any:
        try:
            info = json.loads(self._ask("GET", url, ref))
            if is_commit(info["sha"]) and all(isinstance(file["rfilename"], str) for file in info["siblings"]):
                return info
        except (ValueError, KeyError, TypeError):
            pass
        raise self._unreachable("it answers, but not as a hub does")

    def _ask(self, method: str, url: str, ref: BaseModelRef) -> bytes:
        """The body of an answer. Asks again where that may help."""
        why: object = ""
        for pause in (*self.pauses, None):
            try:
                headers = {"User-Agent": "ftjob"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
                request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310  http(s) only
                with _opener().open(request, timeout=_SILENCE_SECONDS) as answer:
                    body: bytes = answer.read()
                    return body
            except urllib.error.HTTPError as error:
                with error:
                    if error.code < 400:  # a HEAD is not followed: that it leads to a file is answer enough
                        return b""
                    refusal = self._refusal(error, ref)
                if refusal is not None:
                    raise refusal from error
                why = f"it answers with status {error.code}"
            except (OSError, http.client.HTTPException) as error:
                why = getattr(error, "reason", None) or error
            except ValueError as error:  # HF_ENDPOINT is not a url
                raise ModelInvalid(
                    f"the hub's address {self.endpoint} is not a url", hint="check HF_ENDPOINT"
                ) from error
            if pause is not None:
                time.sleep(pause)
        raise self._unreachable(why)

    def _refusal(self, error: urllib.error.HTTPError, ref: BaseModelRef) -> ModelInvalid | None:
        return hub_refusal(
            ref.id,
            ref.revision or "main",
            endpoint=self.endpoint,
            status=error.code,
            code=error.headers.get("X-Error-Code", ""),
            message=error.headers.get("X-Error-Message", ""),
            token=self.token is not None,
        )

    def _unreachable(self, why: object) -> Unreachable:
        return Unreachable(
            f"the hub at {self.endpoint} is out of reach: {why}",
            hint="check the network and HF_ENDPOINT; a revision of 40 hex digits needs no hub at launch",
        )


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows GETs (repositories get renamed), and shows the token to nobody but the hub."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.get_method() != "GET":
            return None
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(urljoin(req.full_url, newurl)).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def _opener() -> urllib.request.OpenerDirector:
    # Not build_opener: it would read file:// and ftp:// as well.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _token(variables: Mapping[str, str]) -> str | None:
    """HF_TOKEN, else the file that `hf auth login` writes."""
    said = variables.get("HF_TOKEN") or variables.get("HUGGING_FACE_HUB_TOKEN") or ""
    if said.strip():
        return said.strip()
    cache = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(variables.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None
