"""Conformance of the HTTP destination, and how it interprets statuses, Retry-After and response bodies."""

import base64
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.destinations.cloudevents import traceparent
from receiver.destinations.http import read_retry_after
from receiver.hook import Hook
from submitter.sandbox.server import free_socket, listening
from tests.conformance.destinations import NOW_S, DistantSuite, event
from tests.world import Inbox


class HttpPeer:
    def __init__(self, folder: Path) -> None:
        self.inbox = Inbox(folder)
        self.stack = AsyncExitStack()
        self.url = ""

    def open(self, *, allow: tuple[str, ...] = ("127.0.0.1",), **settings: Any) -> Destination:
        return open_destination(Hook("inbox", f"{self.url}/events", **settings), frozenset(allow))

    async def arrived(self) -> list[str]:
        return [event["id"] for event in self.inbox.events]

    async def refuse(self) -> None:
        self.inbox.answers = [Response("not now", 500)] * 10

    async def accept(self) -> None:
        self.inbox.answers = []

    async def away(self) -> None:
        await self.stack.aclose()

    async def back(self) -> None:
        bound, url = free_socket(port=int(self.url.rpartition(":")[2]) if self.url else 0)
        self.url = url
        await self.stack.enter_async_context(listening(self.inbox.app(), bound))


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[HttpPeer]:
    http_peer = HttpPeer(tmp_path)
    await http_peer.back()
    yield http_peer
    await http_peer.away()


class TestHttp(DistantSuite):
    """The suite, with a real HTTP server."""


@pytest.mark.parametrize(("status", "delivered"), [(200, True), (204, True), (301, False), (307, False), (400, False)])
async def test_success_is_2xx_and_a_redirect_is_a_failure(peer: HttpPeer, status: int, delivered: bool) -> None:
    destination = peer.open()
    peer.inbox.answers = [Response("", status, headers={"location": f"{peer.url}/elsewhere"})]
    assert (await destination.send(event(), NOW_S)).is_delivered is delivered
    assert len(peer.inbox.requests) == 1
    await destination.close()


async def test_410_is_gone_and_retry_after_counts_for_429_and_503(peer: HttpPeer) -> None:
    destination = peer.open()
    when = format_datetime(datetime.fromtimestamp(NOW_S, UTC) + timedelta(seconds=90), usegmt=True)
    peer.inbox.answers = [
        Response("", 410),
        Response("", 429, headers={"retry-after": "7"}),
        Response("", 503, headers={"retry-after": when}),
        Response("", 500, headers={"retry-after": "7"}),
    ]
    outcomes = [await destination.send(event(), NOW_S) for _ in range(4)]
    assert [outcome.is_gone for outcome in outcomes] == [True, False, False, False]
    assert [outcome.retry_after_s for outcome in outcomes] == [None, 7, 90, None]
    await destination.close()


async def test_a_compressed_response_is_not_expanded(peer: HttpPeer) -> None:
    """1 MiB can become 1 GiB."""
    destination = peer.open()
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    peer.inbox.answers = [Response(bomb, 500, headers={"content-encoding": "gzip"})]
    tracemalloc.start()
    await destination.send(event(), NOW_S)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peer.inbox.requests[0][0]["accept-encoding"] == "identity"
    assert peak < 8 * 1024 * 1024
    await destination.close()


async def test_an_answer_that_repeats_the_request_shows_no_secret_of_the_url(peer: HttpPeer) -> None:
    peer.url = peer.url.replace("://", "://user:p%40ssword@")
    hook = Hook("inbox", f"{peer.url}/services/PATH-SECRET?token=QUERY-SECRET")
    destination = open_destination(hook, frozenset({"127.0.0.1"}))
    login = base64.b64encode(b"user:p@ssword").decode()
    said = f"Basic {login} may not call /services/PATH-SECRET?token=QUERY-SECRET as user:p@ssword (QUERY-SECRET)"
    peer.inbox.answers = [Response(said, 401)]
    outcome = await destination.send(event(), NOW_S)
    await destination.close()
    assert outcome.answer.startswith("HTTP 401 Basic [hidden] may not call [hidden]")
    assert not [secret for secret in ("SECRET", "p@ssword", login) if secret in outcome.answer]


async def test_a_long_response_body_is_truncated_in_the_answer(peer: HttpPeer) -> None:
    destination = peer.open()
    peer.inbox.answers = [Response(b"x" * 1_000_000, 500)]
    outcome = await destination.send(event(), NOW_S)
    assert len(outcome.answer) < 300
    await destination.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120),
        (" 5 ", 5),
        ("99999999999999999999", 86400),
        ("-5", None),
        ("soon", None),
        ("", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 01 Jan 2099 00:00:00 GMT", 86400),
        ("Thu, 99 Jan 2099 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header, NOW_S) == seconds


def test_traceparent_has_one_trace_per_task_and_one_span_per_event() -> None:
    first, second = traceparent(event(1)).split("-"), traceparent(event(2)).split("-")
    assert (first[0], first[3], first[1]) == ("00", "01", second[1])
    assert first[2] != second[2]
    assert (len(first[1]), len(first[2])) == (32, 16)
