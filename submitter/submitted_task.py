"""Waits for tasks to settle by watching the ledger; sends no request to a vendor."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from submitter.clock import Clock
from submitter.ledger.base import Tasks
from submitter.task import SETTLED, Task


class SubmittedTask:
    """A submitted task: a snapshot from its submission, and `result` to wait for its end."""

    def __init__(self, task: Task, watch: "Watch") -> None:
        self.task = task
        self._watch = watch

    @property
    def external_task_id(self) -> str:
        """The idempotency key: the task's id in this ledger and, if the vendor supports it, at the vendor."""
        return self.task.external_task_id

    async def result(self, timeout: float | None = None) -> Task:
        """Wait until the task is `succeed`, `failed`, `refused` or `abandoned`, and return it.

        Watches the ledger and sends the vendor no query. Raises TimeoutError after `timeout` seconds; the
        task itself continues.
        """
        if self.task.status in SETTLED:
            return self.task
        async with self._watch.clock.timeout(timeout):
            return await self._watch.settled(self.external_task_id)


class Watch:
    """Batches concurrent waits: reads all awaited tasks with one query at each change of the ledger."""

    def __init__(self, ledger: Tasks, clock: Clock) -> None:
        self._ledger = ledger
        self.clock = clock
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
                version = self._ledger.version()
                self._settle(await self._ledger.get_many(list(self._waiting)))
                if self._waiting:
                    await self.clock.wait_for_change(self._ledger, version, 1.0)
        except Exception as error:  # noqa: BLE001 - every waiting caller gets the error
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
        """Cancel the background task."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
