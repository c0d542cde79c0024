"""The ledger in DynamoDB: `dynamodb://table?region=eu-west-1&keep_days=90&shards=8`.

A change is decided between a read and one transaction: the task, if its version is still the one
that was read, with its event. Where somebody else was faster, it is decided again. Each write
carries a name of its own, so that one whose answer was lost is known again when the task is read.

What is due is found by sharded indexes. These lag behind the table, so what this process wrote
itself it remembers, and each claim is a condition on the item. Items: see `dynamodb_items`.
"""

import asyncio
import hashlib
import os
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from urllib.parse import parse_qsl, urlsplit

from submitter.clock import Clock
from submitter.errors import InvalidSettings, LedgerUnavailable, Problem, TaskNotFound
from submitter.event import Event, event_of
from submitter.ledger.base import (
    Applied,
    Claimed,
    Delivery,
    DeliveryState,
    Disabled,
    HookState,
    Quarantined,
    Record,
    Reserved,
    Route,
    Settlement,
)
from submitter.ledger.changes import Changes
from submitter.ledger.dynamodb_client import DynamoClient, find_credentials
from submitter.ledger.dynamodb_deliveries import Deliveries
from submitter.ledger.dynamodb_items import (
    DAY_S,
    Item,
    event_item,
    event_key,
    family,
    gate_key,
    key,
    key_of,
    moment,
    number,
    pointer_item,
    pointer_key,
    read_event,
    read_quarantined,
    read_task,
    shard_of,
    task_item,
    task_key,
    text,
    watch_item,
    watch_key,
)
from submitter.ledger.dynamodb_records import Records
from submitter.ledger.dynamodb_table import Conflict, Table
from submitter.task import Decide, Task, TaskStatus

SHARDS, SHARDS_MAX = 8, 256
KEEP_DAYS_MIN = 7  # longer than a hook's schedule lasts
GIVE_UP_AFTER_S = 10.0


