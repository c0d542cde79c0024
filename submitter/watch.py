"""Waits for tasks to end, through the ledger: no vendor is asked."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from submitter.ledger import Ledger
from submitter.task import SETTLED, Task


class SubmittedTask:
    """A task that the vendor has: as it was when it was submitted, and a way to wait for its end."""

    def __init__(self, task: Task, watch: "Watch") -> None:
        self.task = task
        self._watch = watch

    @property
    def external_task_id(self) -> str:
        """The id that the task has here and at the vendor."""
        return self.task.external_task_id

    async def result(self, timeout: float | None = None) -> Task:
        """Wait until the task is `succeed`, `failed` or `abandoned`, and return it.

        Waits for the callback through the ledger and asks the vendor nothing. Raises
        TimeoutError after `timeout` seconds; the task goes on.
        """
        if self.task.status in SETTLED:
            return self.task
        async with asyncio.timeout(timeout):
            return await self._watch.settled(self.external_task_id)


class Watch:
    """Waits for many tasks with one question to the ledger at each of its changes."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, list[asyncio.Future[Task]]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def settled(self, external_task_id: str) -> Task:
        """Return the task once it is settled; raise TaskNotFound."""
        await self._ledger.get(external_task_id)
        future: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(external_task_id, []).append(future)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                mark = self._ledger.mark()
                self._settle(await self._ledger.get_many(list(self._waiting)))
                if self._waiting:
                    await self._ledger.changed(mark, 1.0)
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            for futures in self._waiting.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            self._waiting.clear()

    def _settle(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            futures = self._waiting[task.external_task_id]
            if task.status in SETTLED:
                for future in futures:
                    if not future.done():
                        future.set_result(task)
            if task.status in SETTLED or all(future.done() for future in futures):
                del self._waiting[task.external_task_id]

    async def close(self) -> None:
        """Stop waiting."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
