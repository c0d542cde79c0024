"""A lazy, reconnecting connection: opened on first use, kept between events, reopened after a failure."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class KeptConnection(Generic[T]):
    """A connection that `get` opens when there is none, and `drop` closes."""

    def __init__(self, connect: Callable[[], Awaitable[T]], disconnect: Callable[[T], Awaitable[None]]) -> None:
        self._connect = connect
        self._disconnect = disconnect
        self._connection: T | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> T:
        """Return the connection, opening it if needed; raise any error of `connect`."""
        async with self._opening:
            if self._connection is None:
                self._connection = await self._connect()
            return self._connection

    async def drop(self, connection: T | None = None) -> None:
        """Close the current connection, but only if it is `connection` (None: whichever it is)."""
        async with self._opening:
            dropped = self._connection
            if dropped is None or (connection is not None and dropped is not connection):
                return
            self._connection = None
        await self._disconnect(dropped)


async def race(broken: Awaitable[Any], work: Awaitable[T]) -> T:
    """Return the result of `work`; raise ConnectionError if `broken`, which signals a lost connection, ends first."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(broken)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionError("the connection broke before the server answered")
    finally:
        for future in (working, watching):
            future.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
