"""The HTTP front's bounds, by raw sockets on a real server: headers, slow clients, pipelining, connections."""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from receiver.http_limits import HEADERS, Front, HttpLimits, bounded_protocol, default_limits
from submitter.sandbox.server import free_socket

LIMITS = HttpLimits(connections=20, header_bytes=64 * 1024, request_s=0.5, pipelined=16, held_bytes=500_000)
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"


class Server:
    """A server with bounds, and what it counted."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.closed: Counter[str] = Counter()
        self.release = asyncio.Event()
        self.bodies: list[bytes] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)

    async def answers(self) -> int:
        """Return the status of a request on a new connection."""
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            return (await client.get(f"http://127.0.0.1:{self.port}/")).status_code

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        return Response(b"x" * 100)

    async def refuse(self, request: Request) -> Response:
        """Answer before the body has arrived."""
        return Response(status_code=401)

    async def hold(self, request: Request) -> Response:
        await self.release.wait()
        return Response(b"held")

    async def large(self, request: Request) -> Response:
        return Response(b"x" * 16_000_000)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    bound, _ = free_socket()
    made = Server(bound.getsockname()[1])
    front = Front(LIMITS, lambda reason: made.closed.update([reason]))
    routes = [Route("/", made.answer, methods=["GET", "POST"]), Route("/hold", made.hold), Route("/large", made.large)]
    routes.append(Route("/refuse", made.refuse, methods=["POST"]))
    config = uvicorn.Config(
        Starlette(routes=routes), http=bounded_protocol(front), log_level="critical", timeout_graceful_shutdown=1
    )
    running = uvicorn.Server(config)
    serving = asyncio.create_task(running.serve(sockets=[bound]))
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield made
    finally:
        made.release.set()
        running.should_exit = True
        await serving


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read()
    return b""


async def test_endless_headers_are_refused_with_431(server: Server) -> None:
    for endless in (b"a: " + b"x" * 70_000, b"".join(b"h%d: x\r\n" % n for n in range(10_000)), b"x" * 70_000):
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\n" + endless)
        answer = await read_all(reader)
        # What a client sends after the answer can reset its connection before it has read the answer.
        assert answer.startswith(b"HTTP/1.1 431 ") or b" 400 " in answer or answer == b""
        writer.close()
    assert server.closed["headers"] >= 2
    assert await server.answers() == 200


async def test_the_waiting_requests_of_a_closed_connection_are_freed_at_once(server: Server) -> None:
    """Without the garbage collector: a flood that breaks a bound again and again fills the memory between two runs."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            reader, writer = await server.connect()
            writer.write(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
            await read_all(reader)
            writer.close()
        assert server.closed["pipelined"] == 10
        server.release.set()
        async with asyncio.timeout(20):
            while sum(isinstance(one, RequestResponseCycle) for one in gc.get_objects()) > 20:  # 16 of each waited
                await asyncio.sleep(0.05)
    finally:
        gc.enable()


async def test_complete_headers_that_are_too_large_are_refused_with_431(server: Server) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 66_000 + b"\r\n\r\n")
    assert (await read_all(reader)).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_headers_and_a_body_within_the_bounds_are_accepted_in_any_pieces(server: Server) -> None:
    reader, writer = await server.connect()
    head = b"POST / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 60_000 + b"\r\ncontent-length: 300000\r\n\r\n"
    writer.write(head + b"b" * 300_000 + POST)
    for _ in range(2):
        async with asyncio.timeout(20):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(100)
    assert [len(body) for body in server.bodies] == [300_000, 3]
    writer.close()
    assert not server.closed


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"]
)
async def test_a_request_that_is_not_complete_in_time_is_closed(server: Server, sent: bytes) -> None:
    reader, writer = await server.connect()
    writer.write(sent)
    await read_all(reader)
    writer.close()
    assert server.closed == {"slow": 1}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (POST, b"\r\n"),  # a line end, which begins no request
        (b"POST /refuse HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nab", b"cd"),  # answered before its end
        (b"POST /refuse HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n", b"0\r\n\r\n"),
    ],
)
async def test_a_connection_that_is_silent_after_an_answer_is_closed(server: Server, first: bytes, then: bytes) -> None:
    reader, writer = await server.connect()
    writer.write(first)
    assert await reader.readuntil(b"\r\n\r\n")
    writer.write(then)
    await read_all(reader)
    writer.close()
    assert server.closed == {"slow": 1}


