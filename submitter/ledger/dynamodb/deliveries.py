"""Outbox and deliveries in DynamoDB: create, claim (lease), settle, replay, list.

Each step is a conditional write of one item, and safe to repeat. The exception is the transaction
that blocks a delivery behind an earlier one (ordered hooks).
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence

from submitter.ledger.base import (
    HOOK_DISABLED,
    Claimed,
    Delivery,
    DeliveryState,
    Disabled,
    HookState,
    Settlement,
    Subscription,
)
from submitter.ledger.dynamodb.hooks import Hooks, disabled_reason, names_in
from submitter.ledger.dynamodb.items import (
    Item,
    delivery_item,
    delivery_key,
    delivery_queue,
    event_key,
    key_of,
    number,
    read_delivery,
    read_event,
    shard_of,
    sortable,
    task_partition,
    text,
)
from submitter.ledger.dynamodb.queue import IS_DUE, Queue, due_at
from submitter.ledger.dynamodb.table import Conflict, Table

RECENT_MAX = 1000  # recent writes kept in memory, for each hook and for events: the index has the others
EVENTS_PER_CLAIM = 400  # events that one claim takes from the outbox
BETWEEN = "#sort BETWEEN :first AND :last"
SEQUENCE_MAX = 9_999_999_999
HOOKS_MAX_AGE_S = 1.0  # a claim may use a registry of this age: one partition serves every worker
SOON_MS = 50  # when to look again for a write that another worker is about to make


class Deliveries:
    """The deliveries of one table. It remembers this process's recent writes, which the index may lack."""

    def __init__(self, table: Table, hooks: Hooks, shards: int, ttl_s: int | None) -> None:
        self._table = table
        self._hooks = hooks
        self._shards = shards
        self._ttl_s = ttl_s
        self._recent_events: deque[Item] = deque(maxlen=RECENT_MAX)
        self._recent: dict[str, deque[Item]] = defaultdict(lambda: deque(maxlen=RECENT_MAX))

    def queue(self, name: str, now_ms: int) -> Queue:
        """Return a queue of the index `due`."""
        return Queue(self._table, name, self._shards, now_ms)

    def note_stored(self, keys: Iterable[Item]) -> None:
        """Remember the events among these stored items, so that the next claim finds them without the index."""
        self._recent_events.extend(key for key in keys if key["sk"]["S"].startswith("e#"))

    # -- claiming -----------------------------------------------------------------------------

    async def claim(self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        """Create deliveries for events in the outbox, then lease due deliveries."""
        registry = await self._hooks.read(max_age_s=HOOKS_MAX_AGE_S)
        await self._hooks.register({subscription.hook for subscription in subscriptions} - set(names_in(registry)))
        reasons = {subscription.hook: disabled_reason(subscription, registry) for subscription in subscriptions}
        has_more = await self._create_deliveries(subscriptions, reasons, now_ms)
        claims = await asyncio.gather(
            *(
                self._claim_for_hook(subscription, reasons[subscription.hook], now_ms, lease_ms)
                for subscription in subscriptions
            )
        )
        next_due = [claim.next_due_ms for claim in claims if claim.next_due_ms is not None]
        if has_more:
            next_due.append(now_ms)
        return Claimed([one for claim in claims for one in claim.items], min(next_due, default=None))

    async def _create_deliveries(
        self, subscriptions: Sequence[Subscription], reasons: Mapping[str, str | None], now_ms: int
    ) -> bool:
        """Create deliveries for the next events in the outbox; return whether there may be more events."""
        recent = [self._recent_events.popleft() for _ in range(min(len(self._recent_events), EVENTS_PER_CLAIM))]
        limit = -(-EVENTS_PER_CLAIM // self._shards)
        shards = range(self._shards)
        found = await asyncio.gather(*(self._table.query("due", f"outbox#{shard}", limit) for shard in shards))
        keys = recent + [key_of(entry) for entries in found for entry in entries]
        events = [item for item in await self._table.get_many(keys) if "queue" in item]
        await asyncio.gather(*(self._create_for_event(item, subscriptions, reasons, now_ms) for item in events))
        return bool(self._recent_events) or any(len(entries) == limit for entries in found)

    async def _create_for_event(
        self, item: Item, subscriptions: Sequence[Subscription], reasons: Mapping[str, str | None], now_ms: int
    ) -> None:
        """Create an event's deliveries, then remove it from the outbox. After a crash in between, both are repeated."""
        event = read_event(item)
        shard = shard_of(event.external_task_id, self._shards)

        async def create(subscription: Subscription) -> None:
            reason = reasons[subscription.hook]
            state: DeliveryState = "due" if reason is None else "dead"
            error = "" if reason is None else f"{HOOK_DISABLED}{reason}"
            created = delivery_item(Delivery(0, subscription.hook, event, state, 0, now_ms, error), shard)
            try:
                await self._table.put(created, "attribute_not_exists(#pk)")
            except Conflict:  # another worker created it
                return
            if state == "due":
                self._recent[subscription.hook].append(created)

        await asyncio.gather(
            *(
                create(subscription)
                for subscription in subscriptions
                if subscription.events is None or event.type in subscription.events
            )
        )
        change, values = "REMOVE #queue, #at", {}
        if self._ttl_s is not None:
            change, values = f"{change} SET #ttl = :ttl", {"ttl": number(now_ms // 1000 + self._ttl_s)}
        try:
            await self._table.update(event_key(event), change, "attribute_exists(#queue)", **values)
        except Conflict:  # another worker removed it
            return

    async def _claim_for_hook(
        self, subscription: Subscription, reason: str | None, now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        if reason is not None:
            await self._dead_letter_all(subscription.hook, reason, now_ms)
        if reason is not None or subscription.capacity <= 0:
            return Claimed([], None)
        queue = self.queue(f"due#{subscription.hook}", now_ms)
        until_ms = now_ms + lease_ms

        async def claim(entry: Item) -> Delivery | None:
            try:
                if subscription.ordered and not await self._is_unblocked(entry, subscription.hook, queue, now_ms):
                    return None
                item = await self._table.update(
                    key_of(entry),
                    "SET #attempts = #attempts + :one, #at = :until, #due = :due, #ordered = :ordered",
                    IS_DUE,
                    queue=entry["queue"],
                    **due_at(now_ms),
                    one=number(1),
                    until=text(sortable(until_ms)),
                    due=number(until_ms),
                    ordered={"BOOL": subscription.ordered},
                )
            except Conflict:
                return None
            return read_delivery(item)

        items = self._recent.pop(subscription.hook, ())
        recent = sorted(items, key=lambda item: (item["at"]["S"], item["pk"]["S"], item["sk"]["S"]))
        claimed, untried = await queue.claim(subscription.capacity, claim, recent)
        self._recent[subscription.hook].extend(untried)
        if len(claimed) == subscription.capacity:  # a settle wakes the caller
            return Claimed(claimed, None)
        if claimed:
            queue.note_due(until_ms)
        return Claimed(claimed, queue.next_due_ms)

    async def _is_unblocked(self, entry: Item, hook: str, queue: Queue, now_ms: int) -> bool:
        """Return whether every earlier event of the task is done or dead at this hook.

        A blocked delivery moves in the index behind the one that blocks it, out of the way of other claims.
        """
        pk, sequence = entry["pk"]["S"], int(entry["sk"]["S"][-10:])
        if sequence == 1:
            return True
        deliveries, events = await asyncio.gather(
            *(
                self._table.query(None, pk, where=BETWEEN, **_span(start, 0, sequence - 1))
                for start in (f"d#{hook}#", "e#")
            )
        )
        if any("queue" in event for event in events):  # in the outbox: a worker is about to create its delivery
            queue.note_due(now_ms + SOON_MS)
            return False
        blocker = next((item for item in deliveries if item["state"]["S"] == "due"), None)
        if blocker is None:
            return True
        if blocker["at"]["S"] <= sortable(now_ms):  # it is being claimed
            self._recent[hook].append(entry)
        else:
            await self._table.transact(self._block(entry, blocker, now_ms))
        return False

    def _block(self, entry: Item, blocker: Item, now_ms: int) -> list[Item]:
        """Return the writes that block a delivery behind another, provided that the other is still due."""
        later, now = blocker["at"], text(sortable(now_ms))
        condition, change = "#queue = :queue AND #at <= :now", "SET #at = :later, #waits = :waits"
        values = {"queue": entry["queue"], "now": now, "later": later, "waits": {"BOOL": True}}
        still_due = "#state = :due AND #at = :later"
        return [
            self._table.action("Update", condition, change, key=key_of(entry), **values),
            self._table.action("ConditionCheck", still_due, key=key_of(blocker), due=text("due"), later=later),
        ]

    # -- settling -----------------------------------------------------------------------------

    async def settle(self, delivery: Delivery, settlement: Settlement, now_ms: int) -> bool:
        """Store a claim's outcome if it is still held, and return whether it was; unblock the task's next delivery."""
        item = await self._store_outcome(delivery, settlement, now_ms)
        if settlement.disable_endpoint is not None:
            await self._hooks.disable(Disabled(delivery.hook, settlement.disable_endpoint, settlement.error))
            await self._dead_letter_all(delivery.hook, settlement.error, now_ms)
        if item is not None and item.get("ordered", {}).get("BOOL") and settlement.state != "due":
            await self._unblock_next(item)
        return item is not None

    async def _store_outcome(self, delivery: Delivery, settlement: Settlement, now_ms: int) -> Item | None:
        item_key, attempts = delivery_key(delivery), number(delivery.attempts)
        condition = "#state = :held AND #attempts = :claimed"
        try:
            return await self._set_state(item_key, settlement, condition, now_ms, held=text("due"), claimed=attempts)
        except Conflict:  # the claim is lost, or this very call stored the outcome and its response was lost
            item = await self._table.get(item_key)
            outcome = (text(settlement.state), number(settlement.due_at_ms), text(settlement.error), attempts)
            if item is None or tuple(item[name] for name in ("state", "due", "error", "attempts")) != outcome:
                return None
            return item

    async def _set_state(
        self,
        item_key: Item,
        settlement: Settlement,
        condition: str,
        now_ms: int,
        *,
        attempts: int | None = None,
        **values: Item,
    ) -> Item:
        """Store a delivery's state, its position in the index and (unless None) its attempts in one write."""
        state, due_at_ms = settlement.state, settlement.due_at_ms
        change = "SET #state = :state, #due = :due_at, #error = :error"
        values |= {"state": text(state), "due_at": number(due_at_ms), "error": text(settlement.error)}
        if attempts is not None:
            change += ", #attempts = :attempts"
            values["attempts"] = number(attempts)
        if state == "due":
            change += ", #queue = :queue, #at = :at"
            values |= {"queue": text(self._queue_of(item_key, "due")), "at": text(sortable(due_at_ms))}
        elif state == "dead":
            change += ", #queue = :queue, #at = #made"
            values["queue"] = text(self._queue_of(item_key, "dead"))
        if state != "due" and self._ttl_s is not None:
            change += ", #ttl = :ttl"
            values["ttl"] = number(now_ms // 1000 + self._ttl_s)
        removed = ["#waits", *(["#ttl"] if state == "due" else []), *(["#queue", "#at"] if state == "done" else [])]
        return await self._table.update(item_key, f"{change} REMOVE {', '.join(removed)}", condition, **values)

    def _queue_of(self, item_key: Item, state: DeliveryState) -> str:
        """Return the queue in the index `due` of the delivery with this key."""
        hook, external_task_id = item_key["sk"]["S"][2:-11], item_key["pk"]["S"].removeprefix("T#")
        return delivery_queue(hook, state, shard_of(external_task_id, self._shards))

    async def _unblock_next(self, settled: Item) -> None:
        """Make the delivery that is blocked behind a settled one due now."""
        pk, sk = settled["pk"]["S"], settled["sk"]["S"]
        later = await self._table.query(None, pk, where=BETWEEN, **_span(sk[:-10], int(sk[-10:]) + 1, SEQUENCE_MAX))
        blocked = next((item for item in later if item["state"]["S"] == "due"), None)
        if blocked is None or "waits" not in blocked:
            return
        change, condition = "SET #at = :now REMOVE #waits", "#state = :due AND attribute_exists(#waits)"
        now = text(sortable(0))
        try:
            item = await self._table.update(key_of(blocked), change, condition, now=now, due=text("due"))
        except Conflict:
            return
        self._recent[settled["hook"]["S"]].append(item)

    async def _dead_letter_all(self, hook: str, reason: str, now_ms: int) -> None:
        """Make every due delivery of a disabled hook dead."""
        dead = Settlement("dead", error=f"{HOOK_DISABLED}{reason}")

        async def dead_letter(entry: Item) -> None:
            try:
                await self._set_state(key_of(entry), dead, "#state = :held", now_ms, held=text("due"))
            except Conflict:
                return

        await asyncio.gather(*map(dead_letter, self._recent.pop(hook, ())))
        for shard in range(self._shards):
            async for page in self._table.pages("due", f"due#{hook}#{shard}"):
                await asyncio.gather(*map(dead_letter, page))

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None) -> int:
        """Make a hook's dead letters due again and enable it; return their number."""
        due = Settlement("due", due_at_ms=now_ms)

        async def revive(entry: Item) -> bool:
            try:
                item = await self._set_state(
                    key_of(entry), due, "#state = :held", now_ms, attempts=0, held=text("dead")
                )
            except Conflict:
                return False
            self._recent[hook].append(item)
            return True

        await self._hooks.enable(hook)
        if external_task_id is not None:
            where, prefix = "begins_with(#sort, :prefix)", text(f"d#{hook}#")
            found = await self._table.query(None, task_partition(external_task_id), where=where, prefix=prefix)
            return sum(await asyncio.gather(*map(revive, found)))
        replayed = 0
        for shard in range(self._shards):
            async for page in self._table.pages("due", f"dead#{hook}#{shard}"):
                replayed += sum(await asyncio.gather(*map(revive, page)))
        return replayed

    # -- reads --------------------------------------------------------------------------------

    async def find(self, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        """Return deliveries, newest first. Dead letters come from the index `due`, others from `newest`."""
        if state == "dead":
            hooks = [hook] if hook is not None else names_in(await self._hooks.read())
            queues = [("due", f"dead#{name}#{shard}") for name in hooks for shard in range(self._shards)]
            values: dict[str, Item] = {}
        else:
            queues = [("newest", f"deliveries#{shard}") for shard in range(self._shards)]
            values = {name: text(value) for name, value in (("hook", hook), ("state", state)) if value is not None}
        filter_by = " AND ".join(f"#{name} = :{name}" for name in values) or None
        lists = (
            self._table.query(index, name, limit, filter_by=filter_by, is_newest_first=True, **values)
            for index, name in queues
        )
        keys = [key_of(entry) for entries in await asyncio.gather(*lists) for entry in entries]
        items = sorted(await self._table.get_many(keys), key=lambda item: (item["made"]["S"], item["hook"]["S"]))[::-1]
        found = [read_delivery(item) for item in items if state in (None, item["state"]["S"])]
        return found[:limit]

    async def states(self, subscriptions: Sequence[Subscription]) -> list[HookState]:
        """Return the state of each hook, in this order."""
        registry = await self._hooks.read()

        async def state(subscription: Subscription) -> HookState:
            due, dead = await asyncio.gather(
                self._count("due", subscription.hook), self._count("dead", subscription.hook)
            )
            paused = registry.get(f"paused#{subscription.hook}")
            reason, until_ms = (None, 0) if paused is None else (paused["reason"]["S"], int(paused["until"]["N"]))
            return HookState(subscription.hook, due, dead, disabled_reason(subscription, registry), reason, until_ms)

        return await asyncio.gather(*map(state, subscriptions))

    async def totals(self) -> tuple[int, int]:
        """Return the numbers of due and of dead deliveries of all hooks."""
        hooks = names_in(await self._hooks.read())
        due = await asyncio.gather(*(self._count("due", hook) for hook in hooks))
        dead = await asyncio.gather(*(self._count("dead", hook) for hook in hooks))
        return sum(due), sum(dead)

    async def _count(self, state: DeliveryState, hook: str) -> int:
        queues = (delivery_queue(hook, state, shard) for shard in range(self._shards))
        return sum(await asyncio.gather(*(self._table.count("due", queue) for queue in queues)))


def _span(prefix: str, first: int, last: int) -> Item:
    return {"first": text(f"{prefix}{first:010d}"), "last": text(f"{prefix}{last:010d}")}
