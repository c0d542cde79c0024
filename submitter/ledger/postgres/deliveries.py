"""SQL for the outbox and deliveries in PostgreSQL. `SCHEMA.` is replaced by the ledger's schema.

Table `outbox` holds the events that have no deliveries yet. Workers take events and claim
deliveries without waiting for each other (SKIP LOCKED). Until a worker commits, other workers see
its events in the outbox; so the check for an ordered hook reads the outbox too.
"""

from submitter.ledger.base import AHEAD_MAX_MS, HOOK_DISABLED

# Moves events from the outbox to deliveries: one for each hook that wants the event, dead if that hook is disabled.
# $1 limit, $2 now, $3 hooks, $4 endpoint fingerprints, $5 each hook's event types (comma-separated; NULL: all)
CREATE_DELIVERIES = f"""
WITH dequeued AS (
    DELETE FROM SCHEMA.outbox WHERE seq IN (
        SELECT seq FROM SCHEMA.outbox ORDER BY seq LIMIT $1 FOR UPDATE SKIP LOCKED
    ) RETURNING seq
), created AS (
    INSERT INTO SCHEMA.deliveries (event_seq, external_task_id, sequence, hook, state, due_at_ms, last_error)
    SELECT e.seq, e.external_task_id, e.sequence, s.hook,
           CASE WHEN d.hook IS NULL THEN 'due' ELSE 'dead' END, $2,
           CASE WHEN d.hook IS NULL THEN '' ELSE '{HOOK_DISABLED}' || d.reason END
    FROM dequeued
    JOIN SCHEMA.events AS e ON e.seq = dequeued.seq
    CROSS JOIN unnest($3::text[], $4::text[], $5::text[]) AS s (hook, target, types)
    LEFT JOIN SCHEMA.disabled AS d ON d.hook = s.hook AND d.target = s.target
    WHERE s.types IS NULL OR e.type = ANY (string_to_array(s.types, ','))
    ORDER BY e.seq
)
SELECT count(*) FROM dequeued
"""

# True unless the hook is ordered and an earlier event of the task is due for it or still in the outbox.
UNBLOCKED = """(
    NOT s.ordered
    OR NOT EXISTS (
        SELECT FROM SCHEMA.deliveries AS earlier
        WHERE earlier.hook = d.hook AND earlier.external_task_id = d.external_task_id
        AND earlier.sequence < d.sequence AND earlier.state = 'due'
    ) AND NOT EXISTS (
        SELECT FROM SCHEMA.outbox AS o WHERE o.external_task_id = d.external_task_id AND o.sequence < d.sequence
    )
)"""

SUBSCRIPTIONS = "unnest($1::text[], $2::int[], $3::bool[]) AS s (hook, capacity, ordered)"

# $1 hooks, $2 capacities, $3 which are ordered, $4 now, $5 when the lease ends
CLAIM = f"""
WITH ahead AS (
    UPDATE SCHEMA.deliveries SET due_at_ms = $4
    WHERE hook = ANY($1) AND state = 'due' AND due_at_ms > $4 + {AHEAD_MAX_MS}::bigint
), claimed AS (
    UPDATE SCHEMA.deliveries SET attempts = attempts + 1, due_at_ms = $5
    WHERE id IN (
        SELECT p.id FROM {SUBSCRIPTIONS} CROSS JOIN LATERAL (
            SELECT d.id FROM SCHEMA.deliveries AS d
            WHERE d.hook = s.hook AND d.state = 'due' AND d.due_at_ms <= $4 AND {UNBLOCKED}
            ORDER BY d.due_at_ms, d.id LIMIT s.capacity FOR UPDATE OF d SKIP LOCKED
        ) AS p
    )
    RETURNING *
)
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM claimed AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq ORDER BY d.id
"""

# $1 hooks, $2 capacities, $3 which are ordered
NEXT_DUE = f"""
SELECT min(p.due_at_ms) FROM {SUBSCRIPTIONS} CROSS JOIN LATERAL (
    SELECT d.due_at_ms FROM SCHEMA.deliveries AS d
    WHERE d.hook = s.hook AND d.state = 'due' AND {UNBLOCKED}
    ORDER BY d.due_at_ms LIMIT 1
) AS p
"""

# $1 ids, $2 attempts, $3 new states, $4 when due, $5 errors. Returns the ids of the claims that were still held.
SETTLE = """
UPDATE SCHEMA.deliveries AS d SET state = s.state, due_at_ms = s.due_at_ms, last_error = s.error
FROM unnest($1::bigint[], $2::int[], $3::text[], $4::bigint[], $5::text[]) AS s (id, attempts, state, due_at_ms, error)
WHERE d.id = s.id AND d.attempts = s.attempts AND d.state = 'due'
RETURNING d.id
"""

# $1 hook, $2 endpoint fingerprint, $3 reason
UPSERT_DISABLED = """
INSERT INTO SCHEMA.disabled VALUES ($1, $2, $3)
ON CONFLICT (hook) DO UPDATE SET target = excluded.target, reason = excluded.reason
"""

# $1 hook, $2 endpoint fingerprint, $3 reason
DISABLE = f"""
WITH recorded AS ({UPSERT_DISABLED})
UPDATE SCHEMA.deliveries SET state = 'dead', last_error = '{HOOK_DISABLED}' || $3 WHERE hook = $1 AND state = 'due'
"""

# $1 hook or NULL, $2 state or NULL, $3 limit
FIND = """
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM SCHEMA.deliveries AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq
WHERE ($1::text IS NULL OR d.hook = $1) AND ($2::text IS NULL OR d.state = $2)
ORDER BY d.id DESC LIMIT $3
"""

# $1 now, $2 hook, $3 task id or NULL
REPLAY = """
WITH enabled AS (DELETE FROM SCHEMA.disabled WHERE hook = $2)
UPDATE SCHEMA.deliveries SET state = 'due', attempts = 0, due_at_ms = $1
WHERE hook = $2 AND state = 'dead' AND ($3::text IS NULL OR external_task_id = $3)
RETURNING id
"""

# $1 hook, $2 until (Unix milliseconds), $3 reason
PAUSE = """
INSERT INTO SCHEMA.paused VALUES ($1, $2, $3)
ON CONFLICT (hook) DO UPDATE SET until_ms = excluded.until_ms, reason = excluded.reason
"""

# $1 hooks, $2 endpoint fingerprints
HOOK_STATES = """
SELECT s.hook,
       (SELECT count(*) FROM SCHEMA.deliveries AS d WHERE d.hook = s.hook AND d.state = 'due') AS due,
       (SELECT count(*) FROM SCHEMA.deliveries AS d WHERE d.hook = s.hook AND d.state = 'dead') AS dead,
       (SELECT reason FROM SCHEMA.disabled AS x WHERE x.hook = s.hook AND x.target = s.target) AS disabled,
       p.reason AS paused, coalesce(p.until_ms, 0) AS paused_until_ms
FROM unnest($1::text[], $2::text[]) AS s (hook, target) LEFT JOIN SCHEMA.paused AS p ON p.hook = s.hook
"""