async def test_many_header_lines_are_refused_although_they_are_short(server: Server) -> None:
    for end in (b"", b"\r\n"):
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a:\r\n" * (HEADERS + 1) + end)
        assert (await read_all(reader)).startswith(b"HTTP/1.1 431 ")
        writer.close()
    assert server.closed == {"headers": 2}


async def test_unfinished_requests_are_bounded_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.http_limits.SWEEP_S", 0.05)
    clients = [await server.connect() for _ in range(12)]
    for _, writer in clients:
        writer.write(b"GET / HTTP/1.1\r\na: " + b"x" * 60_000)
    async with asyncio.timeout(20):
        while not server.closed["memory"]:
            await asyncio.sleep(0.01)
    assert server.closed["memory"] == 4  # 8 of 60,000 bytes fit into 500,000
    for _, writer in clients:
        writer.transport.abort()


async def test_the_headers_of_pipelined_requests_are_bounded_together(server: Server) -> None:
    reader, writer = await server.connect()
    writer.write((b"GET /hold HTTP/1.1\r\nhost: x\r\na: " + b"x" * 30_000 + b"\r\n\r\n") * 5)
    await read_all(reader)
    writer.close()
    assert server.closed == {"pipelined": 1}


async def test_a_trickled_request_is_closed_and_an_idle_connection_is_kept(server: Server) -> None:
    idle_reader, idle = await server.connect()
    idle.write(POST)
    await idle_reader.readuntil(b"x" * 100)
    reader, writer = await server.connect()
    writer.write(b"GET / HTTP/1.1\r\na: ")
    reading = asyncio.create_task(read_all(reader))
    with contextlib.suppress(ConnectionError):
        while not reading.done():
            writer.write(b"a")
            await asyncio.sleep(0.02)
    await reading
    idle.write(POST)  # kept alive between requests, by uvicorn's own timer
    assert b" 200 " in await idle_reader.readuntil(b"x" * 100)
    for one in (idle, writer):
        one.close()
    assert server.closed == {"slow": 1}


async def test_too_many_pipelined_requests_close_the_connection(server: Server) -> None:
    reader, writer = await server.connect()
    writer.write(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
    await read_all(reader)
    writer.close()
    assert server.closed == {"pipelined": 1}
    reader, writer = await server.connect()
    writer.write(POST * 10)
    for _ in range(10):
        assert b" 200 " in await reader.readuntil(b"x" * 100)
    writer.close()


async def test_above_the_limit_the_connection_that_waited_longest_is_closed(server: Server) -> None:
    working, held = await server.connect()
    held.write(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n")
    silent = [await server.connect() for _ in range(30)]
    assert await server.answers() == 200
    assert server.closed["connections"] >= 11
    assert await read_all(silent[0][0]) == b""  # the oldest silent one
    server.release.set()
    assert (await working.readuntil(b"held")).startswith(b"HTTP/1.1 200")  # a request under way is not cut off
    for _, writer in [*silent, (working, held)]:
        writer.close()


async def test_a_client_that_does_not_read_is_closed(server: Server) -> None:
    reader, writer = await server.connect()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(20):
        while not server.closed:
            await asyncio.sleep(0.05)
    assert server.closed == {"slow": 1}
    writer.close()
    del reader


def test_the_default_limit_is_below_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for soft, expected in ((1024, 900), (64, 16), (resource.RLIM_INFINITY, 10_000), (1_000_000, 10_000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert default_limits().connections == expected
