"""What the clouds' metadata services say about the end of this machine, brought into the one notice.

Each cloud tells the machines themselves, on an address inside the machine, before it takes a spot machine back; nobody
else forwards it to a job. A thread asks, and the training never waits for it: a service that is silent, or answers
nonsense, costs the courtesy and nothing else, since the checkpoints' interval is the promise.

The requests go through http.client, which knows no proxies and follows no redirects: what somebody else on the way says
about this machine is no notice.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final, Protocol
from urllib.parse import urlsplit

from job.logs import get_logger
from job.notice import Notice
from job.patience import pauses

LINK_LOCAL: Final = "http://169.254.169.254"
"""Where AWS and Azure answer."""
GCP_HOST: Final = "metadata.google.internal"
_CONNECT_SECONDS: Final = 2.0
_ANSWER_SECONDS: Final = 5.0
_LONGEST_ANSWER: Final = 65536
"""Bytes; the longest documented answer has some hundred."""
_NO_ETAG: Final = "0"
"""No answer has it, so that a question that waits for a change of it is answered at once."""


class Unanswered(Exception):
    """The service could not be asked, or its answer cannot be used. Says why."""


class Cloud(Protocol):
    """Asks one cloud's metadata service."""

    name: str
    """As SkyPilot spells it."""
    pause: float
    """Seconds between two questions."""
    grace: float
    """Seconds from the notice to the end, at least, less the pause; 0 where no more is promised than SIGTERM gives."""

    def ask(self) -> str:
        """What takes this machine away; empty while nothing does.

        Raises:
            Unanswered: nobody knows.
        """
        ...


class Aws:
    """EC2: `spot/instance-action`, 120 s ahead, asked every 5 s as AWS recommends.

    A rebalance recommendation is only logged: the machine may live on for hours, or for ever.

    Source: EC2 User Guide, "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and "Use the
    Instance Metadata Service" (version 2: a token, at most 21600 s old, with every question).

    Args:
        endpoint: of the service, as in AWS_EC2_METADATA_SERVICE_ENDPOINT.
    """

    name = "AWS"
    grace = 110.0
    _TOKEN_SECONDS: Final = 21600

    def __init__(self, endpoint: str = LINK_LOCAL, *, pause: float = 5.0, clock: Callable[[], float] = time.monotonic):
        self.pause = pause
        self._endpoint = endpoint
        self._clock = clock
        self._token = ""
        self._renew_at = 0.0
        self._recommended = ""

    def ask(self) -> str:
        text = self._get("spot/instance-action")
        if text:
            action = _object(text)
            if action.get("action") in {"terminate", "stop", "hibernate"}:
                return f"AWS spot interruption ({action['action']} at {_time(action.get('time'))})"
            raise Unanswered("spot/instance-action names no action")
        self._note_recommendation()
        return ""

    def _note_recommendation(self) -> None:
        text = self._get("events/recommendations/rebalance")
        since = _time(_object(text).get("noticeTime")) if text else ""
        if since and since != self._recommended:
            self._recommended = since
            get_logger().info("notice.ahead", cloud=self.name, what="rebalance recommendation", since=since)

    def _get(self, path: str) -> str:
        """The text; empty where there is none (404)."""
        if self._clock() >= self._renew_at:
            self._renew_token()
        answer = self._get_once(path)
        if answer.status == 401:  # the machine was stopped and started: its old tokens are void
            self._renew_token()
            answer = self._get_once(path)
        return "" if answer.status == 404 else answer.ok()

    def _get_once(self, path: str) -> _Answer:
        headers = {"X-aws-ec2-metadata-token": self._token}
        return _request(self._endpoint, f"/latest/meta-data/{path}", headers)

    def _renew_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._TOKEN_SECONDS)}
        self._token = _request(self._endpoint, "/latest/api/token", headers, method="PUT").ok()
        if not self._token.isascii() or not self._token.isprintable():
            raise Unanswered("the token is no header")
        self._renew_at = self._clock() + self._TOKEN_SECONDS / 2


class Gcp:
    """Compute Engine: `instance/preempted`, about 30 s ahead; the question waits there for the change.

    A `maintenance-event` of TERMINATE_ON_HOST_MAINTENANCE is only logged: machines with GPUs get it an hour ahead, and
    a job that stopped for it would be started again on the same machine, to stop again.

    Source: Compute Engine documentation, "Spot VMs" (preemption process), "View and query VM metadata"
    (wait_for_change, last_etag, timeout_sec) and "Handle GPU host maintenance events".

    Args:
        host: of the service, with its port unless 80, as in GCE_METADATA_HOST.
        wait_seconds: for how long one question waits.
    """

    name = "GCP"
    grace = 0.0
    _headers: Final = {"Metadata-Flavor": "Google"}

    def __init__(self, host: str = GCP_HOST, *, pause: float = 1.0, wait_seconds: int = 30) -> None:
        self.pause = pause  # a service that does not know how to wait must not be asked without end
        self._endpoint = "http://" + host
        self._wait_seconds = wait_seconds
        self._etag = _NO_ETAG
        self._maintenance = "NONE"

    def ask(self) -> str:
        query = f"?wait_for_change=true&timeout_sec={self._wait_seconds}&last_etag={self._etag}"
        path = "/computeMetadata/v1/instance/"
        seconds = self._wait_seconds + _ANSWER_SECONDS
        answer = _request(self._endpoint, path + "preempted" + query, self._headers, seconds=seconds)
        match answer.ok().strip():
            case "TRUE":
                return "GCP preemption (stops within 30 s)"
            case "FALSE":
                self._etag = answer.etag if answer.etag.isalnum() else _NO_ETAG
            case _:
                raise Unanswered("instance/preempted is neither TRUE nor FALSE")
        event = _request(self._endpoint, path + "maintenance-event", self._headers).ok().strip()
        if event != self._maintenance and event == "TERMINATE_ON_HOST_MAINTENANCE":
            get_logger().info("notice.ahead", cloud=self.name, what=event)
        self._maintenance = event
        return ""


