"""Helpers for tests against real servers: a TCP proxy that simulates an outage, free and listening ports."""

import asyncio
import contextlib
import itertools
import os
import socket


def is_listening(port: int) -> bool:
    """Return whether a server accepts connections at a loopback port."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Below the ports that Linux, macOS and Windows give to outgoing connections, so that no connection takes a port
# between this choice and the server's start. Each worker of pytest-xdist has a slice of it.
PORTS, WORKERS = range(10240, 32768), 16
_slice = len(PORTS) // WORKERS
_first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS * _slice
_turn = itertools.count(os.getpid() * 7919)  # far from that of the next process


def free_port() -> int:
    """Return a loopback port that nothing uses, and that this process has not been given before."""
    for turn in itertools.islice(_turn, _slice):
        port = PORTS[_first + turn % _slice]
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {PORTS}")


class Proxy:
    """A TCP proxy to a server on loopback. To a client, `cut` looks like a server that stops."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def open(self) -> None:
        """Accept connections, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Abort every connection, and accept no others."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._writers |= both
        try:
            await asyncio.gather(_pump(reader, server_writer), _pump(server_reader, writer))
        finally:
            self._writers -= both
            for closing in both:
                closing.close()
                with contextlib.suppress(OSError):
                    await closing.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    writer.close()
