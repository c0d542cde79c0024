"""Events that are sent at the same moment share a request, where the bus takes several at once.

Each still has an outcome of its own. Nothing waits for a batch to fill: what was handed over in
one turn of the event loop goes out in the next. A task's events are handed over one after the
other, so a batch that is taken in part changes no task's order.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import msgspec

from receiver.destinations.base import Outcome
from submitter.event import Event

ENVELOPE_BYTES = 512
"""What attributes, keys and ids add to an event's body, at most."""

Post = Callable[[list[Event], float], Awaitable[list[Outcome]]]
"""Sends some events as one request, now (Unix seconds), and returns each one's outcome, in their order."""


class Limits(msgspec.Struct, frozen=True):
    """What a bus takes: bytes of an event, events and bytes of a request."""

    event_bytes: int
    events: int
    request_bytes: int


class _Entry(msgspec.Struct, frozen=True):
    event: Event
    now_s: float
    outcome: asyncio.Future[Outcome]


class Batches:
    """Gathers what is sent in one turn of the event loop into as few requests as `limits` allow."""

    def __init__(self, post: Post, limits: Limits) -> None:
        self._post = post
        self._limits = limits
        self._waiting: list[_Entry] = []
        self._requests: set[asyncio.Task[None]] = set()

    async def send(self, event: Event, now_s: float) -> Outcome:
        """Send an event with what else is sent now; raise what `post` raised."""
        if size_of(event) > self._limits.event_bytes:
            return too_large(event, self._limits.event_bytes)
        loop = asyncio.get_running_loop()
        entry = _Entry(event, now_s, loop.create_future())
        self._waiting.append(entry)
        if len(self._waiting) == 1:
            loop.call_soon(self._begin)
        return await entry.outcome

    async def close(self) -> None:
        """Wait for the requests under way."""
        await asyncio.gather(*self._requests, return_exceptions=True)

    def _begin(self) -> None:
        waiting, self._waiting = [entry for entry in self._waiting if not entry.outcome.done()], []
        for entries in _cut(waiting, self._limits):
            request = asyncio.create_task(self._request(entries))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            for entry in entries:
                entry.outcome.add_done_callback(partial(_give_up, entries, request))

    async def _request(self, entries: list[_Entry]) -> None:
        try:
            outcomes = await self._post([entry.event for entry in entries], entries[0].now_s)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            for entry in entries:
                if not entry.outcome.done():
                    entry.outcome.set_exception(error)
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            if not entry.outcome.done():
                entry.outcome.set_result(outcome)


def size_of(event: Event) -> int:
    """Return how many bytes an event takes on a bus, at most."""
    return len(event.body) + ENVELOPE_BYTES


def too_large(event: Event, limit: int) -> Outcome:
    """Return the outcome of an event that is larger than a bus takes: no other attempt changes that."""
    return Outcome(False, f"too large: {size_of(event)} bytes, and {limit} is the most", is_final=True)


def _cut(entries: list[_Entry], limits: Limits) -> Iterator[list[_Entry]]:
    request: list[_Entry] = []
    size = 0
    for entry in entries:
        more = size_of(entry.event)
        if request and (len(request) == limits.events or size + more > limits.request_bytes):
            yield request
            request, size = [], 0
        request.append(entry)
        size += more
    if request:
        yield request


def _give_up(entries: list[_Entry], request: asyncio.Task[None], _: object) -> None:
    """Cancel a request once nobody waits for it any more: nothing runs behind its caller's back."""
    if all(entry.outcome.cancelled() for entry in entries):
        request.cancel()
