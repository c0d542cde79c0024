"""DynamoDB ledger: `dynamodb://table?region=eu-west-1&keep_days=90&shards=8`.

- Optimistic locking: `apply` reads the task, decides, and stores the new state and its event in one transaction, on
  condition that the task's `version` is unchanged. Otherwise it reads and decides again.
- Lost responses: each state change stores a unique write id (attribute `by`). A writer that got no response finds its
  id when it reads the task again.
- Due polls and deliveries are found in a sharded index. The index may lag: this process remembers its own recent
  writes, and each claim is a conditional write of the item.

For keys, items and indexes see `items`.
"""

import asyncio
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count

from submitter.clock import Clock
from submitter.errors import LedgerUnavailable, TaskNotFound
from submitter.event import Event, event_of
from submitter.ledger.base import (
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
from submitter.ledger.changes import Changes
from submitter.ledger.dynamodb.client import open_client
from submitter.ledger.dynamodb.deliveries import Deliveries
from submitter.ledger.dynamodb.hooks import Hooks
from submitter.ledger.dynamodb.items import (
    Item,
    event_item,
    event_key,
    gate_key,
    key,
    key_of,
    number,
    open_task_item,
    open_task_key,
    pointer_item,
    pointer_key,
    read_event,
    read_quarantined,
    read_task,
    shard_of,
    sortable,
    task_item,
    task_key,
    task_partition,
    text,
)
from submitter.ledger.dynamodb.options import Options
from submitter.ledger.dynamodb.queue import IS_DUE, due_at
from submitter.ledger.dynamodb.records import Records
from submitter.ledger.dynamodb.table import Conflict, Table
from submitter.task import Task, TaskStatus
from submitter.transition import Decide

GIVE_UP_AFTER_S = 10.0


class DynamoLedger:
    """The `Ledger` protocol on one DynamoDB table. The first use creates the table if it does not exist."""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        options = Options(url)
        assert options.region is not None
        self._clock = clock or Clock()
        self.client = open_client(options.region, self._clock)
        self._table = Table(self.client, options.table)
        self._shards = options.shards
        self._ttl_s = options.ttl_s
        self._changes = Changes()
        self._hooks = Hooks(self._table)
        self._deliveries = Deliveries(self._table, self._hooks, options.shards, options.ttl_s)
        self._records = Records(self._table, options.shards, options.ttl_s)

    # -- state changes ------------------------------------------------------------------------

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        give_up_at = asyncio.get_running_loop().time() + GIVE_UP_AFTER_S
        write_id, applied = "", None
        for attempt in count():
            found = await self._table.get(task_key(external_task_id))
            if found is None:
                raise TaskNotFound(external_task_id)
            if applied is not None and found["by"]["S"] == write_id:  # it was stored, but the response was lost
                break
            task = read_task(found)
            transition = decide(task)
            if transition is None:
                return Applied(task, None)
            write_id, applied = self._clock.new_id(), Applied(transition.task, transition)
            event = event_of(transition)
            try:
                await self._table.transact(self._change(found, task, transition.task, event, write_id))
                break
            except Conflict as error:
                if asyncio.get_running_loop().time() > give_up_at:
                    reason = f"task {external_task_id!r} was changed by other writers for {GIVE_UP_AFTER_S:g} s"
                    raise LedgerUnavailable(reason) from error
                await self.client.back_off(attempt)
        assert applied is not None
        if event is not None:
            self._deliveries.note_stored([event_key(event)])
        self._changes.wake()
        return applied

    def _change(self, found: Item, before: Task, after: Task, event: Event | None, write_id: str) -> list[Item]:
        """Return the transaction that replaces a task's state, on condition that its version is the one found."""
        version, shard = int(found["version"]["N"]), int(found["shard"]["N"])
        stored = task_item(after, version=version + 1, write_id=write_id, shard=shard, ttl_s=self._ttl_s)
        actions = [self._table.action("Put", "#version = :version", item=stored, version=number(version))]
        if event is not None:
            actions.append(self._table.action("Put", item=event_item(event, shard)))
        open_task = open_task_item(after, shard, after.poll_at_ms)
        if open_task is not None:
            actions.append(self._table.action("Put", item=open_task))
        if open_task is None or before.vendor != after.vendor:
            actions.append(self._table.action("Delete", key=open_task_key(before, shard)))
        pointer = pointer_item(after, self._ttl_s)
        if pointer is not None and (before.vendor, before.task_id) != (after.vendor, after.task_id):
            actions.append(self._table.action("Put", item=pointer))
        return actions

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        shard, write_id = shard_of(task.external_task_id, self._shards), self._clock.new_id()
        give_up_at = asyncio.get_running_loop().time() + GIVE_UP_AFTER_S
        stored = task_item(task, version=0, write_id=write_id, shard=shard, ttl_s=self._ttl_s)
        actions = [self._table.action("Put", "attribute_not_exists(#pk)", item=stored)]
        others = (open_task_item(task, shard, task.poll_at_ms), pointer_item(task, self._ttl_s))
        actions.extend(self._table.action("Put", item=item) for item in others if item is not None)
        for attempt in count():
            if slots is not None or attempt:
                found = await self._table.get(task_key(task.external_task_id))
                if found is not None:
                    return Reserved(read_task(found), is_new=found["by"]["S"] == write_id)
            gate = []
            if slots is not None:
                gate = [await self._gate_update(task.vendor)]
                if await self.open_tasks(task.vendor) >= slots:
                    return None
            try:
                await self._table.transact([*actions, *gate])
            except Conflict as error:
                if asyncio.get_running_loop().time() > give_up_at:
                    reason = f"slots of {task.vendor} were reserved by other writers for {GIVE_UP_AFTER_S:g} s"
                    raise LedgerUnavailable(reason) from error
                await self.client.back_off(attempt)
            else:
                break
        self._changes.wake()
        return Reserved(task, is_new=True)

    async def _gate_update(self, vendor: str) -> Item:
        """Return a conditional write that fails if another reservation with a limit commits in between.

        So two such reservations never count the same free slot. Reservations without a limit, and tasks
        that end, do not conflict.
        """
        found = await self._table.get(gate_key(vendor))
        passed = number(int(found["passed"]["N"]) if found else 0)
        condition = "#passed = :passed" if found else "attribute_not_exists(#passed)"
        values: Item = {"passed": passed} if found else {}
        change = "SET #passed = :next"
        following = number(int(passed["N"]) + 1)
        return self._table.action("Update", condition, change, key=gate_key(vendor), **values, next=following)

    # -- reads --------------------------------------------------------------------------------

    async def get(self, external_task_id: str) -> Task:
        found = await self._table.get(task_key(external_task_id))
        if found is None:
            raise TaskNotFound(external_task_id)
        return read_task(found)

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        return [read_task(item) for item in await self._table.get_many(map(task_key, external_task_ids))]

    async def tasks(
        self, *, status: TaskStatus | None = None, vendor: str | None = None, before_id: str | None = None, limit: int
    ) -> list[Task]:
        values: dict[str, Item] = {}
        if status is not None:
            values["status"] = text(status.value)
        if vendor is not None:
            values["vendor"] = text(vendor)
        filter_by = " AND ".join(f"#{name} = :{name}" for name in values) or None
        where = None
        if before_id is not None:
            before = await self.get(before_id)
            where, values["before"] = "#sort < :before", text(f"{sortable(before.created_at_ms)}#{before_id}")
        found = await asyncio.gather(
            *(
                self._table.query(
                    "newest", f"tasks#{shard}", limit, where=where, filter_by=filter_by, is_newest_first=True, **values
                )
                for shard in range(self._shards)
            )
        )
        newest = sorted((item for items in found for item in items), key=lambda item: str(item["made"]["S"]))[::-1]
        ids = [item["pk"]["S"].removeprefix("T#") for item in newest[:limit]]
        tasks = {task.external_task_id: task for task in await self.get_many(ids)}
        listed = [tasks[id] for id in ids if id in tasks]
        return [task for task in listed if status in (None, task.status) and vendor in (None, task.vendor)]

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        pointers = await self._table.get_many(pointer_key(vendor, task_id) for task_id in task_ids)
        tasks = await self.get_many([pointer["id"]["S"] for pointer in pointers])
        return [task for task in tasks if task.vendor == vendor and task.task_id in task_ids]

    async def open_tasks(self, vendor: str) -> int:
        where, filter_by, prefix = "begins_with(#sort, :vendor)", "attribute_exists(#open)", text(f"{vendor}#")
        shards = range(self._shards)
        counts = (self._table.count(None, f"open#{shard}", where, filter_by, vendor=prefix) for shard in shards)
        return sum(await asyncio.gather(*counts))

    async def events(self, external_task_id: str) -> list[Event]:
        where = "begins_with(#sort, :events)"
        found = await self._table.query(None, task_partition(external_task_id), where=where, events=text("e#"))
        return [read_event(item) for item in found]

    # -- polls --------------------------------------------------------------------------------

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        async def claim(open_task: Item) -> str | None:
            until, queue = text(sortable(now_ms + lease_ms)), open_task["queue"]
            values = {"queue": queue, "until": until, **due_at(now_ms)}
            try:
                item = await self._table.update(key_of(open_task), "SET #at = :until", IS_DUE, **values)
            except Conflict:
                return None
            return str(item["id"]["S"])

        queue = self._deliveries.queue("poll", now_ms)
        ids, _ = await queue.claim(limit, claim)
        if ids:
            queue.note_due(now_ms + lease_ms)
        return Claimed(await self.get_many(ids), queue.next_due_ms)

    async def make_due(self, vendor: str, now_ms: int) -> int:
        async def make_due(open_task: Item) -> bool:
            condition, now = "attribute_exists(#queue) AND attribute_exists(#known)", sortable(now_ms)
            try:
                if open_task["at"]["S"] > now:
                    await self._table.update(key_of(open_task), "SET #at = :now", condition, now=text(now))
            except Conflict:  # the task ended meanwhile
                return False
            return True

        filter_by = "attribute_exists(#open) AND attribute_exists(#queue) AND attribute_exists(#known)"
        where, prefix = "begins_with(#sort, :vendor)", text(f"{vendor}#")
        done = 0
        for shard in range(self._shards):
            async for page in self._table.pages(None, f"open#{shard}", where=where, filter_by=filter_by, vendor=prefix):
                done += sum(await asyncio.gather(*map(make_due, page)))
        self._changes.wake()
        return done

    # -- deliveries ---------------------------------------------------------------------------

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        return await self._deliveries.claim(subscriptions, now_ms, lease_ms)

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        held = await self._deliveries.settle(delivery, settlement, self._clock.now_ms())
        self._changes.wake()
        return held

    async def deliveries(self, *, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        return await self._deliveries.find(hook, state, limit)

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None = None) -> int:
        replayed = await self._deliveries.replay(hook, now_ms, external_task_id)
        self._changes.wake()
        return replayed

    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        await self._hooks.pause(hook, until_ms, reason)

    async def hook_states(self, subscriptions: Iterable[Subscription]) -> list[HookState]:
        return await self._deliveries.states(list(subscriptions))

    async def disabled(self) -> list[Disabled]:
        return await self._hooks.disabled()

    async def disable(self, entry: Disabled) -> None:
        await self._hooks.disable(entry)

    def note_stored(self, keys: Iterable[Item]) -> None:
        """Remember stored items (of the table's stream), so that the next claim finds events that the index lacks."""
        self._deliveries.note_stored(keys)

    # -- quarantine ---------------------------------------------------------------------------

    async def quarantine(self, entry: Quarantined) -> None:
        digest = entry.digest
        id, shard = entry.external_task_id, shard_of(entry.external_task_id, self._shards)
        values: Item = {
            "task": text(id),
            "vendor": text(entry.vendor),
            "received": number(entry.received_at_ms),
            "reason": text(entry.reason),
            "body": {"B": b64encode(entry.body).decode()},
            "list": text(f"quarantine#{shard}"),
            "made": text(f"{sortable(entry.received_at_ms)}#{id}#{digest[:16]}"),
        }
        if self._ttl_s is not None:
            values["ttl"] = number(entry.received_at_ms // 1000 + self._ttl_s)
        fields = ", ".join(f"#{name} = :{name}" for name in values)
        change = f"SET {fields} ADD #times :times"
        stored = key(task_partition(id), f"q#{digest}")
        await self._table.update(stored, change, **values, times=number(entry.times))
        kept = await self._quarantined_of(id)
        older = kept[QUARANTINED_MAX:]
        if older:  # they make room, and their repetitions are added
            others = [item for item in older if key_of(item) != stored]
            times = number(sum(read_quarantined(item).times for item in others))
            with suppress(Conflict):  # newer bodies have made it go too
                await self._table.update(stored, "ADD #times :times", "attribute_exists(pk)", times=times)
            await self._table.write_many(deletes=older)

    async def _quarantined_of(self, id: str) -> list[Item]:
        where = "begins_with(#sort, :prefix)"
        found = await self._table.query(None, task_partition(id), where=where, prefix=text("q#"))
        return sorted(found, key=lambda item: -read_quarantined(item).received_at_ms)

    async def quarantined(self, limit: int, external_task_id: str | None = None) -> list[Quarantined]:
        if external_task_id is not None:
            return [read_quarantined(item) for item in (await self._quarantined_of(external_task_id))[:limit]]
        shards = (
            self._table.query("newest", f"quarantine#{shard}", limit, is_newest_first=True)
            for shard in range(self._shards)
        )
        entries = [entry for found in await asyncio.gather(*shards) for entry in found]
        newest = sorted(entries, key=lambda entry: str(entry["made"]["S"]))[::-1][:limit]
        found = [read_quarantined(item) for item in await self._table.get_many(map(key_of, newest))]
        return sorted(found, key=lambda entry: -entry.received_at_ms)

    async def counts(self) -> Mapping[str, int]:
        totals: Counter[str] = Counter()
        for shard in range(self._shards):
            pages = self._table.pages(None, f"open#{shard}", filter_by="attribute_exists(#open)", fields=["status"])
            async for page in pages:
                totals.update(f"task.{item['status']['S']}" for item in page)
        due, dead = await self._deliveries.totals()
        quarantined = await asyncio.gather(
            *(self._table.count("newest", f"quarantine#{shard}") for shard in range(self._shards))
        )
        return {**totals, "delivery.due": due, "delivery.dead": dead, "quarantine": sum(quarantined)}

    # -- copying, pruning ---------------------------------------------------------------------

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        return await self._records.ids(after_id, limit)

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        return await self._records.read(external_task_ids)

    async def load(self, records: Sequence[Record]) -> None:
        await self._records.load(records)
        await self._hooks.register({one.hook for record in records for one in record.deliveries})

    async def prune(self, before_ms: int, limit: int) -> int:
        return await self._records.prune(before_ms, limit)

    async def check_write(self) -> None:
        await self._table.put(key("health", "write"))

    # -- change notification ------------------------------------------------------------------

    def version(self) -> int:
        return self._changes.version

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        await self._changes.wait(version, timeout_s)

    async def close(self) -> None:
        self._changes.wake()
        self.client.close()
