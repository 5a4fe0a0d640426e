"""Promise: what a cloud says about the end of this machine is a notice, and nothing else that anybody says is one."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from job.logs import configure
from job.metadata import Aws, Azure, Cloud, Gcp, Unanswered, cloud_named, watch
from job.notice import Notice
from tests.metadataserver import VM, Answer, MetadataServer
from tests.watching import wait_for

ACTION = {"action": "terminate", "time": "2017-09-18T08:22:00Z"}  # AWS's own example
SUDDENLY = 0.02


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as made:
        yield made


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    text = io.StringIO()
    configure(text)
    yield lambda: [json.loads(line) for line in text.getvalue().splitlines()]
    configure(io.StringIO())


def aws(server: MetadataServer) -> Aws:
    return Aws(server.address, pause=SUDDENLY)


def gcp(server: MetadataServer) -> Gcp:
    return Gcp(server.host, pause=SUDDENLY, wait_seconds=1)


def azure(server: MetadataServer) -> Azure:
    return Azure(server.address, pause=SUDDENLY)


Asking = Callable[[MetadataServer], Cloud]
CLOUDS: list[Asking] = [aws, gcp, azure]


def interrupt(server: MetadataServer) -> None:
    """Every cloud says it in its own words."""
    server.instance_action = ACTION
    server.schedule("Preempt", VM, not_before="Mon, 19 Sep 2016 18:29:47 GMT")
    server.preempt()


REASONS: dict[Asking, str] = {
    aws: "AWS spot interruption (terminate at 2017-09-18T08:22:00+00:00)",
    gcp: "GCP preemption (stops within 30 s)",
    azure: "Azure Preempt (not before 2016-09-19T18:29:47+00:00)",
}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_an_interruption_becomes_the_notice_and_says_what_it_is(server: MetadataServer, cloud: Asking) -> None:
    notice = Notice()
    thread = watch(cloud(server), notice)
    wait_for(lambda: len(server.asked) >= 4)  # it went on asking, and nothing was said
    assert not notice.given
    interrupt(server)
    assert notice.wait(10)
    assert notice.reason == REASONS[cloud]
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_after_a_signal_nobody_asks_any_more(server: MetadataServer, cloud: Asking) -> None:
    notice = Notice()
    thread = watch(cloud(server), notice)
    wait_for(lambda: server.asked)
    notice.give("SIGTERM")
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert notice.reason == "SIGTERM"


# What is no notice


GARBAGE = [
    Answer(200, b""),
    Answer(200, b"<html>Please log in to the network. TRUE</html>"),
    Answer(200, b"null"),
    Answer(200, b"[]"),
    Answer(200, b'"terminate"'),
    Answer(200, b'{"action": "none", "Events": {"EventType": "Preempt"}}'),
    Answer(200, b'{"action": "terminate", "Events": [{"EventType": "Preempt", "Resources": ["Front'),
    Answer(200, b"[" * 60_000),
    Answer(200, b"\xff\xfe\x00"),
    Answer(200, b"x" * 1_000_000),
    Answer(403, b"TRUE"),
    Answer(500, json.dumps(ACTION).encode()),
    Answer(503, b"TRUE"),
]


@pytest.mark.parametrize("answer", GARBAGE, ids=lambda answer: f"{answer.status} {answer.body[:20]!r}")
@pytest.mark.parametrize("cloud", CLOUDS)
def test_garbage_is_no_notice(server: MetadataServer, cloud: Asking, answer: Answer) -> None:
    asking = cloud(server)
    assert asking.ask() == ""
    server.instead = answer
    if answer.body == b"" and cloud is aws:
        assert asking.ask() == ""  # an empty document says that there is nothing
    else:
        with pytest.raises(Unanswered):
            asking.ask()
    server.instead = None
    interrupt(server)
    assert asking.ask() == REASONS[cloud]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_redirect_is_not_followed(server: MetadataServer, cloud: Asking) -> None:
    with MetadataServer() as elsewhere:
        interrupt(elsewhere)
        server.instead = Answer(302, b"", {"Location": elsewhere.address + "/computeMetadata/v1/instance/preempted"})
        with pytest.raises(Unanswered, match="302"):
            cloud(server).ask()
        assert elsewhere.asked == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_proxy_is_not_asked(server: MetadataServer, cloud: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would answer for its own machine."""
    with MetadataServer() as proxy:
        interrupt(proxy)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.address)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert cloud(server).ask() == ""
        assert proxy.asked == []


def test_a_service_that_comes_and_goes_is_told_once_and_asked_on(log: Callable[[], list[dict[str, Any]]]) -> None:
    notice = Notice()
    with MetadataServer() as server:
        port = server.port
        watch(aws(server), notice)
        wait_for(lambda: len(server.asked) >= 2)
    wait_for(log)
    with MetadataServer(port) as back:
        wait_for(lambda: len(back.asked) >= 2)
    time.sleep(0.1)  # it is asked meanwhile, and is not there again
    with MetadataServer(port) as back:
        interrupt(back)
        assert notice.wait(10)
    (event,) = log()
    assert (event["event"], event["cloud"]) == ("metadata.unanswered", "AWS")
    assert str(port) in event["why"]


@pytest.mark.parametrize(
    "endpoint",
    ["", "nonsense", "http://", "https://127.0.0.1", "http://127.0.0.1:port", "http://a\x00b", "http://[::1"],
)
def test_an_endpoint_that_is_none_is_told_like_a_silent_one(endpoint: str) -> None:
    with pytest.raises(Unanswered):
        Aws(endpoint).ask()


# AWS