class Options:
    """What the URL says: the table, its region, into how many parts it is spread, how long it keeps what ended."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        asked = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.table = parts.netloc
        self.region = asked.pop("region", None) or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        shards, keep_days = asked.pop("shards", str(SHARDS)), asked.pop("keep_days", None)
        found = []
        if not re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", self.table) or parts.path not in ("", "/"):
            found.append(_problem(f"table {self.table + parts.path!r}", "3 to 255 of A-Z a-z 0-9 _ . -", "Mend it."))
        if self.region is None or not re.fullmatch(r"[a-z0-9-]{3,40}", self.region):
            found.append(_problem(f"region {self.region!r}", "an AWS region", "Give ?region=..., or set AWS_REGION."))
        if not shards.isdecimal() or not 1 <= int(shards) <= SHARDS_MAX:
            found.append(_problem(f"shards {shards!r}", f"1 to {SHARDS_MAX}", "Mend ?shards=..."))
        if keep_days is not None and not (keep_days.isdecimal() and int(keep_days) >= KEEP_DAYS_MIN):
            limit = f"{KEEP_DAYS_MIN} days or more"
            found.append(_problem(f"keep_days {keep_days!r}", limit, "Mend ?keep_days=..., or leave it out."))
        if asked:
            known = "region, shards, keep_days"
            found.append(_problem(f"unknown options {', '.join(sorted(asked))}", known, "Mend the URL."))
        if found:
            raise InvalidSettings(found)
        self.shards = int(shards)
        self.ttl_s = None if keep_days is None else int(keep_days) * DAY_S


def _problem(value: str, limit: str, remedy: str) -> Problem:
    return Problem("KLING_RELAY_LEDGER", value, limit, remedy)


class DynamoLedger:
    """The `Ledger` protocol on one DynamoDB table, which is made at the first use if it is not there."""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        options = Options(url)
        assert options.region is not None
        self._clock = clock or Clock()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_DYNAMODB") or os.environ.get("AWS_ENDPOINT_URL")
        self.client = DynamoClient(options.region, endpoint, find_credentials(os.environ), self._clock)
        self._table = Table(self.client, options.table)
        self._shards = options.shards
        self._ttl_s = options.ttl_s
        self._changes = Changes()
        self._deliveries = Deliveries(self._table, options.shards, options.ttl_s)
        self._records = Records(self._table, options.shards, options.ttl_s)

    # -- the one door -------------------------------------------------------------------------

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        give_up_at = asyncio.get_running_loop().time() + GIVE_UP_AFTER_S
        by, made = "", None
        for attempt in count():
            found = await self._table.get(task_key(external_task_id))
            if found is None:
                raise TaskNotFound(external_task_id)
            if made is not None and found["by"]["S"] == by:  # it was stored, and the answer lost
                break
            task = read_task(found)
            transition = decide(task)
            if transition is None:
                return Applied(task, None)
            by, made = self._clock.new_id(), Applied(transition.task, transition)
            event = event_of(transition)
            try:
                await self._table.transact(self._change(found, task, transition.task, event, by))
                break
            except Conflict as error:
                if asyncio.get_running_loop().time() > give_up_at:
                    raise LedgerUnavailable(f"too many others change {external_task_id!r}") from error
                await self.client.back_off(attempt)
        assert made is not None
        if event is not None:
            self._deliveries.note_stored([event_key(event)])
        self._changes.wake()
        return made

    def _change(self, found: Item, before: Task, after: Task, event: Event | None, by: str) -> list[Item]:
        """Return the writes that make one task of another, if it is still as it was found."""
        version, shard = int(found["version"]["N"]), int(found["shard"]["N"])
        stored = task_item(after, version=version + 1, by=by, shard=shard, ttl_s=self._ttl_s)
        actions = [self._table.action("Put", "#version = :version", item=stored, version=number(version))]
        if event is not None:
            actions.append(self._table.action("Put", item=event_item(event, shard)))
        watched = watch_item(after, shard, after.poll_at_ms)
        if watched is not None:
            actions.append(self._table.action("Put", item=watched))
        if watched is None or before.vendor != after.vendor:
            actions.append(self._table.action("Delete", key=watch_key(before, shard)))
        pointer = pointer_item(after, self._ttl_s)
        if pointer is not None and (before.vendor, before.task_id) != (after.vendor, after.task_id):
            actions.append(self._table.action("Put", item=pointer))
        return actions

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        shard, by = shard_of(task.external_task_id, self._shards), self._clock.new_id()
        give_up_at = asyncio.get_running_loop().time() + GIVE_UP_AFTER_S
        stored = task_item(task, version=0, by=by, shard=shard, ttl_s=self._ttl_s)
        actions = [self._table.action("Put", "attribute_not_exists(#pk)", item=stored)]
        beside = (watch_item(task, shard, task.poll_at_ms), pointer_item(task, self._ttl_s))
        actions.extend(self._table.action("Put", item=item) for item in beside if item is not None)
        for attempt in count():
            if slots is not None or attempt:
                found = await self._table.get(task_key(task.external_task_id))
                if found is not None:
                    return Reserved(read_task(found), is_new=found["by"]["S"] == by)
            gate = []
            if slots is not None:
                gate = [await self._pass_gate(task.vendor)]
                if await self.open_tasks(task.vendor) >= slots:
                    return None
            try:
                await self._table.transact([*actions, *gate])
            except Conflict as error:
                if asyncio.get_running_loop().time() > give_up_at:
                    raise LedgerUnavailable(f"too many others reserve tasks of {task.vendor}") from error
                await self.client.back_off(attempt)
            else:
                break
        self._changes.wake()
        return Reserved(task, is_new=True)

    async def _pass_gate(self, vendor: str) -> Item:
        """Return the write that holds only if nobody else reserves with a limit between now and then.

        Tasks are counted by reading them all; reservations without a limit, and ends, may come in between.
        """
        found = await self._table.get(gate_key(vendor))
        passed = number(int(found["passed"]["N"]) if found else 0)
        condition = "#passed = :passed" if found else "attribute_not_exists(#passed)"
        values: Item = {"passed": passed} if found else {}
        change = "SET #passed = :next"
        following = number(int(passed["N"]) + 1)
        return self._table.action("Update", condition, change, key=gate_key(vendor), **values, next=following)

    # -- reading ------------------------------------------------------------------------------

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
        asked: dict[str, Item] = {}
        if status is not None:
            asked["status"] = text(status.value)
        if vendor is not None:
            asked["vendor"] = text(vendor)
        only = " AND ".join(f"#{name} = :{name}" for name in asked) or None
        where = None
        if before_id is not None:
            before = await self.get(before_id)
            where, asked["before"] = "#sort < :before", text(f"{moment(before.created_at_ms)}#{before_id}")
        found = await asyncio.gather(
            *(
                self._table.query(
                    "newest", f"tasks#{shard}", limit, where=where, only=only, is_newest_first=True, **asked
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
        where, only, prefix = "begins_with(#sort, :vendor)", "attribute_exists(#open)", text(f"{vendor}#")
        shards = range(self._shards)
        counts = (self._table.count(None, f"open#{shard}", where, only, vendor=prefix) for shard in shards)
        return sum(await asyncio.gather(*counts))

    async def events(self, external_task_id: str) -> list[Event]:
        where = "begins_with(#sort, :events)"
        found = await self._table.query(None, family(external_task_id), where=where, events=text("e#"))
        return [read_event(item) for item in found]

    # -- polls --------------------------------------------------------------------------------

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        async def take(watched: Item) -> str | None:
            until, queue = text(moment(now_ms + lease_ms)), watched["queue"]
            condition, change = "#queue = :queue AND #at <= :now", "SET #at = :until"
            try:
                item = await self._table.update(
                    key_of(watched), change, condition, queue=queue, now=text(moment(now_ms)), until=until
                )
            except Conflict:
                return None
            return str(item["id"]["S"])

        queue = self._deliveries.queue("poll", now_ms)
        ids, _ = await queue.claim(limit, take)
        if ids:
            queue.note_due(now_ms + lease_ms)
        return Claimed(await self.get_many(ids), queue.next_due_ms)

    async def hasten(self, vendor: str, now_ms: int) -> int:
        async def hasten(watched: Item) -> bool:
            condition = "attribute_exists(#queue) AND attribute_exists(#known)"
            try:
                if watched["at"]["S"] > moment(now_ms):
                    await self._table.update(key_of(watched), "SET #at = :now", condition, now=text(moment(now_ms)))
            except Conflict:  # it has just ended
                return False
            return True

        only = "attribute_exists(#open) AND attribute_exists(#queue) AND attribute_exists(#known)"
        where, prefix = "begins_with(#sort, :vendor)", text(f"{vendor}#")
        done = 0
        for shard in range(self._shards):
            async for page in self._table.pages(None, f"open#{shard}", where=where, only=only, vendor=prefix):
                done += sum(await asyncio.gather(*map(hasten, page)))
        self._changes.wake()
        return done

    # -- deliveries ---------------------------------------------------------------------------

    async def claim_deliveries(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        return await self._deliveries.claim(routes, now_ms, lease_ms)

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
        await self._deliveries.pause(hook, until_ms, reason)

    async def hook_states(self, routes: Iterable[Route]) -> list[HookState]:
        return await self._deliveries.states(list(routes))

    async def disabled(self) -> list[Disabled]:
        return await self._deliveries.disabled()

    async def disable(self, entry: Disabled) -> None:
        await self._deliveries.disable(entry)

    def note_stored(self, keys: Iterable[Item]) -> None:
        """Note the keys of items that the table's stream shows: those of events need not wait for the index."""
        self._deliveries.note_stored(keys)

    # -- quarantine, counts -------------------------------------------------------------------

    async def quarantine(self, entry: Quarantined) -> None:
        digest = hashlib.sha256(entry.body).hexdigest()
        id, shard = entry.external_task_id, shard_of(entry.external_task_id, self._shards)
        values: Item = {
            "task": text(id),
            "vendor": text(entry.vendor),
            "received": number(entry.received_at_ms),
            "reason": text(entry.reason),
            "body": {"B": b64encode(entry.body).decode()},
            "list": text(f"quarantine#{shard}"),
            "made": text(f"{moment(entry.received_at_ms)}#{id}#{digest[:16]}"),
        }
        if self._ttl_s is not None:
            values["ttl"] = number(entry.received_at_ms // 1000 + self._ttl_s)
        fields = ", ".join(f"#{name} = :{name}" for name in values)
        change = f"SET {fields} ADD #times :times"
        await self._table.update(key(family(id), f"q#{digest}"), change, **values, times=number(entry.times))

    async def quarantined(self, limit: int) -> list[Quarantined]:
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
            pages = self._table.pages(None, f"open#{shard}", only="attribute_exists(#open)", fields=["status"])
            async for page in pages:
                totals.update(f"task.{item['status']['S']}" for item in page)
        due, dead = await self._deliveries.totals()
        kept = await asyncio.gather(
            *(self._table.count("newest", f"quarantine#{shard}") for shard in range(self._shards))
        )
        return {**totals, "delivery.due": due, "delivery.dead": dead, "quarantine": sum(kept)}

    # -- whole records ------------------------------------------------------------------------

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        return await self._records.ids(after_id, limit)

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        return await self._records.read(external_task_ids)

    async def load(self, records: Sequence[Record]) -> None:
        await self._records.load(records)
        await self._deliveries.register({one.hook for record in records for one in record.deliveries})

    async def prune(self, before_ms: int, limit: int) -> int:
        return await self._records.prune(before_ms, limit)

    # -- waiting ------------------------------------------------------------------------------

    def mark(self) -> int:
        return self._changes.mark

    async def changed(self, mark: int, timeout_s: float | None) -> None:
        await self._changes.wait(mark, timeout_s)

    async def close(self) -> None:
        self._changes.wake()
        self.client.close()
