"""Deliveries in PostgreSQL, as SQL. `SCHEMA.` stands for the ledger's schema.

The outbox holds the events that no hook was given yet. Several workers take from it, and claim
deliveries, without waiting for each other (SKIP LOCKED). A worker that has not committed yet
leaves its events in everybody else's view of the outbox, so an ordered hook's turn looks there too.
"""

# Events of the outbox become deliveries, one per route that wants them; those of a disabled hook are dead.
# $1 how many events, $2 now, $3 hooks, $4 targets, $5 each hook's event types (comma-separated; NULL: all)
ROUTE = """
WITH taken AS (
    DELETE FROM SCHEMA.outbox WHERE seq IN (
        SELECT seq FROM SCHEMA.outbox ORDER BY seq LIMIT $1 FOR UPDATE SKIP LOCKED
    ) RETURNING seq
), made AS (
    INSERT INTO SCHEMA.deliveries (event_seq, external_task_id, sequence, hook, state, due_at_ms, last_error)
    SELECT e.seq, e.external_task_id, e.sequence, r.hook,
           CASE WHEN d.hook IS NULL THEN 'due' ELSE 'dead' END, $2,
           CASE WHEN d.hook IS NULL THEN '' ELSE 'hook disabled: ' || d.reason END
    FROM taken
    JOIN SCHEMA.events AS e ON e.seq = taken.seq
    CROSS JOIN unnest($3::text[], $4::text[], $5::text[]) AS r (hook, target, types)
    LEFT JOIN SCHEMA.disabled AS d ON d.hook = r.hook AND d.target = r.target
    WHERE r.types IS NULL OR e.type = ANY (string_to_array(r.types, ','))
    ORDER BY e.seq
)
SELECT count(*) FROM taken
"""

# Whether it is a delivery's turn: no earlier event of its task is on its way to the hook, or to come.
TURN = """(
    NOT r.ordered
    OR NOT EXISTS (
        SELECT FROM SCHEMA.deliveries AS before
        WHERE before.hook = d.hook AND before.external_task_id = d.external_task_id
        AND before.sequence < d.sequence AND before.state = 'due'
    ) AND NOT EXISTS (
        SELECT FROM SCHEMA.outbox AS o WHERE o.external_task_id = d.external_task_id AND o.sequence < d.sequence
    )
)"""

ROUTES = "unnest($1::text[], $2::int[], $3::bool[]) AS r (hook, room, ordered)"

# $1 hooks, $2 rooms, $3 which are ordered, $4 now, $5 when the lease ends
CLAIM = f"""
WITH claimed AS (
    UPDATE SCHEMA.deliveries SET attempts = attempts + 1, due_at_ms = $5
    WHERE id IN (
        SELECT p.id FROM {ROUTES} CROSS JOIN LATERAL (
            SELECT d.id FROM SCHEMA.deliveries AS d
            WHERE d.hook = r.hook AND d.state = 'due' AND d.due_at_ms <= $4 AND {TURN}
            ORDER BY d.due_at_ms, d.id LIMIT r.room FOR UPDATE OF d SKIP LOCKED
        ) AS p
    )
    RETURNING *
)
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM claimed AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq ORDER BY d.id
"""

# $1 hooks, $2 rooms, $3 which are ordered
NEXT_DUE = f"""
SELECT min(p.due_at_ms) FROM {ROUTES} CROSS JOIN LATERAL (
    SELECT d.due_at_ms FROM SCHEMA.deliveries AS d
    WHERE d.hook = r.hook AND d.state = 'due' AND {TURN}
    ORDER BY d.due_at_ms LIMIT 1
) AS p
"""

# $1 ids, $2 attempts, $3 states, $4 when due, $5 errors. Returns the ids of the claims that were still held.
SETTLE = """
UPDATE SCHEMA.deliveries AS d SET state = s.state, due_at_ms = s.due_at_ms, last_error = s.error
FROM unnest($1::bigint[], $2::int[], $3::text[], $4::bigint[], $5::text[]) AS s (id, attempts, state, due_at_ms, error)
WHERE d.id = s.id AND d.attempts = s.attempts AND d.state = 'due'
RETURNING d.id
"""

# $1 the hook, $2 its target, $3 the reason
NOTE_DISABLED = """
INSERT INTO SCHEMA.disabled VALUES ($1, $2, $3)
ON CONFLICT (hook) DO UPDATE SET target = excluded.target, reason = excluded.reason
"""

# $1 the hook, $2 its target, $3 the reason
DISABLE = f"""
WITH noted AS ({NOTE_DISABLED})
UPDATE SCHEMA.deliveries SET state = 'dead', last_error = 'hook disabled: ' || $3 WHERE hook = $1 AND state = 'due'
"""

# $1 the hook or NULL, $2 the state or NULL, $3 how many
FIND = """
SELECT d.id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM SCHEMA.deliveries AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq
WHERE ($1::text IS NULL OR d.hook = $1) AND ($2::text IS NULL OR d.state = $2)
ORDER BY d.id DESC LIMIT $3
"""

# $1 now, $2 the hook, $3 the task or NULL
REPLAY = """
WITH enabled AS (DELETE FROM SCHEMA.disabled WHERE hook = $2)
UPDATE SCHEMA.deliveries SET state = 'due', attempts = 0, due_at_ms = $1
WHERE hook = $2 AND state = 'dead' AND ($3::text IS NULL OR external_task_id = $3)
RETURNING id
"""

PAUSE = """
INSERT INTO SCHEMA.paused VALUES ($1, $2, $3)
ON CONFLICT (hook) DO UPDATE SET until_ms = excluded.until_ms, reason = excluded.reason
"""

# $1 hooks, $2 targets
HOOK_STATES = """
SELECT r.hook,
       (SELECT count(*) FROM SCHEMA.deliveries AS d WHERE d.hook = r.hook AND d.state = 'due') AS due,
       (SELECT count(*) FROM SCHEMA.deliveries AS d WHERE d.hook = r.hook AND d.state = 'dead') AS dead,
       (SELECT reason FROM SCHEMA.disabled AS x WHERE x.hook = r.hook AND x.target = r.target) AS disabled,
       p.reason AS paused, coalesce(p.until_ms, 0) AS paused_until_ms
FROM unnest($1::text[], $2::text[]) AS r (hook, target) LEFT JOIN SCHEMA.paused AS p ON p.hook = r.hook
"""
