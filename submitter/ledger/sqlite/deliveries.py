"""Outbox and deliveries in SQLite: create, claim (lease), settle, replay, pause.

Each function runs inside the ledger's transaction. Statements are set-based, and results that matter for speed are one
JSON text: see `ledger`.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from submitter.event import Event
from submitter.ledger.base import (
    AHEAD_MAX_MS,
    HOOK_DISABLED,
    Claimed,
    Delivery,
    DeliveryState,
    HookState,
    Settlement,
    Subscription,
)
from submitter.ledger.sqlite.rows import execute_rows

_claims = msgspec.json.Decoder(list[tuple[int, int]])
_due = msgspec.json.Decoder(dict[str, int])
EVENTS_PER_CLAIM = 1000  # events that one claim takes from the outbox

# Subscriptions are a JSON array of [hook, endpoint fingerprint, event types or null].
INSERT_DELIVERIES = f"""
INSERT INTO deliveries (event_seq, hook, state, due_at_ms, last_error)
SELECT e.seq, json_extract(s.value, '$[0]'), CASE WHEN d.hook IS NULL THEN 'due' ELSE 'dead' END, ?2,
       CASE WHEN d.hook IS NULL THEN '' ELSE '{HOOK_DISABLED}' || d.reason END
FROM events AS e CROSS JOIN json_each(?1) AS s
LEFT JOIN disabled AS d ON d.hook = json_extract(s.value, '$[0]') AND d.target = json_extract(s.value, '$[1]')
WHERE e.seq > ?3 AND e.seq <= ?4
AND (json_extract(s.value, '$[2]') IS NULL OR e.type IN (SELECT value FROM json_each(s.value, '$[2]')))
ORDER BY e.seq
"""
SELECT_DELIVERIES = """
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM deliveries AS d JOIN events AS e ON e.seq = d.event_seq
"""
# A row of it, for a result in one step: each row of a result releases and takes the interpreter lock (GIL).
DELIVERY_AS_JSON = (
    "json_array(id, hook, state, attempts, due_at_ms, last_error,"
    " event_id, type, external_task_id, sequence, time_ms, body)"
)

# The claims that are still held, for rows of id and attempts.
SELECT_HELD = """
SELECT json_group_array(json_array(id, attempts)) FROM deliveries
JOIN (VALUES {rows}) ON id = column1 AND attempts = column2 WHERE state = 'due'
"""
# How to settle a delivery: columns id, attempts, state, due_at_ms, last_error.
SETTLE = """
UPDATE deliveries SET state = column3, due_at_ms = column4, last_error = column5
FROM (VALUES {rows}) WHERE id = column1 AND attempts = column2 AND state = 'due'
"""

EARLIER_DUE = """
SELECT 1 FROM events AS e2 JOIN deliveries AS d2 ON d2.event_seq = e2.seq AND d2.hook = d.hook
WHERE e2.external_task_id = e.external_task_id AND e2.sequence < e.sequence AND d2.state = 'due'
"""
# When each hook's next delivery is due, for a JSON array of hooks.
NEXT_DUE = """
SELECT json_group_object(h.value, n.due_at_ms) FROM json_each(?) AS h JOIN deliveries AS n ON n.id = (
    SELECT d.id FROM deliveries AS d WHERE d.state = 'due' AND d.hook = h.value ORDER BY d.due_at_ms LIMIT 1
)
"""
# The same for ordered hooks, without the deliveries that an earlier one blocks.
NEXT_UNBLOCKED = f"""
SELECT json_group_object(h.value, n.due_at_ms) FROM json_each(?) AS h JOIN deliveries AS n ON n.id = (
    SELECT d.id FROM deliveries AS d JOIN events AS e ON e.seq = d.event_seq
    WHERE d.state = 'due' AND d.hook = h.value AND NOT EXISTS ({EARLIER_DUE}) ORDER BY d.due_at_ms LIMIT 1
)
"""


def claim(
    db: sqlite3.Connection, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
) -> Claimed[Delivery]:
    """Create deliveries for events in the outbox, then lease due deliveries."""
    has_more = _create_deliveries(db, subscriptions, now_ms)
    db.execute(
        "UPDATE deliveries SET due_at_ms = ? WHERE state = 'due' AND due_at_ms > ?", (now_ms, now_ms + AHEAD_MAX_MS)
    )
    due = _next_due(db, [subscription for subscription in subscriptions if subscription.capacity > 0])
    claimed: list[Delivery] = []
    next_due = [now_ms] if has_more else []
    for subscription in subscriptions:
        due_at_ms = due.get(subscription.hook)
        if due_at_ms is None:
            continue
        if due_at_ms > now_ms:
            next_due.append(due_at_ms)
            continue
        found = _claim_for_hook(db, subscription, now_ms, lease_ms)
        claimed.extend(found)
        if len(found) < subscription.capacity:  # a hook at its capacity is claimed for again after a settle
            next_due.extend(_next_due(db, [subscription]).values())
    return Claimed(claimed, min(next_due, default=None))


def settle_all(db: sqlite3.Connection, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
    """Store the outcomes of claims that are still held; return which were. Disable hooks on request."""
    rows = [(d.id, d.attempts, s.state, s.due_at_ms, s.error) for d, s in settled]
    found = execute_rows(db, SELECT_HELD, [row[:2] for row in rows])
    held = {claim for (claims,) in found for claim in _claims.decode(claims)}
    execute_rows(db, SETTLE, rows)
    for delivery, settlement in settled:
        if settlement.disable_endpoint is not None:
            db.execute(
                "INSERT OR REPLACE INTO disabled (hook, target, reason) VALUES (?, ?, ?)",
                (delivery.hook, settlement.disable_endpoint, settlement.error),
            )
            db.execute(
                "UPDATE deliveries SET state = 'dead', last_error = ? WHERE hook = ? AND state = 'due'",
                (f"{HOOK_DISABLED}{settlement.error}", delivery.hook),
            )
    return [(delivery.id, delivery.attempts) in held for delivery, _ in settled]


def find(db: sqlite3.Connection, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
    """Return deliveries, the newest first."""
    sql = (
        f"{SELECT_DELIVERIES} WHERE (?1 IS NULL OR d.hook = ?1) AND (?2 IS NULL OR d.state = ?2)"
        " ORDER BY d.id DESC LIMIT ?3"
    )
    return [read_delivery(row) for row in db.execute(sql, (hook, state, limit))]


def replay(db: sqlite3.Connection, hook: str, now_ms: int, external_task_id: str | None) -> int:
    """Make a hook's dead letters due again and enable it; return their number."""
    db.execute("DELETE FROM disabled WHERE hook = ?", (hook,))
    return db.execute(
        "UPDATE deliveries SET state = 'due', attempts = 0, due_at_ms = ?1"
        " WHERE hook = ?2 AND state = 'dead' AND (?3 IS NULL OR event_seq IN"
        " (SELECT seq FROM events WHERE external_task_id = ?3))",
        (now_ms, hook, external_task_id),
    ).rowcount


