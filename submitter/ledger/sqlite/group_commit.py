"""Group commit: one thread writes the operations of many callers in one transaction, with one fsync.

Each caller gets its result after the commit.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from submitter.errors import LedgerUnavailable, RelayError
from submitter.ledger.base import Delivery, Settlement
from submitter.transition import Decide

GROUP_MAX = 512  # a group of this size is handed over without waiting for more callers

PENDING_MAX = 1000
"""Above this many pending operations, those whose callers gave up are dropped.

A disk that hangs would otherwise be kept busy long after it is well again, with work that no caller waits for. Fewer
are written anyway: a callback that was answered too late is stored all the same.
"""


class Operation(msgspec.Struct):
    """A waiting caller's write: `decide` for the task `external_task_id`, `settlement` of `delivery`, or `run`."""

    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    run: Callable[[sqlite3.Connection], Any] | None = None
    external_task_id: str = ""
    decide: Decide | None = None
    delivery: Delivery | None = None
    settlement: Settlement | None = None
    outcome: Any = None


class GroupWriter:
    """The writer thread of one SQLite connection.

    `apply_all` runs a group's decisions and settlements and stores their results. They come before the group's other
    operations, so that a claim finds the events and settlements of its group. `on_commit` is called on the event loop
    after each group.
    """

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
        self._file = _identity(name)
        self._apply_all = apply_all
        self._on_commit = on_commit
        self._pending: list[Operation] = []
        self._drop_above = PENDING_MAX
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
        delivery: Delivery | None = None,
        settlement: Settlement | None = None,
    ) -> "asyncio.Future[Any]":
        """Add an operation to the next transaction; return the future of its result."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._pending and not self._writing:
            loop.call_soon(self._hand_over, loop, 0)
        self._pending.append(Operation(future, loop, run, external_task_id, decide, delivery, settlement))
        if len(self._pending) > self._drop_above:
            self._drop_abandoned()
        return future

    def _drop_abandoned(self) -> None:
        """Drop the pending operations whose callers no longer wait; look again when there are twice as many."""
        self._pending = [operation for operation in self._pending if not operation.future.done()]
        self._drop_above = max(PENDING_MAX, 2 * len(self._pending))

    def _hand_over(self, loop: asyncio.AbstractEventLoop, seen: int) -> None:
        """Pass the pending operations to the writer thread, once the loop has no more callers ready.

        A writer that wakes for each operation competes with the loop for the interpreter lock (GIL)
        and commits groups of one. One group is written at a time; the next one collects meanwhile.
        """
        if seen < len(self._pending) < GROUP_MAX:
            loop.call_soon(self._hand_over, loop, len(self._pending))
            return
        if len(self._pending) > PENDING_MAX:
            self._drop_abandoned()
        if self._pending and not self._writing:
            self._writing = True
            self._groups.put(self._pending)
            self._pending = []
            self._drop_above = PENDING_MAX

    def _write_loop(self) -> None:
        while (group := self._groups.get()) is not None:
            self._commit(group)
            self._return_outcomes(group)

    def _commit(self, group: list[Operation]) -> None:
        try:
            with transaction(self._db) as db:
                self._apply_all(db, [operation for operation in group if operation.run is None])
                for operation in group:
                    if operation.run is not None:
                        operation.outcome = _outcome(operation.run, db)
            if self._is_replaced():
                self._empty_log()
                raise Replaced("the file was moved, removed or replaced: restart this process")
        except Exception as error:  # noqa: BLE001 - raised to the caller; the thread must survive it
            if _is_about_the_file(error):  # no operation is to blame
                reason = LedgerUnavailable(f"could not write to the ledger {self._name!r}: {error}")
                for operation in group:
                    operation.outcome = reason
            elif len(group) > 1:  # commit one by one, so that a bad operation fails alone
                for operation in group:
                    self._commit([operation])
            elif isinstance(error, sqlite3.Error):
                group[0].outcome = LedgerUnavailable(f"could not write to the ledger {self._name!r}: {error}")
            else:
                group[0].outcome = error

    def _return_outcomes(self, group: list[Operation]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Operation]] = {}
        for operation in group:
            by_loop.setdefault(operation.loop, []).append(operation)
        for loop, operations in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._resolve, operations)
            except RuntimeError:  # the loop was closed during the write: no caller waits any more
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
        if self._pending:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._hand_over, loop, 0)

    async def close(self) -> None:
        """Write the pending operations, then stop the thread."""
        self._groups.put(self._pending)
        self._groups.put(None)  # stops the write loop
        await asyncio.to_thread(self._thread.join)
        if self._is_replaced():
            with suppress(sqlite3.Error):
                self._empty_log()

    def _is_replaced(self) -> bool:
        return _identity(self._name) != self._file

    def _empty_log(self) -> None:
        """Move the commits in the write-ahead log to the file that they belong to, wherever it is now.

        SQLite finds a log by its name. It would replay this one over the file that took this one's place.
        """
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Replaced(sqlite3.OperationalError):
    """The file is no longer where it was opened."""


_OF_THE_FILE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)


def _is_about_the_file(error: Exception) -> bool:
    """Return whether SQLite could not write at all: the file is locked, full, read-only, moved, ..."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # an extended code has its kind there
    return isinstance(error, Replaced) or code in _OF_THE_FILE


def _identity(path: str) -> tuple[int, int] | None:
    """Return what identifies the file at `path`; None if there is none.

    A commit into a file that was moved or replaced succeeds, and is lost: no name leads to it.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Run a block in a write transaction: commit at its end, roll back if it raises."""
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
