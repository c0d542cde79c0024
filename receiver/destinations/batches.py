"""Batching: groups concurrent events into as few requests as the bus's limits allow.

A batch never waits to fill: events submitted in one turn of the event loop are sent in the next. Each event
gets its own outcome. A task's events are submitted one after the other, so a partially accepted batch does
not change their order.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import msgspec

from receiver.destinations.outcome import Outcome
from submitter.event import Event

ENVELOPE_BYTES = 512
"""The most that attributes, keys and ids add to an event's body."""

Post = Callable[[list[Event], float], Awaitable[list[Outcome]]]
"""Sends events as one request at the given time (Unix seconds); returns their outcomes in the same order."""


class BatchLimits(msgspec.Struct, frozen=True):
    """A bus's limits: bytes per event, events per request, bytes per request."""

    event_bytes: int
    events: int
    request_bytes: int


class _Pending(msgspec.Struct, frozen=True):
    event: Event
    now_s: float
    outcome: asyncio.Future[Outcome]


class Batches:
    """Sends all events of one turn of the event loop in batches within `limits`."""

    def __init__(self, post: Post, limits: BatchLimits) -> None:
        self._post = post
        self._limits = limits
        self._pending: list[_Pending] = []
        self._requests: set[asyncio.Task[None]] = set()

    async def send(self, event: Event, now_s: float) -> Outcome:
        """Send an event in the next batch; raise any error of `post`. Refuse it if it exceeds the event limit."""
        if size_of(event) > self._limits.event_bytes:
            return too_large(event, self._limits.event_bytes)
        loop = asyncio.get_running_loop()
        pending = _Pending(event, now_s, loop.create_future())
        self._pending.append(pending)
        if len(self._pending) == 1:
            loop.call_soon(self._flush)
        return await pending.outcome

    async def close(self) -> None:
        """Wait for the requests in flight."""
        await asyncio.gather(*self._requests, return_exceptions=True)

    def _flush(self) -> None:
        pending, self._pending = [entry for entry in self._pending if not entry.outcome.done()], []
        for batch in _split(pending, self._limits):
            request = asyncio.create_task(self._request(batch))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            for entry in batch:
                entry.outcome.add_done_callback(partial(_cancel_if_abandoned, batch, request))

    async def _request(self, batch: list[_Pending]) -> None:
        try:
            outcomes = await self._post([entry.event for entry in batch], batch[0].now_s)
        except Exception as error:  # noqa: BLE001 - every caller in the batch gets the error
            for entry in batch:
                if not entry.outcome.done():
                    entry.outcome.set_exception(error)
            return
        for entry, outcome in zip(batch, outcomes, strict=True):
            if not entry.outcome.done():
                entry.outcome.set_result(outcome)


def size_of(event: Event) -> int:
    """Return the most bytes that an event can take on a bus."""
    return len(event.body) + ENVELOPE_BYTES


def too_large(event: Event, limit: int) -> Outcome:
    """Return the permanent failure of an event that exceeds a bus's limit (bytes)."""
    return Outcome(False, f"too large: {size_of(event)} bytes, the limit is {limit}", is_final=True)


def _split(pending: list[_Pending], limits: BatchLimits) -> Iterator[list[_Pending]]:
    batch: list[_Pending] = []
    batch_bytes = 0
    for entry in pending:
        event_bytes = size_of(entry.event)
        if batch and (len(batch) == limits.events or batch_bytes + event_bytes > limits.request_bytes):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(entry)
        batch_bytes += event_bytes
    if batch:
        yield batch


def _cancel_if_abandoned(batch: list[_Pending], request: asyncio.Task[None], _: object) -> None:
    """Cancel a request after all its callers were cancelled, so that it does not run in the background."""
    if all(entry.outcome.cancelled() for entry in batch):
        request.cancel()
