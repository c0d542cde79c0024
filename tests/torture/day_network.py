"""An in-process network: routes HTTP requests by host to ASGI apps, with latency and faults by seed. No sockets."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

import httpx
import msgspec
from starlette.types import ASGIApp

from tests.torture.virtual_time import Process

Headers = list[tuple[bytes, bytes]]
Trouble = str
"""`refused` and `unreachable`: nothing is sent. `lost_request`, `hangs`: it is sent, and never arrives.
`lost_answer`: it is handled, and the connection breaks before the answer. Three digits: a proxy answers this status."""


class Server(msgspec.Struct):
    """Where the requests to a host go: an app, in the process that runs it."""

    app: ASGIApp
    process: Process


class Answer(msgspec.Struct):
    """A server's answer."""

    status: int
    headers: Headers
    body: bytes


class Exchange(msgspec.Struct):
    """One request, and what its client got: `status`, or 0 if it got no answer. `trouble` is the injected fault."""

    sender: Process
    host: str
    method: str
    path: str
    sent: Headers
    body: bytes
    trouble: Trouble | None = None
    status: int = 0
    headers: Headers = []


class Network:
    """All hosts. `weather` returns the trouble of a request, or None; `witness` sees its end."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.servers: dict[str, Server] = {}
        self.weather: Callable[[Exchange], Trouble | None] = lambda exchange: None
        self.witness: Callable[[Exchange], None] = lambda exchange: None
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        """Exceptions that an app did not handle."""

    def client(self, sender: Process, timeout_s: float) -> httpx.AsyncClient:
        """Return an HTTP client in a process."""
        return httpx.AsyncClient(transport=self.transport(sender), timeout=timeout_s, trust_env=False)

    def transport(self, sender: Process) -> "Link":
        """Return the transport of an HTTP client in a process."""
        return Link(self, sender)

    async def carry(self, sender: Process, request: httpx.Request) -> httpx.Response:
        """Send a request to its host, and return the answer."""
        if sender.is_dead:
            await asyncio.Event().wait()
        body = await request.aread()
        host, path = request.url.host, request.url.raw_path.decode()
        sent = [(name.lower(), value) for name, value in request.headers.raw]
        exchange = Exchange(sender, host, request.method, path, sent, body)
        exchange.trouble = self.weather(exchange)
        if exchange.trouble is not None:
            self.counts[f"fault {host.partition('.')[0]} {exchange.trouble}"] += 1
        timeouts = request.extensions["timeout"]
        try:
            answer = await self._handle(exchange, timeouts["connect"] or 60.0, timeouts["read"] or 60.0)
            exchange.status, exchange.headers = answer.status, answer.headers
            return httpx.Response(answer.status, headers=answer.headers, stream=httpx.ByteStream(answer.body))
        finally:
            if not sender.is_dead:
                self.witness(exchange)

    async def _handle(self, exchange: Exchange, connect_s: float, read_s: float) -> Answer:
        trouble, server = exchange.trouble, self.servers.get(exchange.host)
        if trouble == "unreachable":
            await asyncio.sleep(connect_s)
            raise httpx.ConnectTimeout("no answer to the connection")
        await asyncio.sleep(self.random.uniform(0.002, 0.08))
        if trouble == "refused" or server is None or server.process.is_dead:
            raise httpx.ConnectError("connection refused")
        if trouble == "hangs":
            await asyncio.sleep(read_s)
            raise httpx.ReadTimeout("no answer")
        if trouble == "lost_request":
            raise httpx.ReadError("connection reset")
        if trouble is not None and trouble.isdecimal():
            return Answer(int(trouble), [], b"upstream")
        handling = server.process.start(_serve(server.app, exchange))
        await asyncio.wait([handling], timeout=read_s)
        if not handling.done():
            raise httpx.ReadTimeout("no answer")
        if handling.cancelled():
            raise httpx.ReadError("connection reset: the server was killed")
        failure = handling.exception()
        if failure is not None:
            self.failures.append(f"{exchange.method} {exchange.host}{exchange.path}: {failure!r}")
            return Answer(500, [], b"unhandled")
        await asyncio.sleep(self.random.uniform(0.002, 0.08))
        if trouble == "lost_answer":
            raise httpx.ReadError("connection reset")
        return handling.result()


class Link(httpx.AsyncBaseTransport):
    """The transport of one process's HTTP clients."""

    def __init__(self, network: Network, sender: Process) -> None:
        self._network = network
        self._sender = sender

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._network.carry(self._sender, request)


async def _serve(app: ASGIApp, exchange: Exchange) -> Answer:
    """Call an ASGI app with a request; return its answer."""
    path, _, query = exchange.path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": exchange.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": exchange.sent,
        "client": ("10.0.0.1", 1),
        "server": (exchange.host, 80),
    }
    messages = [{"type": "http.request", "body": exchange.body, "more_body": False}]
    status = 0
    headers: list[tuple[bytes, bytes]] = []
    body: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
        else:
            body.append(message.get("body", b""))

    await app(scope, receive, send)
    return Answer(status, headers, b"".join(body))
