"""Batches concurrent calls: many callers share one round trip to the database."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Collects items while a batch is handled, then passes up to `max_batch` of them to `handle`.

    Batches are handled one at a time. `handle` returns a result or an exception for each item, in
    the items' order. If it raises, every caller of that batch gets the exception.
    """

    def __init__(self, handle: Callable[[Sequence[T]], Awaitable[Sequence[R | BaseException]]], max_batch: int) -> None:
        self._handle = handle
        self._max_batch = max_batch
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._handling: asyncio.Task[None] | None = None

    async def submit(self, item: T) -> R:
        """Add an item to the next batch; return its result, or raise its exception."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._handling is None:
            self._handling = asyncio.create_task(self._run())
        return await future

    async def finish(self) -> None:
        """Wait until every submitted item is handled."""
        while self._handling is not None:
            await asyncio.wait({self._handling})

    async def _run(self) -> None:
        await asyncio.sleep(0)  # callers that are ready now join the first batch
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            results: Sequence[R | BaseException]
            try:
                results = await self._handle([item for item, _ in batch])
            except BaseException as error:  # noqa: BLE001 - raised to the callers of this batch
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._handling = None