def test_aws_is_asked_with_a_token_that_is_renewed_before_it_ends(server: MetadataServer) -> None:
    now = 1000.0
    asking = Aws(server.address, clock=lambda: now)
    for _ in range(3):
        assert asking.ask() == ""
    assert server.asked.count("PUT /latest/api/token") == 1
    now += 6 * 3600 - 1  # the last second of its life
    assert asking.ask() == ""
    assert server.asked.count("PUT /latest/api/token") == 2


def test_aws_takes_a_new_token_when_the_old_one_is_void(server: MetadataServer) -> None:
    asking = aws(server)
    assert asking.ask() == ""
    server.tokens.clear()
    server.instance_action = ACTION
    assert asking.ask() == REASONS[aws]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"action": "stop", "time": "2017-09-18T08:22:00Z"}, "stop at 2017-09-18T08:22:00+00:00"),
        ({"action": "hibernate", "time": "2017-09-18T08:22:00Z"}, "hibernate at 2017-09-18T08:22:00+00:00"),
        ({"action": "terminate"}, "terminate at an unknown time"),
        ({"action": "terminate", "time": "soon\nstep=1"}, "terminate at an unknown time"),
    ],
)
def test_aws_every_action_ends_the_attempt(server: MetadataServer, document: dict[str, str], reason: str) -> None:
    server.instance_action = document
    assert aws(server).ask() == f"AWS spot interruption ({reason})"


def test_aws_a_rebalance_recommendation_is_told_once_and_ends_nothing(
    server: MetadataServer, log: Callable[[], list[dict[str, Any]]]
) -> None:
    asking = aws(server)
    server.rebalance = {"noticeTime": "2020-10-27T08:22:00Z"}
    assert [asking.ask() for _ in range(3)] == ["", "", ""]
    assert [(event["event"], event["since"]) for event in log()] == [("notice.ahead", "2020-10-27T08:22:00+00:00")]


# GCP


def test_gcp_answers_while_the_question_waits(server: MetadataServer) -> None:
    question = "GET /computeMetadata/v1/instance/preempted"
    asking = Gcp(server.host, pause=SUDDENLY, wait_seconds=60)
    assert asking.ask() == ""  # at once: what is known already is not waited for
    notice = Notice()
    watch(asking, notice)
    wait_for(lambda: server.asked.count(question) == 2)
    assert not notice.wait(0.3)
    assert server.asked.count(question) == 2  # it waits, and is not asked again and again
    server.preempt()
    assert notice.wait(5)


def test_gcp_a_preemption_that_began_before_is_told_at_once(server: MetadataServer) -> None:
    server.preempt()
    assert Gcp(server.host, wait_seconds=60).ask() == REASONS[gcp]


def test_gcp_maintenance_of_the_host_in_an_hour_is_told_once_and_ends_nothing(
    server: MetadataServer, log: Callable[[], list[dict[str, Any]]]
) -> None:
    """A job that stopped for it would be started again on the same machine, for an hour."""
    asking = Gcp(server.host, wait_seconds=0)
    server.maintenance_event = "TERMINATE_ON_HOST_MAINTENANCE"
    assert [asking.ask() for _ in range(3)] == ["", "", ""]
    assert [(event["event"], event["what"]) for event in log()] == [("notice.ahead", "TERMINATE_ON_HOST_MAINTENANCE")]


# Azure


@pytest.mark.parametrize(
    ("kind", "machines", "ours"),
    [
        ("Preempt", [VM], True),
        ("Preempt", ["BackEnd_IN_0", VM.upper()], True),
        ("Terminate", [VM], True),
        ("Preempt", ["FrontEnd_IN_1", "FrontEnd_IN_00"], False),
        ("Preempt", [], False),
        *[(kind, [VM], False) for kind in ("Freeze", "Reboot", "Redeploy", "")],
    ],
)
def test_azure_only_the_end_of_this_machine_is_a_notice(
    server: MetadataServer, kind: str, machines: list[str], ours: bool
) -> None:
    server.schedule("Preempt", "BackEnd_IN_7")
    server.schedule(kind, *machines)
    assert azure(server).ask() == (f"Azure {kind} (not before an unknown time)" if ours else "")


def test_azure_an_event_that_has_begun_is_a_notice(server: MetadataServer) -> None:
    server.schedule("Preempt", VM, status="Started")
    assert azure(server).ask()


@pytest.mark.parametrize(
    "event", [None, 7, [], {}, {"EventType": "Preempt"}, {"EventType": "Preempt", "Resources": VM}]
)
def test_azure_a_strange_event_hides_no_other(server: MetadataServer, event: Any) -> None:
    asking = azure(server)
    server.scheduled_events = [event]
    assert asking.ask() == ""
    server.schedule("Preempt", VM)
    assert asking.ask() != ""


# Whom to ask


@pytest.mark.parametrize(
    ("name", "kind"),
    [("AWS", Aws), ("aws", Aws), ("GCP", Gcp), ("Azure", Azure), ("azure", Azure)]
    + [(name, type(None)) for name in (None, "", "Nebius", "Lambda", "RunPod", "Kubernetes", "local", "awsome")],
)
def test_a_cloud_is_asked_by_its_name_and_others_not_at_all(name: str | None, kind: type) -> None:
    assert type(cloud_named(name, {})) is kind


@pytest.mark.parametrize("name", ["AWS", "GCP"])
def test_the_clouds_own_variables_lead_elsewhere(server: MetadataServer, name: str) -> None:
    interrupt(server)
    variables = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": server.address + "/", "GCE_METADATA_HOST": server.host}
    asking = cloud_named(name, variables)
    assert asking is not None
    assert asking.ask().startswith(name)
