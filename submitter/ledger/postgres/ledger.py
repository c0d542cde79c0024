"""PostgreSQL ledger: `postgresql://user:password@host/database?schema=kling_relay&pooler=transaction`.

- Batching: concurrent calls of `apply` share two statements. One reads their tasks, the other stores the new states
  and events.
- Optimistic locking: a task whose `version` changed in between is read and decided again.
- A transaction leaves no session state except prepared statements. `pooler=transaction` turns those off, for poolers
  such as PgBouncer.
- Change notification: LISTEN/NOTIFY, and a re-check each second, since a transaction pooler drops notifications.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import asyncpg

from submitter.errors import TaskNotFound
from submitter.event import Event
from submitter.ledger.base import (
    AHEAD_MAX_MS,
    QUARANTINED_MAX,
    Applied,
    Claimed,
    Delivery,
    DeliveryState,
    Disabled,
    HookState,
    Quarantined,
    Record,
    Reserved,
    Settlement,
    Subscription,
)
from submitter.ledger.batching import Batcher
from submitter.ledger.decide import AppliedOrError, decide_all
from submitter.ledger.postgres import deliveries as delivery_sql
from submitter.ledger.postgres import records as record_sql
from submitter.ledger.postgres.rows import (
    capacities,
    columns_of,
    event_row,
    read_delivery,
    read_event,
    read_task,
    read_tasks,
    record_rows,
    transposed,
)
from submitter.ledger.postgres.server import Connection, Notifications, Server
from submitter.task import Task, TaskStatus
from submitter.transition import Decide

BATCH_MAX = 512
EVENTS_PER_CLAIM = 1000  # events that one claim takes from the outbox

READ_TASKS = "SELECT external_task_id, version, doc FROM SCHEMA.tasks WHERE external_task_id = ANY ($1)"

# Rows are locked in the order of their ids, so that two batches never deadlock.
STORE = """
WITH given AS (
    SELECT * FROM unnest(
        $1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::bigint[], $8::text[]
    ) AS g (external_task_id, version, vendor, task_id, status, is_open, poll_at_ms, doc)
), locked AS (
    SELECT t.external_task_id FROM SCHEMA.tasks AS t JOIN given AS g USING (external_task_id)
    ORDER BY t.external_task_id FOR UPDATE OF t
), stored AS (
    UPDATE SCHEMA.tasks AS t SET version = t.version + 1, vendor = g.vendor, task_id = g.task_id, status = g.status,
        is_open = g.is_open, poll_at_ms = g.poll_at_ms, doc = g.doc
    FROM given AS g JOIN locked USING (external_task_id)
    WHERE t.external_task_id = g.external_task_id AND t.version = g.version
    RETURNING t.external_task_id
), new_events AS (
    INSERT INTO SCHEMA.events (external_task_id, sequence, id, type, time_ms, body)
    SELECT e.* FROM unnest($9::text[], $10::int[], $11::text[], $12::text[], $13::bigint[], $14::text[])
        AS e (external_task_id, sequence, id, type, time_ms, body)
    JOIN stored USING (external_task_id)
    ORDER BY e.external_task_id, e.sequence
    RETURNING seq, external_task_id, sequence
), queued AS (
    INSERT INTO SCHEMA.outbox SELECT seq, external_task_id, sequence FROM new_events
)
SELECT external_task_id, pg_notify($15, '') FROM stored
"""

INSERT_TASK = """
INSERT INTO SCHEMA.tasks (external_task_id, vendor, task_id, status, is_open, created_at_ms, poll_at_ms, doc)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING pg_notify($9, '')
"""

TASKS = """
SELECT doc FROM SCHEMA.tasks AS t
WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR vendor = $2)
AND ($3::text IS NULL OR (created_at_ms, external_task_id) <
    (SELECT created_at_ms, external_task_id FROM SCHEMA.tasks WHERE external_task_id = $3))
