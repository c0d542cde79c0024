"""The other side of the end-to-end benchmark: an HTTP/1.1 server for hooks that costs as little as it can.

It answers 204 and notes when each event arrived. It reads requests by `content-length`, as hooks send them.
"""

import asyncio
import time

ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class HookPeer:
    """Counts requests. `seen` is when each `webhook-id` arrived first, in seconds of time.perf_counter."""

    def __init__(self) -> None:
        self.seen: dict[bytes, float] = {}
        self.requests = 0
        self.first_s = 0.0
        self.last_s = 0.0
        self._wanted = 0
        self._done = asyncio.Event()

    async def wait_for(self, count: int, timeout_s: float) -> None:
        """Return after `count` requests in all; raise TimeoutError if they do not come."""
        self._wanted = count
        self._done.clear()
        if self.requests < count:
            async with asyncio.timeout(timeout_s):
                await self._done.wait()

    def arrived(self, head: bytes) -> None:
        self.requests += 1
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        id = head.partition(b"webhook-id: ")[2].partition(b"\r\n")[0]
        self.seen.setdefault(id, self.last_s)
        if self.requests == self._wanted:
            self._done.set()

    def protocol(self) -> asyncio.Protocol:
        return _Connection(self)


class _Connection(asyncio.Protocol):
    def __init__(self, peer: HookPeer) -> None:
        self._peer = peer
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while True:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            lower = head.lower()
            length = int(lower.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            self._peer.arrived(lower)
            self._transport.write(ANSWER)
