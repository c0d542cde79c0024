-- Schema of the PostgreSQL ledger (PostgreSQL 13 or later). Each migration is one block; table `version` counts those
-- applied. SCHEMA is replaced by the URL's schema. Ids sort by their bytes (COLLATE "C"), as in every engine.
-- A task is one JSON document (`doc`). The other columns exist to search and sort by.

-- migration 1
CREATE TABLE SCHEMA.tasks (
    external_task_id text COLLATE "C" PRIMARY KEY,
    version bigint NOT NULL DEFAULT 0,   -- optimistic lock: grows with each change of `doc`
    vendor text NOT NULL,
    task_id text,                        -- the vendor's own task id, once it is known
    status text NOT NULL,
    is_open boolean NOT NULL,            -- until the task ends: it may hold one of the vendor's slots
    created_at_ms bigint NOT NULL,
    poll_at_ms bigint,                   -- NULL: never. While a poll is claimed: when its lease ends
    doc text NOT NULL
) WITH (fillfactor = 70);                -- free space on the page: updates can be heap-only (HOT) and touch no index
CREATE INDEX tasks_newest ON SCHEMA.tasks (created_at_ms, external_task_id);
CREATE INDEX tasks_of_vendor ON SCHEMA.tasks (vendor, created_at_ms, external_task_id);
CREATE INDEX tasks_theirs ON SCHEMA.tasks (task_id, vendor) WHERE task_id IS NOT NULL;
CREATE INDEX tasks_due ON SCHEMA.tasks (poll_at_ms) WHERE poll_at_ms IS NOT NULL;
CREATE INDEX tasks_open ON SCHEMA.tasks (vendor) WHERE is_open;

CREATE TABLE SCHEMA.events (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    external_task_id text COLLATE "C" NOT NULL,
    sequence integer NOT NULL,
    id text NOT NULL,
    type text NOT NULL,
    time_ms bigint NOT NULL,
    body text NOT NULL,
    UNIQUE (external_task_id, sequence)
);
CREATE FUNCTION SCHEMA.events_are_never_changed() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'events are append-only'; END $$;
CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON SCHEMA.events
    FOR EACH ROW EXECUTE FUNCTION SCHEMA.events_are_never_changed();

CREATE TABLE SCHEMA.outbox (             -- events without deliveries
    seq bigint PRIMARY KEY,
    external_task_id text COLLATE "C" NOT NULL,
    sequence integer NOT NULL
);
CREATE INDEX outbox_of_task ON SCHEMA.outbox (external_task_id, sequence);

CREATE TABLE SCHEMA.deliveries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_seq bigint NOT NULL,
    external_task_id text COLLATE "C" NOT NULL,
    sequence integer NOT NULL,
    hook text NOT NULL,
    state text NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    due_at_ms bigint NOT NULL,
    last_error text NOT NULL DEFAULT '',
    UNIQUE (hook, event_seq)
) WITH (fillfactor = 70);
CREATE INDEX deliveries_due ON SCHEMA.deliveries (hook, due_at_ms, id) WHERE state = 'due';
CREATE INDEX deliveries_turn ON SCHEMA.deliveries (hook, external_task_id, sequence) WHERE state = 'due';
CREATE INDEX deliveries_dead ON SCHEMA.deliveries (hook) WHERE state = 'dead';
CREATE INDEX deliveries_of_event ON SCHEMA.deliveries (event_seq);

CREATE TABLE SCHEMA.disabled (hook text PRIMARY KEY, target text NOT NULL, reason text NOT NULL);
CREATE TABLE SCHEMA.paused (hook text PRIMARY KEY, until_ms bigint NOT NULL, reason text NOT NULL);

CREATE TABLE SCHEMA.quarantine (
    external_task_id text COLLATE "C" NOT NULL,
    digest text NOT NULL,
    vendor text NOT NULL,
    received_at_ms bigint NOT NULL,
    reason text NOT NULL,
    body bytea NOT NULL,
    times integer NOT NULL DEFAULT 1,
    PRIMARY KEY (external_task_id, digest)
);

-- migration 2
-- A refused task was `created` with a flag; now `refused` is a status. The status is the first field that can match.
UPDATE SCHEMA.tasks SET status = 'refused', version = version + 1,
    doc = regexp_replace(doc, '"status":"created"', '"status":"refused"')
WHERE NOT is_open AND status = 'created';
