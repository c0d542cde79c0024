"""What a destination promises, and what those with a connection of their own share."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import msgspec

from submitter.errors import InvalidSettings, Problem
from submitter.event import Event

if TYPE_CHECKING:
    from receiver.hooks import Hook
    from submitter.clock import Clock
    from submitter.ledger.base import Ledger

T = TypeVar("T")


class Outcome(msgspec.Struct, frozen=True):
    """What became of one attempt.

    `is_gone` says that the destination asked for nothing more, ever; `is_final` that no other attempt
    with this event can end better. `retry_after_s` is the destination's wish.
    """

    is_delivered: bool
    answer: str
    retry_after_s: float | None = None
    is_gone: bool = False
    is_final: bool = False


class Destination(Protocol):
    """One kind of destination."""

    async def send(self, event: Event, now_s: float) -> Outcome:
        """Send one event once, and return when it was acknowledged or was not. Raises nothing of its own."""
        ...

    async def reach(self) -> str | None:
        """Return None when the destination can be reached, or why not; sends no event."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


@runtime_checkable
class UsesLedger(Protocol):
    """A destination that writes down what it did."""

    def use(self, ledger: "Ledger", clock: "Clock") -> None:
        """Take the ledger, before the first event."""
        ...


class Kept(Generic[T]):
    """A connection that is opened when it is first used, and anew after it was dropped."""

    def __init__(self, connect: Callable[[], Awaitable[T]], disconnect: Callable[[T], Awaitable[None]]) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._connection: T | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> T:
        """Return the connection; raise what connecting raises."""
        async with self._opening:
            if self._connection is None:
                self._connection = await self._connect()
            return self._connection

    async def drop(self, connection: T | None = None) -> None:
        """Close the connection, if it is still this one (None: whichever it is)."""
        async with self._opening:
            dropped = self._connection
            if dropped is None or (connection is not None and dropped is not connection):
                return
            self._connection = None
        await self._disconnect(dropped)


async def unless(broken: Awaitable[Any], work: Awaitable[T]) -> T:
    """Return what `work` returns; raise ConnectionError once `broken` ends: no answer will come then."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(broken)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionError("the connection broke before the server answered")
    finally:
        for one in (working, watching):
            one.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def failed(error: BaseException, *hidden: str | None) -> Outcome:
    """Return the outcome of an attempt that ended in `error`, with what is secret hidden."""
    name = type(error).__name__
    said = f"{name}: {str(error).removeprefix(f'{name}: ')}" if str(error) else name
    for secret in filter(None, hidden):
        said = said.replace(secret, "[hidden]")
    return Outcome(False, said[:500])


def wrong(hook: "Hook", field: str, value: str, limit: str, remedy: str) -> InvalidSettings:
    """Return the error of a hook whose table cannot be used."""
    return InvalidSettings([Problem(f"hook[{hook.name}].{field}", value, limit, remedy)])