def pause(db: sqlite3.Connection, hook: str, until_ms: int | None, reason: str) -> None:
    """Record a pause, or (None) its end."""
    if until_ms is None:
        db.execute("DELETE FROM paused WHERE hook = ?", (hook,))
    else:
        db.execute("INSERT OR REPLACE INTO paused VALUES (?, ?, ?)", (hook, until_ms, reason))


def hook_states(db: sqlite3.Connection, subscriptions: Iterable[Subscription]) -> list[HookState]:
    """Return the state of each hook, in this order."""
    counts = {
        (hook, state): count
        for hook, state, count in db.execute(
            "SELECT hook, state, count(*) FROM deliveries WHERE state = 'due' GROUP BY hook"
            " UNION ALL SELECT hook, state, count(*) FROM deliveries WHERE state = 'dead' GROUP BY hook"
        )
    }
    paused = {hook: (until_ms, reason) for hook, until_ms, reason in db.execute("SELECT * FROM paused")}
    states = []
    for subscription in subscriptions:
        until_ms, reason = paused.get(subscription.hook, (0, None))
        due, dead = (counts.get((subscription.hook, state), 0) for state in ("due", "dead"))
        states.append(HookState(subscription.hook, due, dead, _disabled(db, subscription), reason, until_ms))
    return states


