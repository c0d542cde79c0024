"""Copying and pruning in SQLite. Each function runs inside the ledger's transaction."""

import sqlite3
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from submitter.ledger.base import Delivery, Record
from submitter.ledger.sqlite.deliveries import SELECT_DELIVERIES, read_delivery, read_event
from submitter.task import SETTLED, Task

IN = "(SELECT value FROM json_each(?))"

# Ended tasks last updated before a given time that have no event in the outbox and no due delivery.
PRUNABLE = f"""
SELECT external_task_id FROM tasks AS t
WHERE is_open = 0 AND status IN ({", ".join(f"'{status.value}'" for status in sorted(SETTLED))})
AND json_extract(doc, '$.updated_at_ms') < ?
AND NOT EXISTS (
    SELECT 1 FROM events AS e LEFT JOIN deliveries AS d ON d.event_seq = e.seq AND d.state = 'due'
    WHERE e.external_task_id = t.external_task_id AND (d.id IS NOT NULL OR e.seq > (SELECT upto FROM routed))
)
ORDER BY created_at_ms LIMIT ?
"""


def read_ids(db: sqlite3.Connection, after_id: str | None, limit: int) -> list[str]:
    """Return a page of task ids, sorted."""
    statement = (
        "SELECT external_task_id FROM tasks WHERE ?1 IS NULL OR external_task_id > ?1"
        " ORDER BY external_task_id LIMIT ?2"
    )
    return [row[0] for row in db.execute(statement, (after_id, limit))]


def read(db: sqlite3.Connection, external_task_ids: Sequence[str]) -> list[Record]:
    """Return tasks with their events and deliveries, in the order of the ids."""
    ids = msgspec.json.encode(external_task_ids).decode()
    statement = f"SELECT external_task_id, doc, poll_at_ms FROM tasks WHERE external_task_id IN {IN}"
    tasks = {id: (doc, poll_at_ms) for id, doc, poll_at_ms in db.execute(statement, (ids,))}
    events, deliveries = defaultdict(list), defaultdict(list)
    for row in db.execute(
        "SELECT id, type, external_task_id, sequence, time_ms, body FROM events"
        f" WHERE external_task_id IN {IN} ORDER BY external_task_id, sequence",
        (ids,),
    ):
        event = read_event(row)
        events[event.external_task_id].append(event)
    for row in db.execute(f"{SELECT_DELIVERIES} WHERE e.external_task_id IN {IN} ORDER BY e.sequence, d.hook", (ids,)):
        delivery = msgspec.structs.replace(read_delivery(row), id=0)
        deliveries[delivery.event.external_task_id].append(delivery)
    decode = msgspec.json.Decoder(Task).decode
    return [Record(decode(tasks[id][0]), tasks[id][1], events[id], deliveries[id]) for id in external_task_ids]


def write_events(db: sqlite3.Connection, records: Sequence[Record]) -> None:
    """Store the events and deliveries of records; their tasks are stored already. The outbox is empty afterwards."""
    for record in records:
        seqs: dict[int, int | None] = {}
        for event in record.events:
            seqs[event.sequence] = db.execute(
                "INSERT INTO events (external_task_id, sequence, id, type, time_ms, body) VALUES (?, ?, ?, ?, ?, ?)",
                (event.external_task_id, event.sequence, event.id, event.type, event.time_ms, event.body.decode()),
            ).lastrowid
        db.executemany(
            "INSERT INTO deliveries (event_seq, hook, state, attempts, due_at_ms, last_error)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [_delivery_row(delivery, seqs[delivery.event.sequence]) for delivery in record.deliveries],
        )
    db.execute("UPDATE routed SET upto = (SELECT coalesce(max(seq), 0) FROM events)")


def _delivery_row(delivery: Delivery, seq: int | None) -> tuple[object, ...]:
    return seq, delivery.hook, delivery.state, delivery.attempts, delivery.due_at_ms, delivery.last_error


def prune(db: sqlite3.Connection, before_ms: int, limit: int) -> int:
    """Delete up to `limit` ended tasks last updated before `before_ms`, and old quarantined bodies."""
    found = [row[0] for row in db.execute(PRUNABLE, (before_ms, limit))]
    ids = msgspec.json.encode(found).decode()
    of_tasks = f"(SELECT seq FROM events WHERE external_task_id IN {IN})"
    db.execute(f"DELETE FROM deliveries WHERE event_seq IN {of_tasks}", (ids,))
    for table in ("events", "tasks"):
        db.execute(f"DELETE FROM {table} WHERE external_task_id IN {IN}", (ids,))
    db.execute("DELETE FROM quarantine WHERE received_at_ms < ?", (before_ms,))
    return len(found)