ORDER BY created_at_ms DESC, external_task_id DESC LIMIT $4
"""

CLAIM_POLLS = f"""
WITH ahead AS (UPDATE SCHEMA.tasks SET poll_at_ms = $1 WHERE poll_at_ms > $1 + {AHEAD_MAX_MS}::bigint)
UPDATE SCHEMA.tasks SET poll_at_ms = $2 WHERE external_task_id IN (
    SELECT external_task_id FROM SCHEMA.tasks WHERE poll_at_ms <= $1
    ORDER BY poll_at_ms LIMIT $3 FOR UPDATE SKIP LOCKED
) RETURNING doc
"""

# Older bodies of the task make room, and their repetitions are added. $8: how many others are kept
QUARANTINE = """
WITH older AS (
    DELETE FROM SCHEMA.quarantine WHERE external_task_id = $1 AND digest IN (
        SELECT digest FROM SCHEMA.quarantine WHERE external_task_id = $1 AND digest <> $2
        ORDER BY received_at_ms DESC OFFSET $8
    ) RETURNING times
)
INSERT INTO SCHEMA.quarantine AS q
SELECT $1, $2, $3, $4, $5, $6, $7 + coalesce(sum(times), 0)::integer FROM older
ON CONFLICT (external_task_id, digest)
DO UPDATE SET times = q.times + excluded.times, received_at_ms = excluded.received_at_ms
"""

COUNTS = """
SELECT 'task.' || status AS name, count(*) FROM SCHEMA.tasks WHERE is_open GROUP BY status
UNION ALL SELECT 'delivery.due', count(*) FROM SCHEMA.deliveries WHERE state = 'due'
UNION ALL SELECT 'delivery.dead', count(*) FROM SCHEMA.deliveries WHERE state = 'dead'
UNION ALL SELECT 'quarantine', count(*) FROM SCHEMA.quarantine
"""


class PostgresLedger:
    """The `Ledger` protocol on one PostgreSQL schema. The first use creates and migrates it."""

    def __init__(self, url: str) -> None:
        self._server = Server(url)
        self._notifications = Notifications(self._server)
        self._fetch = self._server.fetch
        self._run = self._server.run
        self._applies: Batcher[tuple[str, Decide], Applied] = Batcher(self._apply_all, BATCH_MAX)
        self._settles: Batcher[tuple[Delivery, Settlement], bool] = Batcher(self._settle_all, BATCH_MAX)

    # -- state changes ------------------------------------------------------------------------

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        return await self._applies.submit((external_task_id, decide))

    async def _apply_all(self, decisions: Sequence[tuple[str, Decide]]) -> list[AppliedOrError]:
        outcomes: dict[int, AppliedOrError] = {}
        left = dict(enumerate(decisions))
        while left:  # each round stores the tasks that did not change since they were read
            try:
                done = await self._run(partial(self._apply_once, left))
            except asyncpg.DataError as error:  # apply one by one, so that a bad task fails alone
                if len(decisions) == 1:
                    return [self._server.unavailable(error)]
                alone = [await self._apply_all([one]) for one in left.values()]
                done = {position: outcome[0] for position, outcome in zip(left, alone, strict=True)}
            outcomes |= done
            left = {position: one for position, one in left.items() if position not in done}
        return [outcomes[position] for position in range(len(decisions))]

    async def _apply_once(self, left: Mapping[int, tuple[str, Decide]], db: Connection) -> dict[int, AppliedOrError]:
        """Read, decide and store once; return the outcomes by position, without the tasks that changed meanwhile."""
        rows = await db.fetch(self._server.sql(READ_TASKS), list({id for id, _ in left.values()}))
        tasks = {row["external_task_id"]: read_task(row) for row in rows}
        versions = {row["external_task_id"]: row["version"] for row in rows}
        decided = decide_all(tasks, left.values())
        stale: set[str] = set()
        if decided.changed:
            given = [(id, versions[id], *columns_of(task)) for id, task in decided.changed.items()]
            columns = [*transposed(given, 8), *transposed([event_row(event) for event in decided.events], 6)]
            stored = await db.fetch(self._server.sql(STORE), *columns, self._server.channel)
            stale = set(decided.changed) - {row["external_task_id"] for row in stored}
            if len(stale) < len(decided.changed):
                self._notifications.wake()
        outcomes = zip(left.items(), decided.outcomes, strict=True)
        return {position: outcome for (position, (id, _)), outcome in outcomes if id not in stale}

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        values = (task.external_task_id, *columns_of(task))
        id, vendor, task_id, status, is_open, poll_at_ms, doc = values
        row = (id, vendor, task_id, status, is_open, task.created_at_ms, poll_at_ms, doc)

        async def insert(db: Connection) -> Reserved | None:
            if await db.fetchrow(self._server.sql(INSERT_TASK), *row, self._server.channel) is not None:
                return Reserved(task, is_new=True)
            return None

        async def insert_if_slot_free(db: Connection) -> Reserved | None:
            async with db.transaction():  # the lock serializes reservations of this vendor, so that counting is safe
                await db.execute(
                    "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"{self._server.channel}/{vendor}"
                )
                if await self._open_tasks(db, vendor) >= (slots or 0):
                    return None
                return await insert(db)

        async def run(db: Connection) -> Reserved | None:
            found = await db.fetchrow(self._server.sql(READ_TASKS), [id])
            if found is None:
                created = await (insert(db) if slots is None else insert_if_slot_free(db))
                if created is not None:
                    return created
                found = await db.fetchrow(self._server.sql(READ_TASKS), [id])
            return None if found is None else Reserved(read_task(found), is_new=False)

        reserved = await self._run(run)
        if reserved is not None and reserved.is_new:
            self._notifications.wake()
        return reserved

    # -- reads --------------------------------------------------------------------------------

    async def get(self, external_task_id: str) -> Task:
        found = await self.get_many([external_task_id])
        if not found:
            raise TaskNotFound(external_task_id)
        return found[0]

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        return read_tasks(await self._fetch(READ_TASKS, list(external_task_ids)))

    async def tasks(
        self, *, status: TaskStatus | None = None, vendor: str | None = None, before_id: str | None = None, limit: int
    ) -> list[Task]:
        found = read_tasks(await self._fetch(TASKS, status and status.value, vendor, before_id, limit))
        if not found and before_id is not None:
            await self.get(before_id)
        return found

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        statement = "SELECT doc FROM SCHEMA.tasks WHERE task_id = ANY ($1) AND vendor = $2"
        return read_tasks(await self._fetch(statement, list(task_ids), vendor))

    async def open_tasks(self, vendor: str) -> int:
        return await self._run(lambda db: self._open_tasks(db, vendor))

    async def _open_tasks(self, db: Connection, vendor: str) -> int:
        statement = self._server.sql("SELECT count(*) FROM SCHEMA.tasks WHERE is_open AND vendor = $1")
        return int(await db.fetchval(statement, vendor))

    async def events(self, external_task_id: str) -> list[Event]:
        statement = (
            "SELECT id AS event_id, type, external_task_id, sequence, time_ms, body FROM SCHEMA.events"
            " WHERE external_task_id = $1 ORDER BY sequence"
        )
        return [read_event(row) for row in await self._fetch(statement, external_task_id)]

    # -- polls --------------------------------------------------------------------------------

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        async def run(db: Connection) -> Claimed[Task]:
            rows = await db.fetch(self._server.sql(CLAIM_POLLS), now_ms, now_ms + lease_ms, limit)
            statement = "SELECT min(poll_at_ms) FROM SCHEMA.tasks WHERE poll_at_ms IS NOT NULL"
            return Claimed(read_tasks(rows), await db.fetchval(self._server.sql(statement)))

        return await self._run(run)

    async def make_due(self, vendor: str, now_ms: int) -> int:
        rows = await self._fetch(
            "UPDATE SCHEMA.tasks SET poll_at_ms = least(poll_at_ms, $1)"
            " WHERE is_open AND vendor = $2 AND task_id IS NOT NULL AND poll_at_ms IS NOT NULL RETURNING 1",
            now_ms,
            vendor,
        )
        self._notifications.wake()
        return len(rows)

    # -- deliveries ---------------------------------------------------------------------------

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        async def run(db: Connection) -> Claimed[Delivery]:
            types = [
                None if subscription.events is None else ",".join(sorted(subscription.events))
                for subscription in subscriptions
            ]
            hooks = [subscription.hook for subscription in subscriptions]
            endpoints = [subscription.endpoint_fingerprint for subscription in subscriptions]
            create = self._server.sql(delivery_sql.CREATE_DELIVERIES)
            dequeued = await db.fetchval(create, EVENTS_PER_CLAIM, now_ms, hooks, endpoints, types)
            rows = await db.fetch(
                self._server.sql(delivery_sql.CLAIM), *capacities(subscriptions), now_ms, now_ms + lease_ms
            )
            claimed = Counter(row["hook"] for row in rows)
            # A hook at its capacity is claimed for again after a settle, which wakes the caller.
            not_full = [
                subscription for subscription in subscriptions if claimed[subscription.hook] < subscription.capacity
            ]
            next_due_ms = (
                await db.fetchval(self._server.sql(delivery_sql.NEXT_DUE), *capacities(not_full)) if not_full else None
            )
            if dequeued == EVENTS_PER_CLAIM:  # the outbox may hold more events
                next_due_ms = now_ms
            return Claimed([read_delivery(row) for row in rows], next_due_ms)

        return await self._run(run)

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        held = await self._settles.submit((delivery, settlement))
        if settlement.disable_endpoint is not None:
            await self._fetch(delivery_sql.DISABLE, delivery.hook, settlement.disable_endpoint, settlement.error)
        return held

    async def _settle_all(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        rows = [(d.id, d.attempts, s.state, s.due_at_ms, s.error) for d, s in settled]
        held = {row["id"] for row in await self._fetch(delivery_sql.SETTLE, *transposed(rows, 5))}
        self._notifications.wake()
        return [delivery.id in held for delivery, _ in settled]

    async def deliveries(self, *, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        return [read_delivery(row) for row in await self._fetch(delivery_sql.FIND, hook, state, limit)]

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None = None) -> int:
        rows = await self._fetch(delivery_sql.REPLAY, now_ms, hook, external_task_id)
        self._notifications.wake()
        return len(rows)

    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        if until_ms is None:
            await self._fetch("DELETE FROM SCHEMA.paused WHERE hook = $1", hook)
        else:
            await self._fetch(delivery_sql.PAUSE, hook, until_ms, reason)

    async def hook_states(self, subscriptions: Iterable[Subscription]) -> list[HookState]:
        pairs = [(subscription.hook, subscription.endpoint_fingerprint) for subscription in subscriptions]
        found = {
            row["hook"]: HookState(**row) for row in await self._fetch(delivery_sql.HOOK_STATES, *transposed(pairs, 2))
        }
        return [found[hook] for hook, _ in pairs]

    # -- quarantine ---------------------------------------------------------------------------

    async def quarantine(self, entry: Quarantined) -> None:
        columns = (entry.external_task_id, entry.digest, entry.vendor, entry.received_at_ms, entry.reason)
        await self._fetch(QUARANTINE, *columns, entry.body, entry.times, QUARANTINED_MAX - 1)

    async def quarantined(self, limit: int, external_task_id: str | None = None) -> list[Quarantined]:
        statement = (
            "SELECT external_task_id, vendor, received_at_ms, reason, body, times FROM SCHEMA.quarantine"
            " WHERE $2::text IS NULL OR external_task_id = $2 ORDER BY received_at_ms DESC LIMIT $1"
        )
        return [Quarantined(**row) for row in await self._fetch(statement, limit, external_task_id)]

    # -- copying, pruning, counts -------------------------------------------------------------

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        return [row["external_task_id"] for row in await self._fetch(record_sql.IDS, after_id, limit)]

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        ids = list(external_task_ids)
        rows = await self._fetch(record_sql.TASKS, ids)
        events, deliveries = defaultdict(list), defaultdict(list)
        for row in await self._fetch(record_sql.EVENTS, ids):
            events[row["external_task_id"]].append(read_event(row))
        for row in await self._fetch(record_sql.DELIVERIES, ids):
            deliveries[row["external_task_id"]].append(read_delivery(row))
        tasks = {task.external_task_id: task for task in read_tasks(rows)}
        due = {row["external_task_id"]: row["poll_at_ms"] for row in rows}
        return [Record(tasks[id], due[id], events[id], deliveries[id]) for id in ids]

    async def load(self, records: Sequence[Record]) -> None:
        tasks, events, deliveries = record_rows(records)

        async def run(db: Connection) -> None:
            async with db.transaction():
                await db.execute(self._server.sql(record_sql.LOAD_TASKS), *transposed(tasks, 8))
                await db.execute(self._server.sql(record_sql.LOAD_EVENTS), *transposed(events, 6))
                await db.execute(self._server.sql(record_sql.LOAD_DELIVERIES), *transposed(deliveries, 7))

        await self._run(run)

    async def disabled(self) -> list[Disabled]:
        rows = await self._fetch("SELECT hook, target, reason FROM SCHEMA.disabled ORDER BY hook")
        return [Disabled(*row) for row in rows]

    async def disable(self, entry: Disabled) -> None:
        await self._fetch(delivery_sql.UPSERT_DISABLED, entry.hook, entry.endpoint_fingerprint, entry.reason)

    async def prune(self, before_ms: int, limit: int) -> int:
        return int((await self._fetch(record_sql.PRUNE, before_ms, limit))[0]["count"])

    async def counts(self) -> Mapping[str, int]:
        return {row["name"]: row["count"] for row in await self._fetch(COUNTS)}

    async def check_write(self) -> None:
        await self._fetch("UPDATE SCHEMA.version SET applied = applied")

    # -- change notification ------------------------------------------------------------------

    def version(self) -> int:
        return self._notifications.version

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        await self._notifications.wait_for_change(version, timeout_s)

    async def close(self) -> None:
        await self._applies.finish()
        await self._settles.finish()
        await self._notifications.close()
        await self._server.close()
