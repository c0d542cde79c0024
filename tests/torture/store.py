"""Reads a SQLite or PostgreSQL ledger by independent SQL: a check must not trust the code that it checks."""

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

TASKS = "SELECT external_task_id, vendor, status, task_id, doc FROM {0}tasks ORDER BY created_at_ms, external_task_id"
EVENTS = "SELECT seq, external_task_id, sequence, id, type, time_ms, body FROM {0}events ORDER BY seq"
DELIVERIES = "SELECT event_seq, hook, state, attempts FROM {0}deliveries"


class StoredTask(msgspec.Struct, frozen=True):
    external_task_id: str
    vendor: str
    status: str
    task_id: str | None
    doc: dict[str, Any]


class StoredEvent(msgspec.Struct, frozen=True):
    seq: int
    external_task_id: str
    sequence: int
    id: str
    type: str
    time_ms: int
    body: str


class StoredDelivery(msgspec.Struct, frozen=True):
    event_seq: int
    hook: str
    state: str
    attempts: int


class Stored(msgspec.Struct, frozen=True):
    """Everything that a ledger has stored; `unrouted` is the number of events in the outbox."""

    tasks: dict[str, StoredTask]
    events: list[StoredEvent]
    deliveries: list[StoredDelivery]
    unrouted: int

    @property
    def is_settled(self) -> bool:
        """Whether every task has ended, and every event was delivered or is a dead letter."""
        ended = {"succeed", "failed", "abandoned", "refused"}
        return (
            not self.unrouted
            and all(task.status in ended for task in self.tasks.values())
            and all(delivery.state != "due" for delivery in self.deliveries)
        )


async def read_store(ledger_url: str) -> Stored:
    """Read the ledger at a URL, in one transaction."""
    if ledger_url.startswith("sqlite:"):
        return _read_sqlite(Path(ledger_url.removeprefix("sqlite:///")))
    return await _read_postgres(ledger_url)


def _read_sqlite(path: Path) -> Stored:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")
        (upto,) = db.execute("SELECT upto FROM routed").fetchone()
        (unrouted,) = db.execute("SELECT count(*) FROM events WHERE seq > ?", (upto,)).fetchone()
        return _stored(unrouted, *(db.execute(sql.format("")) for sql in (TASKS, EVENTS, DELIVERIES)))


async def _read_postgres(url: str) -> Stored:
    server, _, options = url.partition("?")
    schema = dict(one.split("=") for one in options.split("&"))["schema"]
    connection = await asyncpg.connect(server)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            rows = [await connection.fetch(sql.format(f'"{schema}".')) for sql in (TASKS, EVENTS, DELIVERIES)]
            unrouted = await connection.fetchval(f'SELECT count(*) FROM "{schema}".outbox')
        return _stored(unrouted, *rows)
    finally:
        await connection.close()


def _stored(unrouted: int, tasks: Iterable[Any], events: Iterable[Any], deliveries: Iterable[Any]) -> Stored:
    found = [StoredTask(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in tasks]
    return Stored(
        {task.external_task_id: task for task in found},
        [StoredEvent(*row) for row in events],
        [StoredDelivery(*row) for row in deliveries],
        unrouted,
    )