class Azure:
    """Virtual Machines: a scheduled event Preempt (30 s ahead or more) or Terminate of this machine, asked each second.

    Events of other machines of the same group are delivered too, and are none of ours. Reboot, Redeploy and Freeze come
    minutes to days ahead, and leave the machine to its owner.

    Source: Azure documentation, "Scheduled Events for Linux VMs" (the first answer may take two minutes; once a second
    is the recommended frequency) and "Azure Instance Metadata Service".
    """

    name = "Azure"
    grace = 0.0
    _headers: Final = {"Metadata": "true"}

    def __init__(self, endpoint: str = LINK_LOCAL, *, pause: float = 1.0) -> None:
        self.pause = pause
        self._endpoint = endpoint
        self._vm = ""
        self._seconds = 130.0

    def ask(self) -> str:
        if not self._vm:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._vm = _request(self._endpoint, path, self._headers).ok().strip()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        answer = _request(self._endpoint, path, self._headers, seconds=self._seconds)
        events = _object(answer.ok()).get("Events")
        self._seconds = _ANSWER_SECONDS  # only the first answer takes its time
        if not isinstance(events, list):
            raise Unanswered("the scheduled events are no list")
        for event in events:
            if isinstance(event, dict) and event.get("EventType") in {"Preempt", "Terminate"} and self._is_ours(event):
                return f"Azure {event['EventType']} (not before {_time(event.get('NotBefore'))})"
        return ""

    def _is_ours(self, event: dict[str, object]) -> bool:
        machines = event.get("Resources")
        return isinstance(machines, list) and self._vm.casefold() in {str(machine).casefold() for machine in machines}


def cloud_named(name: str | None, variables: Mapping[str, str]) -> Cloud | None:
    """Whom to ask on this cloud; None where the machine is told nothing but SIGTERM.

    Args:
        name: as SkyPilot spells it, in any case.
        variables: the environment; the clouds' own variables for their endpoints are honoured.
    """
    match (name or "").lower():
        case "aws":
            return Aws(variables.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or LINK_LOCAL)
        case "gcp":
            return Gcp(variables.get("GCE_METADATA_HOST") or GCP_HOST)
        case "azure":
            return Azure()
    return None


def watch(cloud: Cloud, notice: Notice) -> threading.Thread:
    """Ask until there is a notice, from whomever, in a thread that nobody has to wait for."""
    thread = threading.Thread(target=_ask_on, args=(cloud, notice), name="metadata", daemon=True)
    thread.start()
    return thread


def _ask_on(cloud: Cloud, notice: Notice) -> None:
    told = False
    slower = pauses()
    while not notice.given:
        pause = cloud.pause
        try:
            if reason := cloud.ask():
                notice.give(reason, grace_seconds=cloud.grace)
                return
            slower = pauses()
        except Unanswered as error:
            pause = next(slower)
            if not told:  # once: a service that comes and goes must not fill the log
                told = True
                get_logger().warning("metadata.unanswered", cloud=cloud.name, why=str(error))
        notice.wait(pause)


@dataclass(frozen=True)
class _Answer:
    status: int
    etag: str
    text: str

    def ok(self) -> str:
        """The text. Raises Unanswered when the status is another than 200."""
        if self.status != 200:
            raise Unanswered(f"the service answered {self.status}")
        return self.text


def _request(
    endpoint: str, path: str, headers: Mapping[str, str], *, method: str = "GET", seconds: float = _ANSWER_SECONDS
) -> _Answer:
    """Ask once.

    Args:
        seconds: for how long the service may be silent once it is connected.

    Raises:
        Unanswered: there is nobody, or no HTTP.
    """
    try:
        where = urlsplit(endpoint)
        if where.scheme != "http" or not where.hostname:
            raise ValueError("not an http address")
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            connection.request(method, where.path.rstrip("/") + path, headers=dict(headers))
            response = connection.getresponse()
            text = response.read(_LONGEST_ANSWER).decode("utf-8")
            return _Answer(response.status, response.headers.get("ETag") or "", text)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an endpoint that is none, no UTF-8
        raise Unanswered(f"{endpoint}: {type(error).__name__}: {error}") from error


def _object(text: str) -> dict[str, object]:
    """The JSON object. Raises Unanswered."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unanswered("the answer is not JSON") from error
    if not isinstance(found, dict):
        raise Unanswered("the answer is no JSON object")
    return found


def _time(value: object) -> str:
    """The announced time if it is one: what a service says goes into records, and only what is understood of it."""
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return parse(str(value)).isoformat()
        except (ValueError, TypeError):
            continue
    return "an unknown time"
