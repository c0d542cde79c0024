"""Copying and pruning in DynamoDB: reads, loads and deletes a task with its events and deliveries."""

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from submitter.ledger.base import Record
from submitter.ledger.dynamodb.items import (
    Item,
    delivery_item,
    event_item,
    key_of,
    number,
    open_task_item,
    open_task_key,
    pointer_item,
    pointer_key,
    read_delivery,
    read_event,
    read_task,
    shard_of,
    sortable,
    task_item,
    task_key,
    task_partition,
    text,
)
from submitter.ledger.dynamodb.table import Conflict, Table
from submitter.task import SETTLED

PRUNE_CONCURRENCY = 16
TRANSACTION_MAX = 100


class Records:
    """The tasks of one table, each with its events and deliveries."""

    def __init__(self, table: Table, shards: int, ttl_s: int | None) -> None:
        self._table = table
        self._shards = shards
        self._ttl_s = ttl_s

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        """Return a page of task ids, in the table's own order."""
        found: list[str] = []
        after = None if after_id is None else task_key(after_id)
        async for page in self._table.scan("#sk = :task", after, task=text("task")):
            found.extend(item["pk"]["S"].removeprefix("T#") for item in page if item["pk"]["S"].startswith("T#"))
            if len(found) >= limit:
                break
        return found[:limit]

    async def read(self, external_task_ids: Sequence[str]) -> list[Record]:
        """Return tasks with their events and deliveries, in the order of the ids."""
        return await asyncio.gather(*map(self._read, external_task_ids))

    async def _read(self, external_task_id: str) -> Record:
        items = {item["sk"]["S"]: item for item in await self._table.query(None, task_partition(external_task_id))}
        task = read_task(items["task"])
        open_task = await self._table.get(open_task_key(task, int(items["task"]["shard"]["N"])))
        poll_at_ms = None if open_task is None or "at" not in open_task else int(open_task["at"]["S"])
        deliveries = [replace(read_delivery(item), id=0) for sk, item in items.items() if sk.startswith("d#")]
        return Record(
            task,
            poll_at_ms,
            [read_event(item) for sk, item in items.items() if sk.startswith("e#")],
            sorted(deliveries, key=lambda one: (one.event.sequence, one.hook)),
        )

    async def load(self, records: Sequence[Record]) -> None:
        """Store records, item by item. Idempotent: a repetition overwrites the items."""
        await self._table.write_many([item for one in records for item in self._items(one)])

    def _items(self, record: Record) -> list[Item]:
        task, ttl_s = record.task, self._ttl_s
        shard = shard_of(task.external_task_id, self._shards)
        ttl_at_s = None if ttl_s is None else task.updated_at_ms // 1000 + ttl_s
        events = [event_item(event, shard, in_outbox=False) for event in record.events]
        if ttl_at_s is not None:
            events = [event | {"ttl": number(ttl_at_s)} for event in events]
        open_task, pointer = open_task_item(task, shard, record.poll_at_ms), pointer_item(task, ttl_s)
        return [
            task_item(task, version=0, write_id="load", shard=shard, ttl_s=ttl_s),
            *(item for item in (open_task, pointer) if item is not None),
            *events,
            *(delivery_item(one, shard, None if one.state == "due" else ttl_at_s) for one in record.deliveries),
        ]

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` ended tasks last updated before `before_ms`, the oldest of each shard first."""
        before = text(sortable(before_ms))
        states: Item = {f"s{position}": text(status.value) for position, status in enumerate(sorted(SETTLED))}
        filter_by = f"#status IN ({', '.join(f':{name}' for name in states)})"
        pruned = 0
        for shard in range(self._shards):
            async for page in self._table.pages(
                "newest", f"tasks#{shard}", where="#sort < :before", filter_by=filter_by, before=before, **states
            ):
                for start in range(0, len(page), PRUNE_CONCURRENCY):
                    batch = page[start : start + min(PRUNE_CONCURRENCY, limit - pruned)]
                    pruned += sum(await asyncio.gather(*(self._prune(item["pk"]["S"], before_ms) for item in batch)))
                    if pruned == limit:
                        return pruned
            old = self._table.pages("newest", f"quarantine#{shard}", where="#sort < :before", before=before)
            async for page in old:
                await self._table.write_many(deletes=page)
        return pruned

    async def _prune(self, pk: str, before_ms: int) -> bool:
        """Delete one task with its items, unless it must be kept; return whether it was deleted."""
        items = {item["sk"]["S"]: item for item in await self._table.query(None, pk)}
        if "task" not in items:
            return False
        found = items.pop("task")
        task = read_task(found)
        rest = [item for sk, item in items.items() if sk.startswith(("e#", "d#"))]
        is_undelivered = any("queue" in item and item.get("state") != text("dead") for item in rest)
        if task.status not in SETTLED or task.updated_at_ms >= before_ms or is_undelivered:
            return False
        pointers = [] if task.task_id is None else [pointer_key(task.vendor, task.task_id)]
        # The task and its events in one transaction: a late report that changes the task keeps it with its history.
        id, others = task_key(task.external_task_id), [*rest, *pointers]
        deletes = [self._table.action("Delete", key=key_of(item)) for item in others[: TRANSACTION_MAX - 1]]
        unchanged = self._table.action("Delete", "#version = :version", key=id, version=found["version"])
        try:
            await self._table.transact([unchanged, *deletes])
        except Conflict:
            return False
        await self._table.write_many(deletes=others[TRANSACTION_MAX - 1 :])
        return True
