"""Clients that hold connections: endless headers, pipelining without reading, silence, slow bodies, no reading."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine

from tests.torture.bodies import path_of
from tests.torture.raw_http import BOUND_S, Judge

PIPELINED = 10_000
Write = Callable[[asyncio.StreamWriter], Coroutine[None, None, None]]


class HostileSockets:
    """Each method runs one attack, and finds a connection that is neither answered nor closed in time."""

    def __init__(self, port: int, judge: Judge, now_s: float) -> None:
        self._port = port
        self._judge = judge
        self._callback = path_of("open", 0, now_s).encode()

    async def endless_headers(self) -> None:
        """Send headers without an end, as fast as they are taken."""

        async def write(writer: asyncio.StreamWriter) -> None:
            line = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 50) for n in range(50))
            while True:
                writer.write(line)
                await writer.drain()

        await self._hold("endless headers", b"GET / HTTP/1.1\r\nhost: relay\r\n", write)

    async def slow_body(self) -> None:
        """Send the body of a callback, a byte a second."""

        async def write(writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(b"{")
                await asyncio.sleep(1)

        await self._hold(
            "a slow body", b"POST %s HTTP/1.1\r\nhost: relay\r\ncontent-length: 60\r\n\r\n" % self._callback, write
        )

    async def slow_chunks(self) -> None:
        """Send the body of a callback in chunks of a byte, one a second."""

        async def write(writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(b"1\r\n{\r\n")
                await asyncio.sleep(1)

        head = b"POST %s HTTP/1.1\r\nhost: relay\r\ntransfer-encoding: chunked\r\n\r\n" % self._callback
        await self._hold("slow chunks", head, write)

    async def silent(self, count: int, per_s: int = 2000) -> None:
        """Open many connections, and send nothing."""

        async def one(number: int) -> None:
            await asyncio.sleep(number / per_s)
            await self._hold("a silent connection", b"")

        await asyncio.gather(*map(one, range(count)))

    async def pipelined(self, count: int = PIPELINED) -> None:
        """Send many requests on one connection, and read none of the answers until it must be closed."""
        await self._never_read("pipelined requests", b"GET /healthz HTTP/1.1\r\nhost: relay\r\n\r\n" * count)

    async def never_read(self, count: int) -> None:
        """Request much, on many connections, and read nothing."""
        request = b"GET /asyncapi.yaml HTTP/1.1\r\nhost: relay\r\n\r\n"
        await asyncio.gather(*(self._never_read("an unread answer", request * 15) for _ in range(count)))

    async def _hold(self, what: str, start: bytes, write: Write | None = None) -> None:
        """Send `start`, then what `write` sends, until there is an answer or an end; find it if it is late."""
        loop = asyncio.get_running_loop()
        self._judge.counts["hostile connections"] += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as error:
            self._judge.find("no connection", f"{what}: {error!r}")
            return
        begun_s = loop.time()
        writer.write(start)
        writing = None if write is None else asyncio.create_task(write(writer))
        try:
            async with asyncio.timeout(BOUND_S):
                status = await reader.read(12)
        except TimeoutError:
            self._judge.late(what, loop.time() - begun_s)
        except OSError:
            pass
        else:
            if status[9:10] == b"5":
                self._judge.find(f"{what} answered", repr(status))
        finally:
            if writing is not None:
                writing.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await writing
            writer.transport.abort()

    async def _never_read(self, what: str, requests: bytes) -> None:
        """Send requests and read nothing; then the connection must have ended, after what it had received."""
        loop = asyncio.get_running_loop()
        self._judge.counts["hostile connections"] += 1
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least that the system allows
        with client:
            try:
                await loop.sock_connect(client, ("127.0.0.1", self._port))
                begun_s = loop.time()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BOUND_S):
                        await loop.sock_sendall(client, requests)
                await asyncio.sleep(max(0, begun_s + BOUND_S - loop.time()))
                async with asyncio.timeout(5):
                    while await loop.sock_recv(client, 1 << 20):
                        pass
            except TimeoutError:
                self._judge.late(what, loop.time() - begun_s)
            except OSError:
                return  # reset: it was closed while answers were unread
