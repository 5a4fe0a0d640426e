"""A hub on this machine: the part of huggingface.co's HTTP that huggingface_hub and launch/hub.py use.

Sources: https://huggingface.co/docs/hub/api, and what huggingface_hub 1.16 reads of answers (`hf_raise_for_status`,
`get_hf_file_metadata`, `http_get`). Weights are redirected to a second host name, as the real one does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tests.s3server import HOST, Proxy

STORAGE_HOST: Final = "localhost"
"""The same server under another name."""

_API: Final = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)/revision/(?P<revision>[^/]+)")
_FILE: Final = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_STORED: Final = re.compile(r"/stored/(?P<sha256>[0-9a-f]{64})")
_RANGE: Final = re.compile(r"bytes=(\d+)-")
_PIECE: Final = 256 * 1024


@dataclass
class Repository:
    """A model on the hub."""

    gated: bool
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)
    """Tokens of the accounts that were let in."""

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Seen:
    """A request, and how it was answered."""

    method: str
    host: str
    path: str
    start: int
    status: int
    token: str | None


class HubServer:
    """A hub. Close it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.sent: dict[str, int] = {}
        """Bytes of bodies sent, by the path asked for."""
        self.failing: int | None = None
        """A status that every request is answered with."""
        self.redirects: dict[str, str] = {}
        """Where else a path is, as for models that were renamed."""
        self.pages: dict[str, bytes] = {}
        """Answers that are no hub's, by path."""
        self.spoils: set[str] = set()
        """Sha256 of stored files that are sent with one byte changed."""
        self._hold_at: int | None = None
        self.held = threading.Event()
        self._released = threading.Event()
        self._server = _Server((HOST, 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.proxy = Proxy((HOST, int(self._server.server_address[1])))

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT should be."""
        return f"http://{HOST}:{self.proxy.port}"

    def add(
        self,
        name: str,
        files: dict[str, bytes] | Path,
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """A commit on a branch of a model, which may be new; its hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repository = self.repositories.setdefault(name, Repository(gated, private))
        told = json.dumps([len(repository.commits), {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}])
        commit = hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        self.stored |= {hashlib.sha256(data).hexdigest(): data for n, data in files.items() if is_large(n)}
        return commit

    def account(self, token: str, *may_read: str) -> str:
        """An account with a token, let into these gated or private models."""
        self.tokens.add(token)
        for name in may_read:
            self.repositories[name].readers.add(token)
        return token

    def hold_at(self, size: int) -> None:
        """Stop sending in the middle of a body, this far into the file, until `release`. `held` is set then."""
        self.held.clear()
        self._released.clear()
        self._hold_at = size

    def release(self) -> None:
        self._hold_at = None
        self._released.set()

    def page(self, path: str) -> bytes:
        """What it answers to whoever asks for a model's page of the API."""
        with urllib.request.urlopen(self.endpoint + path) as answer:  # noqa: S310
            body: bytes = answer.read()
        return body

    def asked_for(self, ending: str, method: str = "GET") -> list[Seen]:
        """The requests whose path ends so."""
        return [seen for seen in self.seen if seen.method == method and seen.path.endswith(ending)]

    def sent_of(self, data: bytes) -> int:
        """Bytes that were sent of a stored file."""
        return self.sent.get(f"/stored/{hashlib.sha256(data).hexdigest()}", 0)

    def wait(self, position: int) -> None:
        """Called by the handler while it sends."""
        if self._hold_at is not None and position >= self._hold_at:
            self.held.set()
            self._released.wait(timeout=60)

    def close(self) -> None:
        self.release()
        self.proxy.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


def is_large(name: str) -> bool:
    """Whether the hub keeps such a file beside git (LFS)."""
    return name.endswith((".safetensors", ".bin"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break here, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Kept in `HubServer.seen`."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    @property
    def _token(self) -> str | None:
        said = self.headers.get("Authorization", "")
        return said.removeprefix("Bearer ") or None

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        if hub.failing is not None:
            self._refuse(hub.failing, "", "the hub is ill")
        elif path in hub.pages:
            self._send(hub.pages[path])
        elif path in hub.redirects:
            self._send(b"", 307, {"Location": hub.redirects[path]})
        elif match := _STORED.fullmatch(path):
            self._send_file(hub.stored[match["sha256"]], match["sha256"], {})
        elif match := _API.fullmatch(path):
            found = self._find(hub, match)
            if found is not None:
                self._send(json.dumps(_information(*found)).encode())
        elif match := _FILE.fullmatch(path):
            found = self._find(hub, match)
            if found is not None:
                self._resolve(*found, unquote(match["file"]))
        else:
            self._refuse(404, "", "no such page")

    def _find(self, hub: HubServer, match: re.Match[str]) -> tuple[str, Repository, str] | None:
        """Name, repository and commit; None when it was refused, and answered so."""
        name, revision, token = unquote(match["id"]), unquote(match["revision"]), self._token
        repository = hub.repositories.get(name)
        if token is not None and token not in hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token not in repository.readers):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif (commit := repository.commit_of(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return name, repository, commit
        return None

    def _resolve(self, name: str, repository: Repository, commit: str, file: str) -> None:
        if repository.gated and self._token not in repository.readers:
            self._refuse(403 if self._token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit}
        if not is_large(file):
            self._send_file(data, _git_id(data), headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        port = self.server.hub.proxy.port
        headers |= {
            "Location": f"http://{STORAGE_HOST}:{port}/stored/{digest}",
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{digest}"',
        }
        self._send(b"", 302, headers)

    def _send_file(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        if etag in self.server.hub.spoils:
            data = bytes([data[0] ^ 1]) + data[1:]
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if start and start >= len(data):
            self._send(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
            return
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(data[start:], 206 if wanted else 200, headers, start=start)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(json.dumps({"error": message}).encode(), status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, *, start: int = 0) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        host = self.headers.get("Host", "").partition(":")[0]
        hub.seen.append(Seen(self.command, host, path, start, status, self._token))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for at in range(0, len(body), _PIECE):
            piece = body[at : at + _PIECE]
            self.wfile.write(piece)
            hub.sent[path] = hub.sent.get(path, 0) + len(piece)
            hub.wait(start + at + len(piece))


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _information(name: str, repository: Repository, commit: str) -> dict[str, Any]:
    """As /api/models/.../revision/...?blobs=true answers; gated models tell everybody."""

    def sibling(file: str, data: bytes) -> dict[str, Any]:
        said = {"rfilename": file, "size": len(data), "blobId": _git_id(data)}
        if is_large(file):
            said["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return said

    files = repository.commits[commit]
    return {
        "_id": "0",
        "id": name,
        "modelId": name,
        "sha": commit,
        "gated": "manual" if repository.gated else False,
        "private": repository.private,
        "siblings": [sibling(file, data) for file, data in files.items()],
    }
