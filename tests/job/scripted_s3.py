"""An HTTP server that gives prepared answers: for what a healthy S3 server will not say on demand."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Self


@dataclass(frozen=True)
class Answer:
    """A status and a body; None for a connection closed without a word."""

    status: int | None
    body: bytes = b""

    @classmethod
    def error(cls, status: int, code: str) -> Self:
        return cls(status, f"<Error><Code>{code}</Code><Message>as scripted</Message></Error>".encode())


LOST: Final = Answer(None)
OK: Final = Answer(200)


class ScriptedS3:
    """Answers the requests in order; the last answer is repeated. `requests` and `headers` tell what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        left = list(answers)
        headers = self.headers
        requests = self.requests
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    requests.append((self.command, self.path))
                    headers.append(dict(self.headers.items()))
                    answer = left.pop(0) if len(left) > 1 else left[0]
                if answer.status is None:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
