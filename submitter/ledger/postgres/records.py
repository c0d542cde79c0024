"""SQL for copying and pruning in PostgreSQL. `SCHEMA.` is replaced by the ledger's schema."""

from submitter.task import SETTLED

# $1 last id of the previous page or NULL, $2 limit
IDS = """
SELECT external_task_id FROM SCHEMA.tasks WHERE $1::text IS NULL OR external_task_id > $1
ORDER BY external_task_id LIMIT $2
"""

# $1 task ids
TASKS = "SELECT external_task_id, doc, poll_at_ms FROM SCHEMA.tasks WHERE external_task_id = ANY ($1)"

# $1 task ids
EVENTS = """
SELECT id AS event_id, type, external_task_id, sequence, time_ms, body FROM SCHEMA.events
WHERE external_task_id = ANY ($1) ORDER BY external_task_id, sequence
"""

# $1 task ids
DELIVERIES = """
SELECT 0 AS id, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error,
       e.id AS event_id, e.type, e.external_task_id, e.sequence, e.time_ms, e.body
FROM SCHEMA.deliveries AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq
WHERE e.external_task_id = ANY ($1) ORDER BY e.sequence, d.hook
"""

LOAD_TASKS = """
INSERT INTO SCHEMA.tasks (external_task_id, vendor, task_id, status, is_open, created_at_ms, poll_at_ms, doc)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::bigint[], $7::bigint[], $8::text[])
"""

LOAD_EVENTS = """
INSERT INTO SCHEMA.events (external_task_id, sequence, id, type, time_ms, body)
SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::bigint[], $6::text[])
"""

LOAD_DELIVERIES = """
INSERT INTO SCHEMA.deliveries
    (event_seq, external_task_id, sequence, hook, state, attempts, due_at_ms, last_error)
SELECT e.seq, d.external_task_id, d.sequence, d.hook, d.state, d.attempts, d.due_at_ms, d.last_error
FROM unnest($1::text[], $2::int[], $3::text[], $4::text[], $5::int[], $6::bigint[], $7::text[])
    AS d (external_task_id, sequence, hook, state, attempts, due_at_ms, last_error)
JOIN SCHEMA.events AS e USING (external_task_id, sequence)
ORDER BY e.seq
"""

# Deletes ended tasks last updated before $1 that have no event in the outbox and no due delivery.
# $1 Unix milliseconds, $2 limit
PRUNE = f"""
WITH pruned AS (
    DELETE FROM SCHEMA.tasks WHERE external_task_id IN (
        SELECT external_task_id FROM SCHEMA.tasks AS t
        WHERE NOT is_open AND status IN ({", ".join(f"'{status.value}'" for status in sorted(SETTLED))})
        AND substring(doc from '"updated_at_ms":([0-9]+)')::bigint < $1
        AND NOT EXISTS (SELECT FROM SCHEMA.outbox AS o WHERE o.external_task_id = t.external_task_id)
        AND NOT EXISTS (
            SELECT FROM SCHEMA.deliveries AS d JOIN SCHEMA.events AS e ON e.seq = d.event_seq
            WHERE e.external_task_id = t.external_task_id AND d.state = 'due'
        )
        ORDER BY created_at_ms LIMIT $2 FOR UPDATE SKIP LOCKED
    ) RETURNING external_task_id
), pruned_events AS (
    DELETE FROM SCHEMA.events AS e USING pruned WHERE e.external_task_id = pruned.external_task_id RETURNING e.seq
), pruned_deliveries AS (
    DELETE FROM SCHEMA.deliveries AS d USING pruned_events AS e WHERE d.event_seq = e.seq
), pruned_quarantine AS (
    DELETE FROM SCHEMA.quarantine WHERE received_at_ms < $1
)
SELECT count(*) FROM pruned
"""
