"""Group commit: many callers' operations in one transaction, by one thread.

One thread writes. It takes whatever operations were gathered and commits them together, so that
many callers share one fsync; each is answered after it.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from submitter.errors import LedgerUnavailable, RelayError
from submitter.task import Decide

GROUP_MAX = 512


class Operation(msgspec.Struct):
    """One waiting caller: either `run` or (`external_task_id`, `decide`)."""

    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    run: Callable[[sqlite3.Connection], Any] | None = None
    external_task_id: str = ""
    decide: Decide | None = None
    outcome: Any = None


class GroupWriter:
    """The writing thread of one SQLite connection. `apply_all` decides and stores a group's decisions."""

    def __init__(
        self,
        db: sqlite3.Connection,
        name: str,
        *,
        apply_all: Callable[[sqlite3.Connection, list[Operation]], None],
        on_commit: Callable[[], None],
    ) -> None:
        self._db = db
        self._name = name
        self._apply_all = apply_all
        self._on_commit = on_commit
        self._gathered: list[Operation] = []
        self._writing = False
        self._groups: queue.SimpleQueue[list[Operation] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_loop, name="ledger-write", daemon=True)
        self._thread.start()

    def submit(
        self,
        *,
        run: Callable[[sqlite3.Connection], Any] | None = None,
        external_task_id: str = "",
        decide: Decide | None = None,
    ) -> "asyncio.Future[Any]":
        """Have `run`, or `decide` for a task, done in the next transaction; the future is its answer."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._gathered and not self._writing:
            loop.call_soon(self._hand_over, loop, 0)
        self._gathered.append(Operation(future, loop, run, external_task_id, decide))
        return future

    def _hand_over(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Give the writer what was gathered, once the loop has no more callers ready.

        A writer that wakes for each operation would fight the loop for the interpreter lock,
        and commit groups of one. One group is written at a time; the next gathers meanwhile.
        """
        if seen < len(self._gathered) < GROUP_MAX:
            loop.call_soon(self._hand_over, loop, len(self._gathered))
        elif self._gathered and not self._writing:
            self._writing = True
            self._groups.put(self._gathered)
            self._gathered = []

    def _write_loop(self) -> None:
        while (group := self._groups.get()) is not None:
            self._commit(group)
            self._answer(group)

    def _commit(self, group: list[Operation]) -> None:
        try:
            with transaction(self._db) as db:
                for operation in group:
                    if operation.run is not None:
                        operation.outcome = _outcome(operation.run, db)
                self._apply_all(db, [operation for operation in group if operation.decide is not None])
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller is told and the thread lives
            if len(group) > 1:  # one that cannot be stored must not take the others with it
                for operation in group:
                    self._commit([operation])
            elif isinstance(error, sqlite3.Error):
                group[0].outcome = LedgerUnavailable(f"the ledger {self._name!r} cannot be written: {error}")
            else:
                group[0].outcome = error

    def _answer(self, group: list[Operation]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation]] = {}
        for operation in group:
            by_loop.setdefault(operation.loop, []).append(operation)
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._resolve, operations)
            except RuntimeError:  # the loop ended while we wrote: nobody waits any more
                self._writing = False

    def _resolve(self, operations: list[Operation]) -> None:
        for operation in operations:
            if operation.future.done():
                continue
            if isinstance(operation.outcome, Exception):
                operation.future.set_exception(operation.outcome)
            else:
                operation.future.set_result(operation.outcome)
        self._on_commit()
        self._writing = False
        if self._gathered:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._hand_over, loop, 0)

    async def close(self) -> None:
        """Write what was gathered, and end the thread."""
        self._groups.put(self._gathered)
        self._groups.put(None)  # the end
        await asyncio.to_thread(self._thread.join)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Begin a transaction that is committed, or rolled back, with the block."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _outcome(run: Callable[[sqlite3.Connection], Any], db: sqlite3.Connection) -> Any:
    try:
        return run(db)
    except RelayError as error:
        return error
