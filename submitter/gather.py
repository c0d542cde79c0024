"""What is asked for at the same moment is done together: one round trip, one fsync for many callers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Gather(Generic[T, R]):
    """Hands what was asked for in the meantime to `handle`, `most` at once; one call of it at a time.

    `handle` returns an answer, or an exception, for each item in its order. What it raises is
    raised to everyone whose item it was given.
    """

    def __init__(self, handle: Callable[[Sequence[T]], Awaitable[Sequence[R | BaseException]]], most: int) -> None:
        self._handle = handle
        self._most = most
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._handling: asyncio.Task[None] | None = None

    async def ask(self, item: T) -> R:
        """Return the answer to an item."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._handling is None:
            self._handling = asyncio.create_task(self._run())
        return await future

    async def finish(self) -> None:
        """Wait for what was asked for."""
        while self._handling is not None:
            await asyncio.wait({self._handling})

    async def _run(self) -> None:
        await asyncio.sleep(0)  # whoever is ready now comes along
        while self._waiting:
            taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            answers: Sequence[R | BaseException]
            try:
                answers = await self._handle([item for item, _ in taken])
            except BaseException as error:  # noqa: BLE001 - it belongs to those who asked
                answers = [error] * len(taken)
            for (_, future), answer in zip(taken, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, BaseException):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._handling = None
