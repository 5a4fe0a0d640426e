"""A metadata service of AWS, GCP and Azure at once: a real HTTP server that insists on what the documentation does."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

HOST: Final = "127.0.0.1"
VM: Final = "FrontEnd_IN_0"


@dataclass
class Answer:
    """What is sent, whatever is asked."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class MetadataServer:
    """Quiet until told otherwise. Use it with `with`.

    Args:
        port: any free one unless told.
    """

    def __init__(self, port: int = 0) -> None:
        self.asked: list[str] = []
        """Method and path of each request, without its query."""
        self.tokens: set[str] = set()
        self.instance_action: dict[str, str] | None = None
        self.rebalance: dict[str, str] | None = None
        self.scheduled_events: list[dict[str, Any]] = []
        self.maintenance_event = "NONE"
        self.instead: Answer | None = None
        """Sent in place of every answer."""
        self.frozen = False
        """Connections are taken, and nothing is answered."""
        self.closing = False
        self.changed = threading.Condition()
        self._preempted = "FALSE"
        self._server = _Server((HOST, port), _Handler)
        self._server.service = self
        self.port: Final = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    @property
    def host(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def preempted(self) -> str:
        return self._preempted

    def preempt(self) -> None:
        """GCP's word; whoever waits for the change is answered."""
        with self.changed:
            self._preempted = "TRUE"
            self.changed.notify_all()

    def schedule(self, kind: str, *machines: str, status: str = "Scheduled", not_before: str = "") -> None:
        """Azure's word, as its documentation shows it."""
        event = {
            "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": list(machines),
            "EventStatus": status,
            "NotBefore": not_before,
        }
        self.scheduled_events = [*self.scheduled_events, event]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    service: MetadataServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    wbufsize = 65536  # an answer in two pieces would wait 40 ms for its second one

    def do_PUT(self) -> None:
        if self._usual("PUT"):
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token" or not seconds.isdigit() or not 1 <= int(seconds) <= 21600:
                self._send(400)
            else:
                service = self.server.service
                token = f"token-{len(service.asked)}=="
                service.tokens.add(token)
                self._send(200, token)

    def do_GET(self) -> None:
        if self._usual("GET"):
            where = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(where.query).items()}
            if where.path.startswith("/latest/"):
                self._aws(where.path)
            elif where.path.startswith("/computeMetadata/"):
                self._gcp(where.path, query)
            else:
                self._azure(where.path, query)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _usual(self, method: str) -> bool:
        """Whether the usual answer is to be sent."""
        service = self.server.service
        service.asked.append(f"{method} {urlsplit(self.path).path}")
        if service.frozen:
            with service.changed:
                service.changed.wait_for(lambda: service.closing, timeout=120)
            return False
        if service.instead is not None:
            self._send(service.instead.status, service.instead.body, service.instead.headers)
            return False
        return True

    def _aws(self, path: str) -> None:
        service = self.server.service
        documents = {
            "/latest/meta-data/spot/instance-action": service.instance_action,
            "/latest/meta-data/events/recommendations/rebalance": service.rebalance,
        }
        if self.headers.get("X-aws-ec2-metadata-token") not in service.tokens:
            self._send(401)
        elif (document := documents.get(path)) is None:
            self._send(404)
        else:
            self._send(200, json.dumps(document))

    def _gcp(self, path: str, query: dict[str, str]) -> None:
        service = self.server.service
        name = path.removeprefix("/computeMetadata/v1/instance/")
        if self.headers.get("Metadata-Flavor") != "Google":
            self._send(403)
        elif name == "maintenance-event":
            self._send(200, service.maintenance_event)
        elif name == "preempted":
            with service.changed:
                if query.get("wait_for_change") == "true" and query.get("last_etag") == self._etag:
                    seconds = float(query.get("timeout_sec", 3600))
                    seen = service.preempted
                    service.changed.wait_for(lambda: service.closing or service.preempted != seen, timeout=seconds)
                said, etag = service.preempted, self._etag
            self._send(200, said, {"ETag": etag, "Metadata-Flavor": "Google"})
        else:
            self._send(404)

    @property
    def _etag(self) -> str:
        return {"FALSE": "411261ca6c9e4181", "TRUE": "5a01bd7a5d3a0c12"}[self.server.service.preempted]

    def _azure(self, path: str, query: dict[str, str]) -> None:
        service = self.server.service
        if self.headers.get("Metadata") != "true" or "api-version" not in query:
            self._send(400)
        elif path == "/metadata/instance/compute/name" and query.get("format") == "text":
            self._send(200, VM)
        elif path == "/metadata/scheduledevents":
            self._send(200, json.dumps({"DocumentIncarnation": 1, "Events": service.scheduled_events}))
        else:
            self._send(404)

    def _send(self, status: int, body: str | bytes = "", headers: Mapping[str, str] | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