def read_event(row: Sequence[Any]) -> Event:
    """Return the event in the columns id, type, external_task_id, sequence, time_ms, body."""
    id, type, external_task_id, sequence, time_ms, body = row
    return Event(id, type, external_task_id, sequence, time_ms, body.encode())


def read_delivery(row: Sequence[Any]) -> Delivery:
    """Return the delivery in a row of SELECT_DELIVERIES."""
    id, hook, state, attempts, due_at_ms, last_error = row[:6]
    return Delivery(id, hook, read_event(row[6:]), state, attempts, due_at_ms, last_error)


def _disabled(db: sqlite3.Connection, subscription: Subscription) -> str | None:
    """Return why the hook's endpoint is disabled, or None."""
    row = db.execute(
        "SELECT reason FROM disabled WHERE hook = ? AND target = ?",
        (subscription.hook, subscription.endpoint_fingerprint),
    ).fetchone()
    return None if row is None else str(row[0])


def _create_deliveries(db: sqlite3.Connection, subscriptions: Sequence[Subscription], now_ms: int) -> bool:
    """Create deliveries for the next events in the outbox; return whether there may be more events."""
    after, upto, count = db.execute(
        "SELECT routed.upto, max(seq), count(*) FROM routed, (SELECT seq FROM events"
        " WHERE seq > (SELECT upto FROM routed) ORDER BY seq LIMIT ?)",
        (EVENTS_PER_CLAIM,),
    ).fetchone()
    if not count:
        return False
    rows = [(one.hook, one.endpoint_fingerprint, one.events and sorted(one.events)) for one in subscriptions]
    db.execute(INSERT_DELIVERIES, (msgspec.json.encode(rows).decode(), now_ms, after, upto))
    db.execute("UPDATE routed SET upto = ?", (upto,))
    return bool(count == EVENTS_PER_CLAIM)


def _next_due(db: sqlite3.Connection, subscriptions: Sequence[Subscription]) -> dict[str, int]:
    """Return when the next delivery of each hook is due, of the hooks that have one."""
    found: dict[str, int] = {}
    for sql, hooks in (
        (NEXT_DUE, [one.hook for one in subscriptions if not one.ordered]),
        (NEXT_UNBLOCKED, [one.hook for one in subscriptions if one.ordered]),
    ):
        if hooks:
            found |= _due.decode(db.execute(sql, (msgspec.json.encode(hooks).decode(),)).fetchone()[0])
    return found


def _unblocked(subscription: Subscription) -> str:
    """Return the SQL condition that no earlier event of the task blocks a delivery to an ordered hook."""
    return f"AND NOT EXISTS ({EARLIER_DUE})" if subscription.ordered else ""


def _claim_for_hook(db: sqlite3.Connection, subscription: Subscription, now_ms: int, lease_ms: int) -> list[Delivery]:
    if subscription.capacity <= 0:
        return []
    (lines,) = db.execute(
        f"SELECT json_group_array({DELIVERY_AS_JSON}) FROM ({SELECT_DELIVERIES}"
        f" WHERE d.hook = ? AND d.state = 'due' AND d.due_at_ms <= ? {_unblocked(subscription)}"
        " ORDER BY d.due_at_ms, d.id LIMIT ?)",
        (subscription.hook, now_ms, subscription.capacity),
    ).fetchone()
    rows = msgspec.json.decode(lines)
    if not rows:
        return []
    ids = msgspec.json.encode([row[0] for row in rows]).decode()
    db.execute(
        "UPDATE deliveries SET attempts = attempts + 1, due_at_ms = ? WHERE id IN (SELECT value FROM json_each(?))",
        (now_ms + lease_ms, ids),
    )
    return [msgspec.structs.replace(read_delivery(row), attempts=row[3] + 1) for row in rows]
