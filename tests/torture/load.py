"""A steady load of signed callbacks, each repeated until it is answered 2xx as vendors do, and the answers to it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import msgspec

from tests.torture.parts import Round

ANSWER_S = 15.0
"""Longer than the receiver may take to store a callback."""

CONNECTIONS = 64
REPEAT_S = 1.0
STATUSES = ("processing", "succeeded")


class Answer(msgspec.Struct, frozen=True):
    """The answer to one request; a `status` of 0 means that there was none."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b""

    @property
    def is_accepted(self) -> bool:
        return 200 <= self.status < 300


class Callback(msgspec.Struct, frozen=True):
    """A callback about the task `number`, as bytes to send."""

    number: int
    status: str
    request: bytes

    @property
    def name(self) -> str:
        return f"b-{self.number} {self.status}"


async def exchange(port: int, request: bytes) -> Answer:
    """Send a request on a connection of this request alone, and return its answer."""
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                return Answer(int(lines[0].split(" ")[1]), headers, body)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Answer(0)


async def get(port: int, path: str) -> Answer:
    """Request a path of the receiver."""
    return await exchange(port, f"GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n".encode())


class Load:
    """Sends one callback after the other at a steady rate; each is repeated until it is answered 2xx.

    `phase` names what happens to the receiver meanwhile. `may_be_unanswered` is set while it is restarted.
    """

    def __init__(self, port: int, rate: float, make: Callable[[int, str], bytes]) -> None:
        self.port = port
        self._pause_s = 1 / rate
        self.make = make
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._sending: set[asyncio.Task[None]] = set()
        self._resumed = asyncio.Event()
        self._resumed.set()
        self.phase = "healthy"
        self.may_be_unanswered = False
        self.sent: set[str] = set()
        self.accepted: set[str] = set()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.took_s: list[float] = []
        """From the first request of each accepted callback to its answer."""

        self.unclear: list[str] = []
        """Answers that a vendor must not get, each in a sentence."""

    def callbacks(self) -> Iterator[Callback]:
        number = 0
        while True:
            for status in STATUSES:
                yield Callback(number, status, self.make(number, status))
            number += 1

    async def run(self) -> None:
        """Send until this is cancelled."""
        for callback in self.callbacks():
            await self._resumed.wait()
            self.sent.add(callback.name)
            sending = asyncio.create_task(self._deliver(callback))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
            await asyncio.sleep(self._pause_s)

    async def pause(self) -> None:
        """Send no new callback; return when every earlier one is accepted."""
        self._resumed.clear()
        await self.drain()

    async def drain(self, timeout_s: float = 60) -> None:
        """Return when every callback that was begun before is accepted."""
        if self._sending:
            _, left = await asyncio.wait(set(self._sending), timeout=timeout_s)
            if left:
                self.unclear.append(f"{len(left)} callbacks were still refused {timeout_s:g} s after the last fault")
                for sending in left:
                    sending.cancel()
                await asyncio.wait(left)

    def resume(self) -> None:
        self._resumed.set()

    async def _deliver(self, callback: Callback) -> None:
        begun_s = time.monotonic()
        while True:
            async with self._slots:
                phase, may_be_unanswered = self.phase, self.may_be_unanswered
                answer = await exchange(self.port, callback.request)
            self.answers[phase, answer.status] += 1
            if answer.is_accepted:
                self.accepted.add(callback.name)
                self.took_s.append(time.monotonic() - begun_s)
                return
            self._judge(callback, answer, phase, may_be_unanswered or self.may_be_unanswered)
            await asyncio.sleep(REPEAT_S)

    def _judge(self, callback: Callback, answer: Answer, phase: str, may_be_unanswered: bool) -> None:
        if answer.status == 0:
            if not may_be_unanswered:
                self.unclear.append(f"{phase}: the callback {callback.name} got no answer within {ANSWER_S:g} s")
        elif answer.status != 503:
            shown = answer.body[:200].decode(errors="replace")
            self.unclear.append(f"{phase}: the callback {callback.name} was answered {answer.status} {shown}")
        elif "retry-after" not in answer.headers:
            self.unclear.append(f"{phase}: the callback {callback.name} was answered 503 without Retry-After")


class Damaged(Exception):
    """A store cannot be read any more, or holds what contradicts itself."""


class Stored(msgspec.Struct):
    """What a store holds: each task's status, and each event as (id, external_task_id, type)."""

    statuses: dict[str, str]
    events: list[tuple[str, str, str]]


def judge(done: Round, load: Load, stored: Stored, arrived: list[dict[str, object]]) -> None:
    """Compare what was accepted with what is stored, and what is stored with what arrived at the hook."""
    done.findings += _few(load.unclear)
    types: dict[str, list[str]] = {}
    for _, task, kind in stored.events:
        types.setdefault(task, []).append(kind)
    ranks = {"processing": ("processing", "succeed"), "succeeded": ("succeed",)}
    lost, invented = [], []
    for name in sorted(load.accepted):
        task, _, status = name.partition(" ")
        held = stored.statuses.get(task)
        expected = ranks[status]
        if held not in expected or not {f"task.{one}" for one in expected} & set(types.get(task, [])):
            lost.append(f"lost: {name} was answered 2xx, and the store holds {held} with the events {types.get(task)}")
    for task, kinds in types.items():
        unsent = [
            kind for kind in kinds if f"{task} {kind.removeprefix('task.').replace('ceed', 'ceeded')}" not in load.sent
        ]
        if unsent or len(set(kinds)) < len(kinds):
            invented.append(f"invented: the events of {task} are {kinds}")
    done.findings += _few(lost) + _few(invented)
    known = {id: (task, kind) for id, task, kind in stored.events}
    seen = {str(event["id"]): (event["subject"], event["type"]) for event in arrived}
    missing = [f"the event {id} of {known[id][0]} never arrived at the hook" for id in known if id not in seen]
    strange = [
        f"the hook got {id} {what}, which is not in the store" for id, what in seen.items() if known.get(id) != what
    ]
    done.findings += _few(missing) + _few(strange)
    done.counts["callbacks accepted"] += len(load.accepted)
    done.counts["events"] += len(known)
    done.counts["deliveries"] += len(arrived)
    for (_, answered), count in load.answers.items():
        done.counts[f"answers {answered}" if answered else "no answer"] += count


def _few(findings: list[str], limit: int = 5) -> list[str]:
    """Return the first of many findings of one kind, and how many there are."""
    more = len(findings) - limit
    return [*findings[:limit], *([f"... and {more} more like these"] if more > 0 else [])]
