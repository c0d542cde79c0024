"""An HTTP/1.1 client on raw connections: sends prepared bytes, judges each answer, and expects each in time."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from tests.torture.forged import Hostile

BOUND_S = 15.0
"""In this time a connection must get its answer, or be closed."""

FINDINGS_MAX = 3
"""Findings of one kind that are reported; the others are counted."""


class Answer(msgspec.Struct, frozen=True):
    """A response: its status, its head, and where it ends in what was received."""

    status: int
    head: bytes
    end: int


def read_answer(received: bytes, start: int, *, is_head: bool) -> Answer | None:
    """Return the response that begins at `start`, or None if it is not complete. Interim ones (1xx) are skipped."""
    while True:
        end = received.find(b"\r\n\r\n", start)
        if end < 0:
            return None
        head = received[start:end]
        status = int(head[9:12])
        if status >= 200:
            break
        start = end + 4
    end += 4
    lower = head.lower()
    if is_head or status in (204, 304):
        return Answer(status, head, end)
    if b"transfer-encoding: chunked" in lower:
        last = received.find(b"0\r\n\r\n", end)
        return None if last < 0 else Answer(status, head, last + 5)
    length = int(lower.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
    return Answer(status, head, end + length) if len(received) >= end + length else None


class Judge:
    """Counts answers, and keeps the findings: at most a few of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._found: dict[str, list[str]] = {}

    def find(self, kind: str, evidence: str) -> None:
        """Keep a finding."""
        self._found.setdefault(kind, []).append(evidence)

    @property
    def findings(self) -> list[str]:
        """The first findings of each kind, and how many more there are."""
        lines = []
        for kind, evidence in self._found.items():
            lines += [f"{kind}: {one}" for one in evidence[:FINDINGS_MAX]]
            if len(evidence) > FINDINGS_MAX:
                lines.append(f"{kind}: {len(evidence) - FINDINGS_MAX} more")
        return lines

    def answered(self, request: Hostile, answer: Answer) -> None:
        """Judge one answer."""
        status = answer.status
        self.counts["requests"] += 1
        self.counts[f"answers {status}"] += 1
        if status == 503 and b"\r\nretry-after: " in answer.head.lower():
            return
        if status >= 500 or (request.allowed is not None and status not in request.allowed):
            self.find(f"{request.kind} answered {status}", f"{answer.head!r} to {shown(request.data)}")

    def closed(self, requests: Sequence[Hostile], *, refused: bool) -> None:
        """Count a connection that was closed before these were answered: bounds may do it."""
        self.counts["requests"] += len(requests)
        if requests:
            self.counts["closed without an answer"] += 1
            self.counts["closed though framed"] += requests[0].is_framed and not refused

    def late(self, what: str, seconds: float) -> None:
        """Judge a connection that was neither answered nor closed in time."""
        self.find("neither answered nor closed in time", f"{seconds:.1f} s after {what}")


def shown(data: bytes) -> str:
    """Return enough of a request to recognise it."""
    return repr(data) if len(data) < 900 else f"{data[:600]!r} ... {data[-100:]!r} ({len(data)} bytes)"


class Connection(asyncio.Protocol):
    """Sends a batch of requests at once; the next one when all are answered. `next_batch` returns [] at the end."""

    def __init__(self, judge: Judge, next_batch: Callable[[], Sequence[Hostile]], ended: Callable[[], None]) -> None:
        self._judge = judge
        self._next_batch = next_batch
        self._ended = ended
        self._waiting: deque[Hostile] = deque()
        self._received = b""
        self._refused = False
        self.since_s: float | None = None

    @property
    def what(self) -> str:
        """What was sent and is not answered, for a finding."""
        return shown(self._waiting[0].data) if self._waiting else "the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def _send(self) -> None:
        batch = self._next_batch()
        if not batch:
            self.since_s = None
            self.transport.close()
            return
        self._waiting.extend(batch)
        self.since_s = asyncio.get_running_loop().time()
        self.transport.write(b"".join([request.data for request in batch]))

    def data_received(self, data: bytes) -> None:
        received, start = self._received + data, 0
        while self._waiting:
            answer = read_answer(received, start, is_head=self._waiting[0].is_head)
            if answer is None:
                break
            self._refused = self._refused or answer.status in (400, 431)
            self._judge.answered(self._take(answer), answer)
            start = answer.end
            self.since_s = asyncio.get_running_loop().time()
        self._received = received[start:] if self._waiting else b""
        if not self._waiting:
            self._send()

    def _take(self, answer: Answer) -> Hostile:
        """Return the request that this answers. A malformed one is refused at once, before those in front of it."""
        if answer.status in (400, 431):
            for request in self._waiting:
                if request.allowed is None or answer.status in request.allowed:
                    self._waiting.remove(request)
                    return request
        return self._waiting.popleft()

    def connection_lost(self, exc: Exception | None) -> None:
        self.since_s = None
        self._judge.closed(self._waiting, refused=self._refused)
        self._ended()


class Crowd:
    """Connections of strangers, kept or for one request each. `sweep` finds those that wait for too long."""

    def __init__(self, port: int, judge: Judge) -> None:
        self._port = port
        self._judge = judge
        self._open: set[Connection] = set()

    async def keep(self, source: "deque[Hostile]", batch_sizes: Sequence[int], count: int) -> None:
        """Send framed requests on `count` kept connections, each in batches of these sizes; reopen closed ones."""
        await asyncio.gather(*(self._keep_one(source, batch_sizes) for _ in range(count)))

    async def _keep_one(self, source: "deque[Hostile]", batch_sizes: Sequence[int]) -> None:
        turn = 0

        def next_batch() -> list[Hostile]:
            nonlocal turn
            turn += 1
            return [source.popleft() for _ in range(min(batch_sizes[turn % len(batch_sizes)], len(source)))]

        while source:
            await self._run(next_batch)

    async def send_alone(self, requests: Sequence[Hostile], at_once: int) -> None:
        """Send each request on a connection to itself."""
        room = asyncio.Semaphore(at_once)

        async def one(request: Hostile) -> None:
            try:
                batches = iter([[request]])
                await self._run(lambda: next(batches, []))
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:
            for request in requests:
                await room.acquire()
                group.create_task(one(request))

    async def _run(self, next_batch: Callable[[], Sequence[Hostile]]) -> None:
        ended = asyncio.Event()
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._judge, next_batch, ended.set), "127.0.0.1", self._port
            )
        except OSError as error:
            self._judge.find("no connection", repr(error))
            await asyncio.sleep(0.1)  # the process may be gone: do not fill the memory with findings
            return
        self._open.add(connection)
        await ended.wait()
        self._open.discard(connection)

    async def sweep(self) -> None:
        """Find connections that wait for too long, until cancelled."""
        while True:
            await asyncio.sleep(1)
            now_s = asyncio.get_running_loop().time()
            for connection in list(self._open):
                if connection.since_s is not None and now_s - connection.since_s > BOUND_S:
                    self._judge.late(connection.what, now_s - connection.since_s)
                    connection.transport.abort()

    def close(self) -> None:
        """Close every connection, whatever it waits for."""
        for connection in list(self._open):
            connection.transport.abort()
