"""SQLite ledger: one embedded file in WAL mode, with group commit.

- One thread writes (`group_commit`). Another thread reads on a second connection, at the same time: WAL allows it.
- Statements are set-based, one step for a whole group: each step releases and takes the interpreter lock (GIL).
- `synchronous = FULL`: a commit is on disk before it is confirmed.
- Several processes may use one file. A write waits up to BUSY_TIMEOUT_S for another process's write lock.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import msgspec

from submitter.errors import LedgerUnavailable, TaskNotFound
from submitter.event import Event
from submitter.ledger.base import (
    AHEAD_MAX_MS,
    Applied,
    Claimed,
    Delivery,
    DeliveryState,
    Disabled,
    HookState,
    Quarantined,
    Record,
    Reserved,
    Settlement,
    Subscription,
)
from submitter.ledger.decide import decide_all
from submitter.ledger.sqlite import deliveries as delivery_sql
from submitter.ledger.sqlite import quarantine as quarantine_sql
from submitter.ledger.sqlite import records as record_sql
from submitter.ledger.sqlite.deliveries import read_event
from submitter.ledger.sqlite.group_commit import GroupWriter, Operation
from submitter.ledger.sqlite.migrations import migrate
from submitter.ledger.sqlite.rows import execute_rows
from submitter.task import Task, TaskStatus
from submitter.transition import Decide

BUSY_TIMEOUT_S = 5.0  # a callback waits for the group before its own, and for its own
CHECK_EVERY_S = 0.05  # how often a waiter looks for another process's commit

T = TypeVar("T")
_tasks = msgspec.json.Decoder(Task)

READ_TASKS = """
SELECT group_concat(doc, char(10)) FROM tasks
WHERE external_task_id IN (SELECT value FROM json_each(?))
"""
UPDATE_TASKS = """
UPDATE tasks SET status = column2, is_open = column3, poll_at_ms = column4, doc = column5
FROM (VALUES {rows}) WHERE external_task_id = column1
"""
UPDATE_VENDOR_IDS = """
UPDATE tasks SET vendor = column2, task_id = column3 FROM (VALUES {rows}) WHERE external_task_id = column1
"""
INSERT_EVENTS = "INSERT INTO events (external_task_id, sequence, id, type, time_ms, body) VALUES {rows}"


class SqliteLedger:
    """The `Ledger` protocol on one SQLite file."""

    def __init__(self, path: str | Path) -> None:
        self._path = os.path.abspath(path)  # a link stays one: the file that it leads to may not change
        try:
            with ExitStack() as opened:  # closes all connections if one fails
                connections = [opened.enter_context(closing(_connect(self._path))) for _ in range(3)]
                migrate(connections[0])
                opened.pop_all()
            self._write_connection, self._read_connection, self._version_connection = connections
        except sqlite3.Error as error:
            remedy = "its folder must exist and be writable"
            if Path(self._path).exists():
                remedy = "it must be a SQLite database that this user may write"
            raise LedgerUnavailable(f"could not open the ledger {self._path!r} ({error}); {remedy}") from error
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ledger-read")
        self._committed: asyncio.Event | None = None
        self._closed = False
        self._writer = GroupWriter(
            self._write_connection, self._path, apply_all=_apply_all, on_commit=self._wake_waiters
        )

    # -- state changes ------------------------------------------------------------------------

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        applied: Applied = await self._writer.submit(external_task_id=external_task_id, decide=decide)
        return applied

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        def run(db: sqlite3.Connection) -> Reserved | None:
            row = db.execute("SELECT doc FROM tasks WHERE external_task_id = ?", (task.external_task_id,)).fetchone()
            if row is not None:
                return Reserved(_tasks.decode(row[0]), is_new=False)
            if slots is not None and _open_tasks(db, task.vendor) >= slots:
                return None
            _insert(db, task, task.poll_at_ms)
            return Reserved(task, is_new=True)

        return await self._write(run)

    # -- reads --------------------------------------------------------------------------------

    async def get(self, external_task_id: str) -> Task:
        found = await self.get_many([external_task_id])
        if not found:
            raise TaskNotFound(external_task_id)
        return found[0]

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        ids = msgspec.json.encode(list(external_task_ids)).decode()
        return await self._read(lambda db: _read_tasks(db, ids))

    async def tasks(
        self, *, status: TaskStatus | None = None, vendor: str | None = None, before_id: str | None = None, limit: int
    ) -> list[Task]:
        conditions, values = ["true"], []
        for column, value in (("status", status and status.value), ("vendor", vendor)):
            if value is not None:
                conditions.append(f"{column} = ?")
                values.append(value)
        if before_id is not None:
            conditions.append(
                "(created_at_ms, external_task_id) <"
                " (SELECT created_at_ms, external_task_id FROM tasks WHERE external_task_id = ?)"
            )
            values.append(before_id)
        sql = (
            f"SELECT doc FROM tasks WHERE {' AND '.join(conditions)}"
            " ORDER BY created_at_ms DESC, external_task_id DESC LIMIT ?"
        )
        found = await self._read(lambda db: [_tasks.decode(row[0]) for row in db.execute(sql, (*values, limit))])
        if not found and before_id is not None:
            await self.get(before_id)
        return found

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        sql = (
            "SELECT doc FROM tasks WHERE task_id IS NOT NULL AND vendor = ?"
            " AND task_id IN (SELECT value FROM json_each(?))"
        )
        ids = msgspec.json.encode(list(task_ids)).decode()
        return await self._read(lambda db: [_tasks.decode(row[0]) for row in db.execute(sql, (vendor, ids))])

    async def open_tasks(self, vendor: str) -> int:
        return await self._read(lambda db: _open_tasks(db, vendor))

    async def events(self, external_task_id: str) -> list[Event]:
        sql = (
            "SELECT id, type, external_task_id, sequence, time_ms, body FROM events"
            " WHERE external_task_id = ? ORDER BY sequence"
        )
        return await self._read(lambda db: [read_event(row) for row in db.execute(sql, (external_task_id,))])

    # -- polls --------------------------------------------------------------------------------

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        def run(db: sqlite3.Connection) -> Claimed[Task]:
            db.execute("UPDATE tasks SET poll_at_ms = ? WHERE poll_at_ms > ?", (now_ms, now_ms + AHEAD_MAX_MS))
            rows = db.execute(
                "SELECT doc FROM tasks WHERE poll_at_ms <= ? ORDER BY poll_at_ms LIMIT ?", (now_ms, limit)
            ).fetchall()
            tasks = [_tasks.decode(row[0]) for row in rows]
            if tasks:
                ids = msgspec.json.encode([task.external_task_id for task in tasks]).decode()
                db.execute(
                    "UPDATE tasks SET poll_at_ms = ? WHERE external_task_id IN (SELECT value FROM json_each(?))",
                    (now_ms + lease_ms, ids),
                )
            next_due_ms = db.execute("SELECT min(poll_at_ms) FROM tasks WHERE poll_at_ms IS NOT NULL").fetchone()[0]
            return Claimed(tasks, next_due_ms)

        return await self._write(run)

    async def make_due(self, vendor: str, now_ms: int) -> int:
        sql = (
            "UPDATE tasks SET poll_at_ms = min(poll_at_ms, ?)"
            " WHERE is_open = 1 AND vendor = ? AND task_id IS NOT NULL AND poll_at_ms IS NOT NULL"
        )
        return await self._write(lambda db: db.execute(sql, (now_ms, vendor)).rowcount)

    # -- deliveries ---------------------------------------------------------------------------

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        return await self._write(lambda db: delivery_sql.claim(db, subscriptions, now_ms, lease_ms))

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        is_held: bool = await self._writer.submit(delivery=delivery, settlement=settlement)
        return is_held

    async def deliveries(self, *, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        return await self._read(lambda db: delivery_sql.find(db, hook, state, limit))

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None = None) -> int:
        return await self._write(lambda db: delivery_sql.replay(db, hook, now_ms, external_task_id))

    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        await self._write(lambda db: delivery_sql.pause(db, hook, until_ms, reason))

    async def hook_states(self, subscriptions: Iterable[Subscription]) -> list[HookState]:
        return await self._read(lambda db: delivery_sql.hook_states(db, subscriptions))

    # -- quarantine ---------------------------------------------------------------------------

    async def quarantine(self, entry: Quarantined) -> None:
        await self._write(lambda db: quarantine_sql.add(db, entry))

    async def quarantined(self, limit: int, external_task_id: str | None = None) -> list[Quarantined]:
        return await self._read(lambda db: quarantine_sql.find(db, limit, external_task_id))

    # -- copying, pruning, counts -------------------------------------------------------------

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        return await self._read(lambda db: record_sql.read_ids(db, after_id, limit))

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        return await self._read(lambda db: record_sql.read(db, external_task_ids))

    async def load(self, records: Sequence[Record]) -> None:
        def run(db: sqlite3.Connection) -> None:
            for record in records:
                _insert(db, record.task, record.poll_at_ms)
            record_sql.write_events(db, records)

        await self._write(run)

    async def disabled(self) -> list[Disabled]:
        sql = "SELECT hook, target, reason FROM disabled ORDER BY hook"
        return await self._read(lambda db: [Disabled(*row) for row in db.execute(sql)])

    async def disable(self, entry: Disabled) -> None:
        row = (entry.hook, entry.endpoint_fingerprint, entry.reason)
        await self._write(lambda db: db.execute("INSERT OR REPLACE INTO disabled VALUES (?, ?, ?)", row))

    async def prune(self, before_ms: int, limit: int) -> int:
        return await self._write(lambda db: record_sql.prune(db, before_ms, limit))

    async def counts(self) -> Mapping[str, int]:
        def run(db: sqlite3.Connection) -> dict[str, int]:
            counts = {
                f"task.{status}": n
                for status, n in db.execute("SELECT status, count(*) FROM tasks WHERE is_open = 1 GROUP BY status")
            }
            for state in ("due", "dead"):
                counts[f"delivery.{state}"] = db.execute(
                    f"SELECT count(*) FROM deliveries WHERE state = '{state}'"
                ).fetchone()[0]
            counts["quarantine"] = db.execute("SELECT count(*) FROM quarantine").fetchone()[0]
            return counts

        return await self._read(run)

    async def check_write(self) -> None:
        await self._write(lambda db: db.execute("UPDATE routed SET upto = upto"))

    # -- change notification ------------------------------------------------------------------

    def version(self) -> int:
        try:
            version: int = self._version_connection.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"could not read the ledger {self._path!r}: {error}") from error
        return version

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while self.version() == version and not self._closed:
            # This process's commits set the event. Other processes' commits change the file's data_version.
            left_s = CHECK_EVERY_S if deadline is None else min(CHECK_EVERY_S, deadline - loop.time())
            if left_s <= 0:
                return
            if self._committed is None or self._committed.is_set():
                self._committed = asyncio.Event()
            try:
                async with asyncio.timeout(left_s):
                    await self._committed.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._writer.close()
        await asyncio.to_thread(self._reader.shutdown)
        for connection in (self._write_connection, self._read_connection, self._version_connection):
            connection.close()

    # -- threads ------------------------------------------------------------------------------

    async def _write(self, run: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        result: T = await self._writer.submit(run=run)
        return result

    def _wake_waiters(self) -> None:
        if self._committed is not None:
            self._committed.set()

    async def _read(self, run: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, run, self._read_connection)
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"could not read the ledger {self._path!r}: {error}") from error


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S, cached_statements=512
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _apply_all(db: sqlite3.Connection, operations: list[Operation]) -> None:
    """Store the settlements of `operations`, and what their decisions change."""
    _settle_all(db, [operation for operation in operations if operation.delivery is not None])
    _decide_all(db, [operation for operation in operations if operation.decide is not None])


def _settle_all(db: sqlite3.Connection, operations: list[Operation]) -> None:
    settled = [(one.delivery, one.settlement) for one in operations if one.delivery and one.settlement]
    for operation, is_held in zip(operations, delivery_sql.settle_all(db, settled), strict=True):
        operation.outcome = is_held


def _decide_all(db: sqlite3.Connection, operations: list[Operation]) -> None:
    """Run the decisions of `operations`, and store the changed tasks and their events."""
    if not operations:
        return
    ids = msgspec.json.encode([operation.external_task_id for operation in operations]).decode()
    tasks = {task.external_task_id: task for task in _read_tasks(db, ids)}
    decided = decide_all(tasks, [(one.external_task_id, one.decide) for one in operations if one.decide is not None])
    for operation, outcome in zip(operations, decided.outcomes, strict=True):
        operation.outcome = outcome
    changed, events = decided.changed, decided.events
    # `vendor` and `task_id` are indexed and change rarely: they are updated only where they differ.
    moved = {
        id: task for id, task in changed.items() if (tasks[id].vendor, tasks[id].task_id) != (task.vendor, task.task_id)
    }
    if changed:
        execute_rows(db, UPDATE_TASKS, [_columns(task) for task in changed.values()])
    if moved:
        execute_rows(db, UPDATE_VENDOR_IDS, [(id, task.vendor, task.task_id) for id, task in moved.items()])
    if events:
        rows = [(e.external_task_id, e.sequence, e.id, e.type, e.time_ms, e.body.decode()) for e in events]
        execute_rows(db, INSERT_EVENTS, rows)


def _insert(db: sqlite3.Connection, task: Task, poll_at_ms: int | None) -> None:
    id, status, is_open, _, doc = _columns(task)
    db.execute(
        "INSERT INTO tasks (external_task_id, vendor, task_id, status, is_open, created_at_ms, poll_at_ms, doc)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (id, task.vendor, task.task_id, status, is_open, task.created_at_ms, poll_at_ms, doc),
    )


def _columns(task: Task) -> tuple[str, str, int, int | None, str]:
    """Return a task's columns external_task_id, status, is_open, poll_at_ms, doc."""
    is_open = int(task.is_open)
    doc = msgspec.json.encode(task).decode()
    return task.external_task_id, task.status.value, is_open, task.poll_at_ms, doc


def _read_tasks(db: sqlite3.Connection, ids: str) -> list[Task]:
    """Return the tasks of a JSON array of ids."""
    lines = db.execute(READ_TASKS, (ids,)).fetchone()[0]
    return _tasks.decode_lines(lines) if lines else []


def _open_tasks(db: sqlite3.Connection, vendor: str) -> int:
    count: int = db.execute("SELECT count(*) FROM tasks WHERE is_open = 1 AND vendor = ?", (vendor,)).fetchone()[0]
    return count
