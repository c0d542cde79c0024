-- Schema of the SQLite ledger. Each migration is one block. PRAGMA user_version counts those applied.
-- A task is one JSON document (`doc`). The other columns exist to search and sort by.

-- migration 1
CREATE TABLE tasks (
    external_task_id TEXT PRIMARY KEY,
    vendor TEXT NOT NULL,
    status TEXT NOT NULL,
    is_open INTEGER NOT NULL,      -- 1 until the task ends: it may hold one of the vendor's slots
    created_at_ms INTEGER NOT NULL,
    poll_at_ms INTEGER,            -- NULL: never. While a poll is claimed: when its lease ends
    doc TEXT NOT NULL
);
CREATE INDEX tasks_newest ON tasks (created_at_ms, external_task_id);
CREATE INDEX tasks_due ON tasks (poll_at_ms) WHERE poll_at_ms IS NOT NULL;
CREATE INDEX tasks_open ON tasks (vendor) WHERE is_open = 1;

CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    external_task_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (external_task_id, sequence)
);
CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;

CREATE TABLE routed (upto INTEGER NOT NULL);  -- the outbox: events with a higher seq have no deliveries yet
INSERT INTO routed VALUES (0);

CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_seq INTEGER NOT NULL REFERENCES events (seq),
    hook TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'due',
    attempts INTEGER NOT NULL DEFAULT 0,
    due_at_ms INTEGER NOT NULL,
    last_error TEXT NOT NULL DEFAULT '',
    UNIQUE (hook, event_seq)
);
CREATE INDEX deliveries_due ON deliveries (hook, due_at_ms) WHERE state = 'due';
CREATE INDEX deliveries_next ON deliveries (due_at_ms) WHERE state = 'due';
CREATE INDEX deliveries_dead ON deliveries (hook) WHERE state = 'dead';

CREATE TABLE disabled (hook TEXT PRIMARY KEY, target TEXT NOT NULL, reason TEXT NOT NULL);

CREATE TABLE quarantine (
    external_task_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    vendor TEXT NOT NULL,
    received_at_ms INTEGER NOT NULL,
    reason TEXT NOT NULL,
    body BLOB NOT NULL,
    times INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (external_task_id, digest)
);

-- migration 2
ALTER TABLE tasks ADD COLUMN task_id TEXT;  -- the vendor's own task id, once it is known
UPDATE tasks SET task_id = json_extract(doc, '$.task_id');
CREATE INDEX tasks_of_vendor ON tasks (vendor, created_at_ms, external_task_id);
CREATE INDEX tasks_theirs ON tasks (task_id, vendor) WHERE task_id IS NOT NULL;
CREATE TABLE paused (hook TEXT PRIMARY KEY, until_ms INTEGER NOT NULL, reason TEXT NOT NULL);

-- migration 3
-- A refused task was `created` with a flag; now `refused` is a status.
UPDATE tasks SET status = 'refused', doc = json_set(doc, '$.status', 'refused')
WHERE is_open = 0 AND status = 'created';
