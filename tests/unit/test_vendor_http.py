"""The HTTP client for vendors: answers of any form and size are bounded in memory."""

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from httpx_sse import EventSource
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from submitter.http import ANSWER_MAX, NotSent, Outcome, Unanswered, VendorHttp
from submitter.sandbox.server import free_socket, listening
from submitter.vendors.base import HttpAnswer, HttpRequest
from tests.loopback import tcp_server

SMALL = b'{"id": "7"}'
LARGE = bytes(256 * 1024 * 1024)


class Vendor:
    """A vendor that answers each request in the same way, whatever encodings the client accepts."""

    def __init__(self, body: bytes, encoding: str | None = None, status: int = 200) -> None:
        self._headers = {"content-encoding": encoding} if encoding else {}
        self._body, self._status = body, status
        self.accepted: list[str | None] = []

    async def answer(self, request: Request) -> Response:
        self.accepted.append(request.headers.get("accept-encoding"))
        return Response(self._body, self._status, headers={**self._headers, "location": "/elsewhere"})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        bound, url = free_socket()
        async with listening(Starlette(routes=[Route("/{path:path}", self.answer)]), bound):
            yield url


async def ask(vendor: Vendor) -> Outcome:
    http = VendorHttp()
    try:
        async with vendor.running() as url:
            return await http.run(HttpRequest("GET", url, {}))
    finally:
        await http.close()


@pytest.mark.parametrize("encoding", [None, "identity", "gzip", "X-GZIP"])
async def test_an_answer_is_read_in_each_usual_encoding(encoding: str | None) -> None:
    vendor = Vendor(SMALL if encoding in (None, "identity") else gzip.compress(SMALL), encoding)
    answer = await ask(vendor)
    assert isinstance(answer, HttpAnswer), answer
    assert (answer.status, answer.body) == (200, SMALL)
    assert vendor.accepted == ["gzip"]


@pytest.mark.parametrize("times", [1, 2])
async def test_an_answer_that_expands_is_cut_off(times: int) -> None:
    """1 KiB can become 1 GiB when it is compressed twice."""
    body = bytes(8 * ANSWER_MAX)
    for _ in range(times):
        body = gzip.compress(body)
    tracemalloc.start()
    try:
        answer = await ask(Vendor(body, ", ".join(["gzip"] * times)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(answer, Unanswered), answer
    assert peak < 4 * ANSWER_MAX


@pytest.mark.parametrize(
    ("encoding", "cut", "is_answer"), [("gzip", 1, False), ("gzip", None, False), ("br", 0, False), ("gzip", 0, True)]
)
async def test_an_answer_that_cannot_be_expanded_is_no_answer(encoding: str, cut: int | None, is_answer: bool) -> None:
    body = SMALL if cut is None else gzip.compress(SMALL)[: -cut or None]
    answer = await ask(Vendor(body, encoding))
    assert isinstance(answer, HttpAnswer) is is_answer, answer


async def test_a_redirect_of_a_vendor_is_not_followed() -> None:
    vendor = Vendor(b"", status=307)
    answer = await ask(vendor)
    assert isinstance(answer, HttpAnswer)
    assert (answer.status, len(vendor.accepted)) == (307, 1)


async def test_a_compressed_event_stream_is_refused() -> None:
    vendor = Vendor(gzip.compress(b"data: 1\n\n"), "gzip")
    http = VendorHttp()
    async with vendor.running() as url:
        with pytest.raises(httpx.DecodingError):
            async with http.stream(HttpRequest("GET", url, {}), silence_s=5):
                pass
    assert vendor.accepted == ["identity"]
    await http.close()


async def answer_raw(raw: bytes, *, times: int = 1) -> tuple[list[Outcome], int]:
    """Send `times` creates to a server that answers with these bytes; return the outcomes, and how many it received."""
    received = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(2)
        received += 1
        writer.write(raw)
        await writer.drain()

    http = VendorHttp()
    async with tcp_server(serve) as port:
        url = f"http://127.0.0.1:{port}/create"
        request = HttpRequest("POST", url, {"authorization": "Bearer k"}, b"{}")
        outcomes = [await http.run(request, fresh=True) for _ in range(times)]
        await http.close()
    return outcomes, received


@pytest.mark.parametrize(
    "location",
    [b"mailto:x", b"http:path", b"https:..a", b"http://xn--a/", b"http://[", b"http://a:b/", b"/\x80", b"x:///"],
)
async def test_a_create_whose_answer_is_an_odd_redirect_was_sent(location: bytes) -> None:
    (outcome,), received = await answer_raw(
        b"HTTP/1.1 307 T\r\nlocation: " + location + b"\r\ncontent-length: 0\r\n\r\n"
    )
    assert received == 1
    assert isinstance(outcome, HttpAnswer | Unanswered), outcome


async def test_cookies_are_not_kept() -> None:
    raw = b"HTTP/1.1 200 OK\r\nset-cookie: a=\xff\r\ncontent-length: 2\r\n\r\n{}"
    outcomes, received = await answer_raw(raw, times=2)
    assert received == 2
    assert [isinstance(outcome, HttpAnswer) for outcome in outcomes] == [True, True]


@pytest.mark.parametrize(
    "request_",
    [HttpRequest("POST", "http://a..b/", {}, b""), HttpRequest("POST", "http://127.0.0.1:9/", {"x": "a\rb"}, b"")],
)
async def test_a_request_that_cannot_be_built_was_not_sent(request_: HttpRequest) -> None:
    http = VendorHttp()
    outcome = await http.run(request_)
    await http.close()
    assert isinstance(outcome, NotSent)


async def test_an_answer_that_trickles_is_cut_off() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    http = VendorHttp(connect_timeout_s=0.2, answer_timeout_s=0.5)
    async with tcp_server(serve) as port:
        url = f"http://127.0.0.1:{port}/"
        outcome = await http.run(HttpRequest("GET", url, {}, b""))
        await http.close()
    assert isinstance(outcome, Unanswered)
    assert "not complete within" in outcome.reason


async def read_stream(chunks: list[bytes]) -> list[str]:
    """Return the data of the events in a stream of these chunks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()

    http = VendorHttp()
    try:
        async with tcp_server(serve) as port:
            request = HttpRequest("GET", f"http://127.0.0.1:{port}/", {}, b"")
            async with http.stream(request, silence_s=5) as response:
                return [event.data async for event in EventSource(response).aiter_sse()]
    finally:
        await http.close()


async def test_an_event_of_a_stream_without_an_end_is_cut_off() -> None:
    with pytest.raises(httpx.DecodingError, match="an event of the stream is longer than 1048576 bytes"):
        await read_stream([b"data: ", *[b"x" * 65536] * 17])


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
async def test_many_events_of_a_stream_may_be_longer_than_one(end: bytes) -> None:
    event = b"data: " + b"x" * 600_000 + end
    whole = event * 4
    cut = 600_007  # within a blank line
    assert await read_stream([whole[:cut], whole[cut:]]) == ["x" * 600_000] * 4
