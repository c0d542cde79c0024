"""A flood from processes beside the receiver: as many requests as its sockets take, and what was answered to them.

Each connection repeats requests of one kind, so that an answer is counted under its kind without reading more of it
than its status.
"""

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import msgspec
import uvloop

from tests.bench.servers import callback_body
from tests.torture.bodies import callback, path_of, post, signed
from tests.torture.raw_http import read_answer
from tests.torture.served import allow_open_files

DRAIN_S = 5.0
"""Answers to what was sent are awaited for this long after the flood."""

AGAIN_S = 0.02
"""A connection that was closed is opened again after this time."""

MADE = 480
"""Different requests of a kind."""

TARGETS = 100
"""Tasks of each prefix, `open` and `done`, that the requests are about."""

Make = Callable[[random.Random, float], bytes]


class Kind(msgspec.Struct, frozen=True):
    """One kind of connections: how many, how a request is made, how many are sent at once, what may answer them."""

    connections: int
    burst: int
    answers: frozenset[int]
    make: Make


def forged(random_: random.Random, now_s: float) -> bytes:
    number = random_.randrange(TARGETS)
    path = path_of("open", number, now_s)[:-16] + "".join(random_.choices("abcdefghijklmnop", k=16))
    body = callback_body("open", number, "succeeded", now_s)
    return post(path, signed(body, now_s), body)


def wrongly_signed(random_: random.Random, now_s: float) -> bytes:
    number = random_.randrange(TARGETS)
    body = callback_body("open", number, "succeeded", now_s)
    return post(path_of("open", number, now_s), signed(body, now_s, random_.randbytes(32)), body)


def replayed(random_: random.Random, now_s: float) -> bytes:
    return callback("done", random_.randrange(TARGETS), random_.choice(("processing", "succeeded")), now_s)


def unknown_path(random_: random.Random, now_s: float) -> bytes:
    return b"GET /%x/login.php HTTP/1.1\r\nhost: relay\r\nuser-agent: scanner\r\n\r\n" % random_.randrange(1 << 64)


def garbage(random_: random.Random, now_s: float) -> bytes:
    return b"POST /callbacks/a HTTP/1.1\r\nhost: relay\r\ncontent-length: %x\r\n\r\n" % random_.randrange(10, 16)


KINDS: Mapping[str, Kind] = {
    "forged": Kind(320, 8, frozenset({404}), forged),
    "forged, without an end": Kind(60, 100, frozenset({404}), forged),
    "wrongly signed": Kind(120, 4, frozenset({401}), wrongly_signed),
    "replayed": Kind(40, 4, frozenset({200}), replayed),
    "unknown path": Kind(100, 8, frozenset({404}), unknown_path),
    "garbage": Kind(40, 8, frozenset({400}), garbage),
}
SILENT, SLOW = 240, 40


START = b"HTTP/1.1 "


class Seen(msgspec.Struct):
    """What was sent and seen, by kind: requests, those that were cut off without an answer, answers by status."""

    sent: Counter[str] = msgspec.field(default_factory=Counter)
    cut: Counter[str] = msgspec.field(default_factory=Counter)
    answers: dict[str, Counter[int]] = msgspec.field(default_factory=dict)
    without_retry_after: int = 0
    connections: int = 0

    def add(self, other: "Seen") -> None:
        """Include what another generator saw."""
        self.sent += other.sent
        self.cut += other.cut
        for kind, statuses in other.answers.items():
            self.answers[kind] = self.answers.get(kind, Counter()) + statuses
        self.without_retry_after += other.without_retry_after
        self.connections += other.connections

    def answered(self, status: int, *kinds: str) -> int:
        """Return how many requests of these kinds (of all, if none is named) were answered with this status."""
        return sum(statuses[status] for kind, statuses in self.answers.items() if kind in kinds or not kinds)


class Stream(asyncio.Protocol):
    """A connection that sends a batch at once, and the next one when all of it is answered."""

    def __init__(self, kind: str, batches: Iterator[bytes], seen: Seen, may_send: Callable[[], bool]) -> None:
        self._kind, self._batches, self._seen, self._may_send = kind, batches, seen, may_send
        self._burst = KINDS[kind].burst
        self._answers = seen.answers.setdefault(kind, Counter())
        self._waiting = 0
        self._rest = b""
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._seen.connections += 1
        self._send()

    def _send(self) -> None:
        if not self._may_send():
            self._transport.close()
            return
        self._waiting += self._burst
        self._seen.sent[self._kind] += self._burst
        self._transport.write(next(self._batches))

    def data_received(self, data: bytes) -> None:
        received = self._rest + data
        *answers, last = received.split(START)[1:] or [b""]
        for answer in answers:  # each is complete, for the next one has begun
            self._count(answer)
        self._rest = START + last
        if read_answer(self._rest, 0, is_head=False) is not None:
            self._count(last)
            self._rest = b""
        if self._waiting <= 0:
            self._send()

    def _count(self, answer: bytes) -> None:
        status = int(answer[:3])
        self._waiting -= 1
        self._answers[status] += 1
        if status == 503 and b"\r\nretry-after: " not in answer:
            self._seen.without_retry_after += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._seen.cut[self._kind] += max(0, self._waiting)
        self.lost.set()


class Generator:
    """The connections of one process: its share of all. Each is opened again when it was closed."""

    def __init__(self, port: int, seed: int, share: float) -> None:
        self._port = port
        self._share = share
        self._random = random.Random(seed)
        self._is_over = False
        self.seen = Seen()

    async def run(self, seconds: float) -> None:
        """Flood for this time, then wait for the answers to what was sent."""
        now_s = time.time()
        start = b"POST %s HTTP/1.1\r\nx: " % path_of("open", 0, now_s).encode()
        works = [self._hold(b"") for _ in self._part_of(SILENT)]
        works += [self._hold(start) for _ in self._part_of(SLOW)]
        for name, kind in KINDS.items():
            made = [kind.make(self._random, now_s) for _ in range(MADE)]
            batches = [b"".join(self._random.choices(made, k=kind.burst)) for _ in range(MADE // kind.burst)]
            works += [self._stream(name, itertools.cycle(batches)) for _ in self._part_of(kind.connections)]
        running = [asyncio.create_task(work) for work in works]
        await asyncio.sleep(seconds)
        self._is_over = True
        await asyncio.wait(running, timeout=DRAIN_S)
        for one in running:
            one.cancel()
        await asyncio.wait(running)

    def _part_of(self, count: int) -> range:
        return range(math.ceil(count * self._share))

    async def _stream(self, kind: str, batches: Iterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_over:
            stream = Stream(kind, batches, self.seen, lambda: not self._is_over)
            with contextlib.suppress(OSError):
                await loop.create_connection(lambda: stream, "127.0.0.1", self._port)  # noqa: B023 - called at once
                await stream.lost.wait()
            await asyncio.sleep(AGAIN_S)

    async def _hold(self, start: bytes) -> None:
        """Keep a connection: silent, or with `start` and then a byte a second."""
        while not self._is_over:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(start)
                while not reader.at_eof() and not self._is_over:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1):
                            await reader.read(1000)
                    writer.write(b"a" if start else b"")
                writer.close()
            await asyncio.sleep(AGAIN_S)


def flood(port: int, seed: int, seconds: float, share: float) -> Seen:
    """Flood a port with this share of all connections, and return what was seen. Runs in a process beside others."""
    allow_open_files(4096)
    generator = Generator(port, seed, share)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(generator.run(seconds))
    return generator.seen
