"""Bounds for strangers at the HTTP front: header bytes, request time, pipelining, connections (a uvicorn protocol).

uvicorn has no settings for these. A connection is closed when its client sends too much, too slowly, or does not
read; above the limit of connections, the one that has waited longest for its client is closed, so that new ones
get in. `receiver.server` uses it; with another uvicorn: `uvicorn --http receiver.http_limits:BoundedProtocol ...`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NoReturn

import msgspec
from httptools import HttpParserError
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from submitter.log import Logger

HEADER_BYTES = 64 * 1024
REQUEST_S = 10.0
"""Time from the first byte of a request (of a connection, for the first) to its end; also for a client to read."""

HEADERS = 128
"""Header lines of one request: an empty one costs forty times its bytes in memory."""

PIPELINED = 8
"""Requests of one connection that wait for the one before, each about 2.5 KiB in memory; HEADER_BYTES of headers."""

HELD_BYTES = 32 * 1024 * 1024
"""Bytes of unfinished requests, of all connections together; checked each second."""

RESERVED_FILES = 124
"""File descriptors that are kept for everything but clients: ledger, hooks, vendors."""

CONNECTIONS_MAX = 10_000
SWEEP_S = 1.0
FLUSH_S = 5.0

Reason = Literal["headers", "slow", "pipelined", "connections", "memory"]
log = Logger("receiver")


class HttpLimits(msgspec.Struct, frozen=True):
    """The bounds of one server."""

    connections: int
    header_bytes: int = HEADER_BYTES
    request_s: float = REQUEST_S
    pipelined: int = PIPELINED
    held_bytes: int = HELD_BYTES


def default_limits() -> HttpLimits:
    """Return the bounds that fit this process: fewer connections than it may have open files."""
    try:
        import resource
    except ImportError:  # Windows
        return HttpLimits(500)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else soft - RESERVED_FILES
    return HttpLimits(max(16, min(files, CONNECTIONS_MAX)))


class Front:
    """The connections of one server whose client has the next move, those that have waited longest first."""

    def __init__(self, limits: HttpLimits | None = None, on_closed: Callable[[str], None] | None = None) -> None:
        self.limits = limits or default_limits()
        self.waiting: dict[BoundedProtocol, None] = {}
        self._on_closed = on_closed
        self._closed: Counter[str] = Counter()
        self._sweeping = False

    def wait_for(self, connection: "BoundedProtocol") -> None:
        """Note that the connection's client has the next move, from now on."""
        self.waiting.pop(connection, None)
        connection.since_s = connection.loop.time()
        self.waiting[connection] = None
        if not self._sweeping:
            self._sweeping = True
            connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def count(self, reason: Reason) -> None:
        """Count a connection that was closed."""
        self._closed[reason] += 1
        if self._on_closed is not None:
            self._on_closed(reason)

    def make_room(self, newest: "BoundedProtocol", open_connections: int) -> None:
        """Close a connection if there are too many: the one whose client has kept it waiting longest."""
        if open_connections > self.limits.connections:
            next(iter(self.waiting), newest).close_because("connections")

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close every connection whose client is too slow; log what was closed since the last time."""
        overdue_s = loop.time() - self.limits.request_s
        for connection in [one for one in self.waiting if not one.is_idle and one.since_s < overdue_s]:
            connection.close_because("slow", 408)
        held = sum(connection.held for connection in self.waiting)
        if held > self.limits.held_bytes:
            for connection in sorted(self.waiting, key=lambda one: one.held, reverse=True):
                if held <= self.limits.held_bytes:
                    break
                held -= connection.held
                connection.close_because("memory")
        if self._closed:
            log.warning("connections.closed", **self._closed)
            self._closed.clear()
        self._sweeping = bool(self.waiting)
        if self._sweeping:
            loop.call_later(SWEEP_S, self._sweep, loop)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with the bounds of its `front`."""

    front: ClassVar[Front] = Front()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.since_s = 0.0
        self.is_idle = False
        """Whether it is kept alive between two requests, which uvicorn's own timer limits."""
        self.held = 0
        """Bytes that were received since the last response."""
        self._parsed = 0
        """Those of them before the headers that are being received."""
        self._queued = 0
        self._has_begun = self._has_headers = self._is_complete = self._is_refused = False
        self._running: RequestResponseCycle | None = None
        """The request that is answered now; `cycle` is the last one that was received."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.front.make_room(self, len(self.connections))
        if not self._is_refused:
            self.front.wait_for(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.waiting.pop(self, None)
        self._drop_response()
        self.pipeline.clear()  # they refer to the connection: garbage that waits for the collector, 20 KiB each time
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._drop_response()  # the transport closes now, and `connection_lost` comes later

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self.held += len(data)
        super().data_received(data)
        if not self._is_complete or self.is_idle:  # else whole requests have come, as from most clients
            self._bound_a_part()

    def _bound_a_part(self) -> None:
        """Bound a request of which a part has come, and time its client from its first byte."""
        if self.transport.is_closing():
            return
        if not self._has_headers and self._has_too_many_headers(self.held - self._parsed):
            self.close_because("headers", 431)
        elif self.is_idle:  # line ends between two requests, which uvicorn's timer does not limit
            self.is_idle = False
            self.front.wait_for(self)
        elif self._has_begun:
            self._has_begun = False
            if self in self.front.waiting:
                self.front.wait_for(self)

    def on_message_begin(self) -> None:
        self._is_complete = self.is_idle = self._has_headers = False
        self._has_begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        limits = self.front.limits
        received = self.held - self._parsed  # of this request, with what came behind its headers
        if len(self.headers) > HEADERS or (received > limits.header_bytes < self._header_size()):
            self._refuse("headers", 431)
        if self.cycle is None or self.cycle.response_complete:
            self._queued = 0
        else:
            self._queued += self._header_size()
            if len(self.pipeline) >= limits.pipelined or self._queued > limits.header_bytes:
                self._refuse("pipelined")
        self._has_headers = True
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle

    def _has_too_many_headers(self, received: int) -> bool:
        """Return whether headers that are not complete break a bound; `received` are their bytes."""
        return received > self.front.limits.header_bytes or bool(self.headers and len(self.headers) > HEADERS)

    def _header_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _refuse(self, reason: Reason, status: int | None = None) -> NoReturn:
        """Close the connection, and stop the parser, whose callback calls this."""
        self.close_because(reason, status)
        raise HttpParserError(reason)

    def on_message_complete(self) -> None:
        self._is_complete = True
        self._parsed = self.held
        super().on_message_complete()
        if self.cycle.response_complete:  # it was answered before its end: the client has the next move
            self.front.wait_for(self)
        else:
            self.front.waiting.pop(self, None)

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        self.held -= self._parsed
        self._parsed = 0
        if not self.pipeline and not self.transport.is_closing():
            self.is_idle = self._is_complete and not self.flow.write_paused
            self.front.wait_for(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_idle = False
        self.front.wait_for(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle.response_complete:
            self.is_idle = self._is_complete
            self.front.wait_for(self)
        else:
            self.front.waiting.pop(self, None)

    def close_because(self, reason: Reason, status: int | None = None) -> None:
        """Close the connection and count it; with `status`, answer first if no response is under way. Idempotent."""
        if self._is_refused:
            return
        self._is_refused = True
        self.front.waiting.pop(self, None)
        self.front.count(reason)
        if self.transport.is_closing():
            return
        if status is not None and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
        self._drop_response()
        self.loop.call_later(FLUSH_S, self.transport.abort)  # a client that does not read keeps nothing open

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            self._is_refused = True
            super().send_400_response(msg)
            self._drop_response()

    def _drop_response(self) -> None:
        """End the request under way: its answer would be written to a closed connection, and fail with a traceback."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()


def bounded_protocol(front: Front) -> type[BoundedProtocol]:
    """Return the protocol class of one server."""
    return type("BoundedProtocol", (BoundedProtocol,), {"front": front})
