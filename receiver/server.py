"""The HTTP server: uvicorn with the settings of `serve`, on a socket that is bound before anything is started.

What a stranger can send is bounded by `receiver.http_limits`.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from receiver.http_limits import Front, bounded_protocol

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections: a callback sent on one that the server closes is lost."""

STOP_S = 30
"""How long requests in flight may take when the server stops."""

ACCEPTED_AT_ONCE = 16
"""New connections that one iteration of the event loop accepts.

uvloop accepts one for each listening socket. Under a flood an iteration takes 50 ms, and with one socket a vendor
would wait in the kernel's queue until the flood is over.
"""


BEAT_S = 1
"""How often a server calls its `beat`, at most."""


class CannotListen(Exception):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses a free one. Raises CannotListen."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        raise CannotListen(f"cannot listen on {host}, port {port}: {error}") from error


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    listening: socket.socket,
    *,
    stop_s: int = STOP_S,
    drain_s: float = 0,
    on_closed: Callable[[str], None] | None = None,
    beat: Callable[[], Awaitable[None]] | None = None,
) -> bool:
    """Serve the app until SIGINT or SIGTERM; return whether it started.

    `stop_s` limits requests in flight then. Before, idle connections get up to `drain_s` seconds for one more request
    each, so that a client does not send it on a connection that is closed. `on_closed` gets the reason of each
    connection that a bound closed. `beat` is awaited as soon as the server is started, then about each BEAT_S.
    """
    config = uvicorn.Config(
        app,
        http=bounded_protocol(Front(on_closed=on_closed)),
        ws="none",
        log_level="error",  # uvicorn warns of each malformed request: a stranger would fill the log
        access_log=False,  # access log lines contain the tokens of callback URLs
        server_header=False,
        proxy_headers=False,  # the client address is not used
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_s,
        callback_notify=beat,
        timeout_notify=BEAT_S,
    )
    server = _Server(config, drain_s)
    with suppress(KeyboardInterrupt):  # uvicorn has stopped gracefully before it raises this
        server.run(sockets=[listening, *(listening.dup() for _ in range(ACCEPTED_AT_ONCE - 1))])
    return server.started


class _Server(uvicorn.Server):
    """uvicorn's server, which may drain its connections before it closes those that are idle."""

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain_s:
            await self._drain()
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        """Accept no connection any more, and close each one with its next answer."""
        for server in self.servers:
            server.close()
        self.server_state.default_headers.append((b"connection", b"close"))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                while self.server_state.connections and not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event
                    await asyncio.sleep(0.05)
