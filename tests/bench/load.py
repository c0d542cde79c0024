"""HTTP load generator: sends prepared requests over keep-alive connections, from another process than the server."""

import asyncio
import statistics
import time
from collections.abc import Iterator

import msgspec


class Load(msgspec.Struct, frozen=True):
    """The result of a run: responses per second, latencies in ms, number of responses other than 200."""

    per_s: float
    p50_ms: float
    p99_ms: float
    bad: int


class _Client(asyncio.Protocol):
    def __init__(self, requests: Iterator[bytes], run: "_Run") -> None:
        self._requests = requests
        self._run = run
        self._buffer = b""
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._run.ended()
            self._transport.close()
            return
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._is_complete():
            self._run.latencies.append(time.perf_counter() - self._sent_s)
            if not self._buffer.startswith(b"HTTP/1.1 200"):
                self._run.bad += 1
            self._buffer = b""
            self._next()

    def _is_complete(self) -> bool:
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return False
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            return body.endswith(b"0\r\n\r\n")
        length = lower.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return len(body) >= int(length or 0)


class _Run:
    def __init__(self, connections: int) -> None:
        self.latencies: list[float] = []
        self.bad = 0
        self._left = connections
        self.done = asyncio.get_running_loop().create_future()

    def ended(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set_result(None)


async def flood(host: str, port: int, requests: list[bytes], connections: int = 64) -> Load:
    """Closed loop: send all requests, the next on a connection once the previous is answered."""
    run = _Run(connections)
    source = iter(requests)
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: _Client(source, run), host, port)
    await run.done
    return _load(run, time.perf_counter() - begun)


async def drip(host: str, port: int, requests: list[bytes], per_s: float, sent_s: list[float] | None = None) -> Load:
    """Open loop: send requests at a steady rate. Latency counts from when a request was due.

    `sent_s` gets when each was due, in seconds of time.perf_counter.
    """
    latencies: list[float] = []
    bad = 0
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(64):
        free.put_nowait(await asyncio.open_connection(host, port))

    async def one(request: bytes, due: float) -> None:
        nonlocal bad
        reader, writer = await free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        if b"chunked" in lower:
            await reader.readuntil(b"0\r\n\r\n")
        else:
            await reader.readexactly(int(lower.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
        latencies.append(time.perf_counter() - due)
        bad += not head.startswith(b"HTTP/1.1 200")
        free.put_nowait((reader, writer))

    begun = time.perf_counter()
    tasks = []
    for i, request in enumerate(requests):
        due = begun + i / per_s
        if sent_s is not None:
            sent_s.append(due)
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(request, due)))
    await asyncio.gather(*tasks)
    elapsed = time.perf_counter() - begun
    while not free.empty():
        free.get_nowait()[1].close()
    run = _Run(1)
    run.latencies, run.bad = latencies, bad
    return _load(run, elapsed)


def _load(run: _Run, elapsed_s: float) -> Load:
    cuts = statistics.quantiles(run.latencies, n=100)
    return Load(len(run.latencies) / elapsed_s, cuts[49] * 1000, cuts[98] * 1000, run.bad)
