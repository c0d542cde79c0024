"""Deliveries in SQLite: events become deliveries when a worker claims work, and are settled one by one.

Each function runs inside the ledger's transaction. Statements are set-based: see `sqlite`.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from submitter.event import Event
from submitter.ledger.base import Claimed, Delivery, DeliveryState, HookState, Route, Settlement

ROUTE_MAX = 1000

INSERT_DELIVERIES = """
INSERT INTO deliveries (event_seq, hook, state, due_at_ms, last_error)
SELECT seq, ?1, ?2, ?3, ?4 FROM events
WHERE seq > ?5 AND seq <= ?6 AND (?7 IS NULL OR type IN (SELECT value FROM json_each(?7)))
"""
SELECT_DELIVERIES = """
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM deliveries AS d JOIN events AS e ON e.seq = d.event_seq
"""


EARLIER_OF_THE_TASK = """
SELECT 1 FROM events AS e2 JOIN deliveries AS d2 ON d2.event_seq = e2.seq AND d2.hook = d.hook
WHERE e2.external_task_id = e.external_task_id AND e2.sequence < e.sequence AND d2.state = 'due'
"""


def claim(db: sqlite3.Connection, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
    """Make deliveries of events that have none, and claim what is due."""
    more = _route(db, routes, now_ms)
    claimed: list[Delivery] = []
    next_due = [now_ms] if more else []
    for route in routes:
        found = _claim(db, route, now_ms, lease_ms)
        claimed.extend(found)
        if len(found) < route.room:  # else its end wakes the caller
            row = db.execute(
                "SELECT d.due_at_ms FROM deliveries AS d JOIN events AS e ON e.seq = d.event_seq"
                f" WHERE d.state = 'due' AND d.hook = ? {_turn(route)} ORDER BY d.due_at_ms LIMIT 1",
                (route.hook,),
            ).fetchone()
            next_due.extend([] if row is None else [row[0]])
    return Claimed(claimed, min(next_due, default=None))


def settle(db: sqlite3.Connection, delivery: Delivery, settlement: Settlement) -> bool:
    """End a claim, if it is still held; disable the hook if its target said that it is gone."""
    held = db.execute(
        "UPDATE deliveries SET state = ?, due_at_ms = ?, last_error = ?"
        " WHERE id = ? AND attempts = ? AND state = 'due'",
        (settlement.state, settlement.due_at_ms, settlement.error, delivery.id, delivery.attempts),
    ).rowcount
    if settlement.disable_target is not None:
        db.execute(
            "INSERT OR REPLACE INTO disabled (hook, target, reason) VALUES (?, ?, ?)",
            (delivery.hook, settlement.disable_target, settlement.error),
        )
        db.execute(
            "UPDATE deliveries SET state = 'dead', last_error = ? WHERE hook = ? AND state = 'due'",
            (f"hook disabled: {settlement.error}", delivery.hook),
        )
    return bool(held)


def find(db: sqlite3.Connection, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
    """Return deliveries, the newest first."""
    sql = (
        f"{SELECT_DELIVERIES} WHERE (?1 IS NULL OR d.hook = ?1) AND (?2 IS NULL OR d.state = ?2)"
        " ORDER BY d.id DESC LIMIT ?3"
    )
    return [read_delivery(row) for row in db.execute(sql, (hook, state, limit))]


def replay(db: sqlite3.Connection, hook: str, now_ms: int, external_task_id: str | None) -> int:
    """Make dead letters due again, and enable the hook."""
    db.execute("DELETE FROM disabled WHERE hook = ?", (hook,))
    return db.execute(
        "UPDATE deliveries SET state = 'due', attempts = 0, due_at_ms = ?1"
        " WHERE hook = ?2 AND state = 'dead' AND (?3 IS NULL OR event_seq IN"
        " (SELECT seq FROM events WHERE external_task_id = ?3))",
        (now_ms, hook, external_task_id),
    ).rowcount


def pause(db: sqlite3.Connection, hook: str, until_ms: int | None, reason: str) -> None:
    """Note a pause, or its end."""
    if until_ms is None:
        db.execute("DELETE FROM paused WHERE hook = ?", (hook,))
    else:
        db.execute("INSERT OR REPLACE INTO paused VALUES (?, ?, ?)", (hook, until_ms, reason))


def hook_states(db: sqlite3.Connection, routes: Iterable[Route]) -> list[HookState]:
    """Return what is known of each hook."""
    counts = {
        (hook, state): count
        for hook, state, count in db.execute(
            "SELECT hook, state, count(*) FROM deliveries WHERE state = 'due' GROUP BY hook"
            " UNION ALL SELECT hook, state, count(*) FROM deliveries WHERE state = 'dead' GROUP BY hook"
        )
    }
    paused = {hook: (until_ms, reason) for hook, until_ms, reason in db.execute("SELECT * FROM paused")}
    states = []
    for route in routes:
        until_ms, reason = paused.get(route.hook, (0, None))
        due, dead = (counts.get((route.hook, state), 0) for state in ("due", "dead"))
        states.append(HookState(route.hook, due, dead, _disabled(db, route), reason, until_ms))
    return states


def read_event(row: Sequence[Any]) -> Event:
    """Return an event from the columns id, type, external_task_id, sequence, time_ms, body."""
    id, type, external_task_id, sequence, time_ms, body = row
    return Event(id, type, external_task_id, sequence, time_ms, body.encode())


def read_delivery(row: Sequence[Any]) -> Delivery:
    """Return a delivery from a row of SELECT_DELIVERIES."""
    id, hook, state, attempts, due_at_ms, last_error = row[:6]
    return Delivery(id, hook, read_event(row[6:]), state, attempts, due_at_ms, last_error)


def _disabled(db: sqlite3.Connection, route: Route) -> str | None:
    row = db.execute("SELECT reason FROM disabled WHERE hook = ? AND target = ?", (route.hook, route.target)).fetchone()
    return None if row is None else str(row[0])


def _route(db: sqlite3.Connection, routes: Sequence[Route], now_ms: int) -> bool:
    """Make deliveries of events that have none; return whether there are more than were taken."""
    done, upto, found = db.execute(
        "SELECT routed.upto, max(seq), count(*) FROM routed, (SELECT seq FROM events"
        " WHERE seq > (SELECT upto FROM routed) ORDER BY seq LIMIT ?)",
        (ROUTE_MAX,),
    ).fetchone()
    if not found:
        return False
    for route in routes:
        reason = _disabled(db, route)
        state, error = ("due", "") if reason is None else ("dead", f"hook disabled: {reason}")
        types = None if route.events is None else msgspec.json.encode(sorted(route.events)).decode()
        db.execute(INSERT_DELIVERIES, (route.hook, state, now_ms, error, done, upto, types))
    db.execute("UPDATE routed SET upto = ?", (upto,))
    return bool(found == ROUTE_MAX)


def _turn(route: Route) -> str:
    """Return the condition that it is a delivery's turn."""
    return f"AND NOT EXISTS ({EARLIER_OF_THE_TASK})" if route.ordered else ""


def _claim(db: sqlite3.Connection, route: Route, now_ms: int, lease_ms: int) -> list[Delivery]:
    if route.room <= 0:
        return []
    rows = db.execute(
        f"{SELECT_DELIVERIES} WHERE d.hook = ? AND d.state = 'due' AND d.due_at_ms <= ? {_turn(route)}"
        " ORDER BY d.due_at_ms, d.id LIMIT ?",
        (route.hook, now_ms, route.room),
    ).fetchall()
    if not rows:
        return []
    ids = msgspec.json.encode([row[0] for row in rows]).decode()
    db.execute(
        "UPDATE deliveries SET attempts = attempts + 1, due_at_ms = ? WHERE id IN (SELECT value FROM json_each(?))",
        (now_ms + lease_ms, ids),
    )
    return [msgspec.structs.replace(read_delivery(row), attempts=row[3] + 1) for row in rows]
