"""The quarantine in SQLite: bodies that could not be parsed. Each function runs on the ledger's connections."""

import sqlite3

from submitter.ledger.base import QUARANTINED_MAX, Quarantined

OLDER = """
FROM quarantine WHERE external_task_id = ?1 AND digest IN (
    SELECT digest FROM quarantine WHERE external_task_id = ?1 AND digest <> ?2
    ORDER BY received_at_ms DESC LIMIT -1 OFFSET ?3
)
"""


def add(db: sqlite3.Connection, entry: Quarantined) -> None:
    """Store a body; the same body of the same task is stored once, and counted. Older ones make room."""
    db.execute(
        "INSERT INTO quarantine (external_task_id, digest, vendor, received_at_ms, reason, body, times)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET times = times + excluded.times, received_at_ms = excluded.received_at_ms",
        (
            entry.external_task_id,
            entry.digest,
            entry.vendor,
            entry.received_at_ms,
            entry.reason,
            entry.body,
            entry.times,
        ),
    )
    older = (entry.external_task_id, entry.digest, QUARANTINED_MAX - 1)
    times = db.execute(f"SELECT sum(times) {OLDER}", older).fetchone()[0]
    if times:
        db.execute(f"DELETE {OLDER}", older)
        change = "UPDATE quarantine SET times = times + ? WHERE external_task_id = ? AND digest = ?"
        db.execute(change, (times, entry.external_task_id, entry.digest))


def find(db: sqlite3.Connection, limit: int, external_task_id: str | None) -> list[Quarantined]:
    """Return up to `limit` bodies, newest first; with an id, only those of that task."""
    statement = (
        "SELECT external_task_id, vendor, received_at_ms, reason, body, times FROM quarantine"
        " WHERE ?2 IS NULL OR external_task_id = ?2 ORDER BY received_at_ms DESC LIMIT ?1"
    )
    return [Quarantined(*row) for row in db.execute(statement, (limit, external_task_id))]
