"""Deliveries in DynamoDB: events of the outbox become deliveries, which are claimed, settled and listed.

Nothing here needs a transaction but making a delivery wait for the one before it: every step is
a condition on one item, and one that is made twice changes nothing.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from submitter.ledger.base import Claimed, Delivery, DeliveryState, Disabled, HookState, Route, Settlement
from submitter.ledger.dynamodb_items import (
    Item,
    delivery_item,
    delivery_key,
    event_key,
    family,
    key,
    key_of,
    moment,
    number,
    place_of,
    read_delivery,
    read_event,
    shard_of,
    text,
)
from submitter.ledger.dynamodb_queue import Queue
from submitter.ledger.dynamodb_table import Conflict, Table

FRESH_MAX = 1000  # what is remembered of each kind: the index shows the rest a moment later
ROUTE_MAX = 400  # events that one claim gives to hooks
BETWEEN = "#sort BETWEEN :first AND :last"
SEQUENCE_MAX = 9_999_999_999
KNOWN_FOR_S = 1.0  # how long a claim stands on what was read of the hooks: one partition holds them all
SOON_MS = 50  # when to look again for what somebody else is about to do


class Deliveries:
    """The deliveries of one table. `fresh` is what was written here and the index may not show yet."""

    def __init__(self, table: Table, shards: int, ttl_s: int | None) -> None:
        self._table = table
        self._shards = shards
        self._ttl_s = ttl_s
        self._last_known: dict[str, Item] | None = None
        self._read_s = 0.0
        self._fresh_events: deque[Item] = deque(maxlen=FRESH_MAX)
        self._fresh: dict[str, deque[Item]] = defaultdict(lambda: deque(maxlen=FRESH_MAX))

    def queue(self, name: str, now_ms: int) -> Queue:
        """Return a queue of the index `due`."""
        return Queue(self._table, name, self._shards, now_ms)

    def note_stored(self, keys: Iterable[Item]) -> None:
        """Note items that were stored; the hooks of those that are events need not wait for the index."""
        self._fresh_events.extend(key for key in keys if key["sk"]["S"].startswith("e#"))

    # -- claiming -----------------------------------------------------------------------------

    async def claim(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        """Make deliveries of events that have none, and claim what is due."""
        known = await self._known(max_age_s=KNOWN_FOR_S)
        await self.register({route.hook for route in routes} - set(self._hooks_of(known)))
        reasons = {route.hook: _disabled(route, known) for route in routes}
        more = await self._route(routes, reasons, now_ms)
        claims = await asyncio.gather(*(self._claim(route, reasons[route.hook], now_ms, lease_ms) for route in routes))
        next_due = [claim.next_due_ms for claim in claims if claim.next_due_ms is not None] + ([now_ms] if more else [])
        return Claimed([one for claim in claims for one in claim.items], min(next_due, default=None))

    async def _route(self, routes: Sequence[Route], reasons: Mapping[str, str | None], now_ms: int) -> bool:
        """Give events of the outbox to their hooks; return whether there may be more than were taken."""
        fresh = [self._fresh_events.popleft() for _ in range(min(len(self._fresh_events), ROUTE_MAX))]
        limit = -(-ROUTE_MAX // self._shards)
        shards = range(self._shards)
        found = await asyncio.gather(*(self._table.query("due", f"outbox#{shard}", limit) for shard in shards))
        keys = fresh + [key_of(entry) for entries in found for entry in entries]
        events = [item for item in await self._table.get_many(keys) if "queue" in item]
        await asyncio.gather(*(self._give(item, routes, reasons, now_ms) for item in events))
        return bool(self._fresh_events) or any(len(entries) == limit for entries in found)

    async def _give(self, item: Item, routes: Sequence[Route], reasons: Mapping[str, str | None], now_ms: int) -> None:
        """Make an event's deliveries, then take it from the outbox: whoever dies in between is repeated."""
        event = read_event(item)
        shard = shard_of(event.external_task_id, self._shards)

        async def make(route: Route) -> None:
            reason = reasons[route.hook]
            state: DeliveryState = "due" if reason is None else "dead"
            error = "" if reason is None else f"hook disabled: {reason}"
            made = delivery_item(Delivery(0, route.hook, event, state, 0, now_ms, error), shard)
            try:
                await self._table.put(made, "attribute_not_exists(#pk)")
            except Conflict:  # somebody else does the same
                return
            if state == "due":
                self._fresh[route.hook].append(made)

        await asyncio.gather(*(make(route) for route in routes if route.events is None or event.type in route.events))
        change, values = "REMOVE #queue, #at", {}
        if self._ttl_s is not None:
            change, values = f"{change} SET #ttl = :ttl", {"ttl": number(now_ms // 1000 + self._ttl_s)}
        try:
            await self._table.update(event_key(event), change, "attribute_exists(#queue)", **values)
        except Conflict:
            return

    async def _claim(self, route: Route, reason: str | None, now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        if reason is not None:
            await self._bury(route.hook, reason, now_ms)
        if reason is not None or route.room <= 0:
            return Claimed([], None)
        queue = self.queue(f"due#{route.hook}", now_ms)
        until_ms = now_ms + lease_ms

        async def take(entry: Item) -> Delivery | None:
            try:
                if route.ordered and not await self._is_its_turn(entry, route.hook, queue, now_ms):
                    return None
                item = await self._table.update(
                    key_of(entry),
                    "SET #attempts = #attempts + :one, #at = :until, #due = :due, #ordered = :ordered",
                    "#queue = :queue AND #at <= :now",
                    queue=entry["queue"],
                    now=text(moment(now_ms)),
                    one=number(1),
                    until=text(moment(until_ms)),
                    due=number(until_ms),
                    ordered={"BOOL": route.ordered},
                )
            except Conflict:
                return None
            return read_delivery(item)

        fresh = self._fresh.pop(route.hook, ())
        hints = sorted(fresh, key=lambda item: (item["at"]["S"], item["pk"]["S"], item["sk"]["S"]))
        claimed, untried = await queue.claim(route.room, take, hints)
        self._fresh[route.hook].extend(untried)
        if len(claimed) == route.room:  # the end of one wakes the caller
            return Claimed(claimed, None)
        if claimed:
            queue.note_due(until_ms)
        return Claimed(claimed, queue.next_due_ms)

    async def _is_its_turn(self, entry: Item, hook: str, queue: Queue, now_ms: int) -> bool:
        """Tell whether no earlier event of the task is on its way to the hook, or to come.

        One that must wait is put behind the one that it waits for, so that it is in nobody's way.
        """
        pk, sequence = entry["pk"]["S"], int(entry["sk"]["S"][-10:])
        if sequence == 1:
            return True
        earlier, unrouted = await asyncio.gather(
            *(
                self._table.query(None, pk, where=BETWEEN, **_span(start, 0, sequence - 1))
                for start in (f"d#{hook}#", "e#")
            )
        )
        if any("queue" in event for event in unrouted):  # somebody else is about to
            queue.note_due(now_ms + SOON_MS)
            return False
        before = next((item for item in earlier if item["state"]["S"] == "due"), None)
        if before is None:
            return True
        if before["at"]["S"] <= moment(now_ms):  # it is being claimed
            self._fresh[hook].append(entry)
        else:
            await self._table.transact(self._wait(entry, before, now_ms))
        return False

    def _wait(self, entry: Item, before: Item, now_ms: int) -> list[Item]:
        """Return the writes that make a delivery wait for another, if that is still on its way."""
        later, now = before["at"], text(moment(now_ms))
        condition, change = "#queue = :queue AND #at <= :now", "SET #at = :later, #waits = :waits"
        values = {"queue": entry["queue"], "now": now, "later": later, "waits": {"BOOL": True}}
        still = "#state = :due AND #at = :later"
        return [
            self._table.action("Update", condition, change, key=key_of(entry), **values),
            self._table.action("ConditionCheck", still, key=key_of(before), due=text("due"), later=later),
        ]

    # -- settling -----------------------------------------------------------------------------

    async def settle(self, delivery: Delivery, settlement: Settlement, now_ms: int) -> bool:
        """End a claim, if it is still held; let the next event of its task go on."""
        item = await self._end(delivery, settlement, now_ms)
        if settlement.disable_target is not None:
            await self.disable(Disabled(delivery.hook, settlement.disable_target, settlement.error))
            await self._bury(delivery.hook, settlement.error, now_ms)
        if item is not None and item.get("ordered", {}).get("BOOL") and settlement.state != "due":
            await self._let_on(item)
        return item is not None

    async def _end(self, delivery: Delivery, settlement: Settlement, now_ms: int) -> Item | None:
        at, attempts = delivery_key(delivery), number(delivery.attempts)
        condition = "#state = :held AND #attempts = :taken"
        try:
            return await self._become(at, settlement, condition, now_ms, held=text("due"), taken=attempts)
        except Conflict:  # or it was ended by this very call, whose first answer was lost
            found = await self._table.get(at)
            ended = (text(settlement.state), number(settlement.due_at_ms), text(settlement.error), attempts)
            if found is None or tuple(found[name] for name in ("state", "due", "error", "attempts")) != ended:
                return None
            return found

    async def _become(
        self,
        at: Item,
        settlement: Settlement,
        condition: str,
        now_ms: int,
        *,
        attempts: int | None = None,
        **values: Item,
    ) -> Item:
        """Store a delivery's state, with its place in the index (and how many attempts it had), as one write."""
        state, due_at_ms = settlement.state, settlement.due_at_ms
        change = "SET #state = :state, #due = :due_at, #error = :error"
        values |= {"state": text(state), "due_at": number(due_at_ms), "error": text(settlement.error)}
        if attempts is not None:
            change += ", #attempts = :attempts"
            values["attempts"] = number(attempts)
        if state == "due":
            change += ", #queue = :place, #at = :at"
            values |= {"place": text(self._place(at, "due")), "at": text(moment(due_at_ms))}
        elif state == "dead":
            change += ", #queue = :place, #at = #made"
            values["place"] = text(self._place(at, "dead"))
        if state != "due" and self._ttl_s is not None:
            change += ", #ttl = :ttl"
            values["ttl"] = number(now_ms // 1000 + self._ttl_s)
        gone = ["#waits", *(["#ttl"] if state == "due" else []), *(["#queue", "#at"] if state == "done" else [])]
        return await self._table.update(at, f"{change} REMOVE {', '.join(gone)}", condition, **values)

    def _place(self, at: Item, state: DeliveryState) -> str:
        """Return the index's queue for a delivery, by its key."""
        return place_of(at["sk"]["S"][2:-11], state, shard_of(at["pk"]["S"].removeprefix("T#"), self._shards))

    async def _let_on(self, ended: Item) -> None:
        """Make the delivery that waits for one that has ended due now."""
        pk, sk = ended["pk"]["S"], ended["sk"]["S"]
        later = await self._table.query(None, pk, where=BETWEEN, **_span(sk[:-10], int(sk[-10:]) + 1, SEQUENCE_MAX))
        waiting = next((item for item in later if item["state"]["S"] == "due"), None)
        if waiting is None or "waits" not in waiting:
            return
        at = key_of(waiting)
        change, condition = "SET #at = :now REMOVE #waits", "#state = :due AND attribute_exists(#waits)"
        try:
            item = await self._table.update(at, change, condition, now=text(moment(0)), due=text("due"))
        except Conflict:
            return
        self._fresh[ended["hook"]["S"]].append(item)

    async def _bury(self, hook: str, reason: str, now_ms: int) -> None:
        """Make everything that is due for a disabled hook a dead letter."""

        async def bury(entry: Item) -> None:
            at = key_of(entry)
            try:
                await self._become(at, dead, "#state = :held", now_ms, held=text("due"))
            except Conflict:
                return

        dead = Settlement("dead", error=f"hook disabled: {reason}")
        await asyncio.gather(*map(bury, self._fresh.pop(hook, ())))
        for shard in range(self._shards):
            async for page in self._table.pages("due", f"due#{hook}#{shard}"):
                await asyncio.gather(*map(bury, page))

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None) -> int:
        """Make dead letters due again, and enable the hook; return how many there were."""

        async def revive(entry: Item) -> bool:
            at = key_of(entry)
            again = Settlement("due", due_at_ms=now_ms)
            try:
                item = await self._become(at, again, "#state = :held", now_ms, attempts=0, held=text("dead"))
            except Conflict:
                return False
            self._fresh[hook].append(item)
            return True

        await self._table.delete(key("hooks", f"disabled#{hook}"))
        self._last_known = None
        if external_task_id is not None:
            where, prefix = "begins_with(#sort, :prefix)", text(f"d#{hook}#")
            found = await self._table.query(None, family(external_task_id), where=where, prefix=prefix)
            return sum(await asyncio.gather(*map(revive, found)))
        replayed = 0
        for shard in range(self._shards):
            async for page in self._table.pages("due", f"dead#{hook}#{shard}"):
                replayed += sum(await asyncio.gather(*map(revive, page)))
        return replayed

    # -- listing, hooks -----------------------------------------------------------------------

    async def find(self, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        """Return deliveries, the newest first. The dead are found among the dead, others among all."""
        if state == "dead":
            hooks = [hook] if hook is not None else self._hooks_of(await self._known())
            queues = [("due", f"dead#{name}#{shard}") for name in hooks for shard in range(self._shards)]
            asked: dict[str, Item] = {}
        else:
            queues = [("newest", f"deliveries#{shard}") for shard in range(self._shards)]
            asked = {name: text(value) for name, value in (("hook", hook), ("state", state)) if value is not None}
        only = " AND ".join(f"#{name} = :{name}" for name in asked) or None
        lists = (
            self._table.query(index, name, limit, only=only, is_newest_first=True, **asked) for index, name in queues
        )
        keys = [key_of(entry) for found in await asyncio.gather(*lists) for entry in found]
        items = sorted(await self._table.get_many(keys), key=lambda item: (item["made"]["S"], item["hook"]["S"]))[::-1]
        found = [read_delivery(item) for item in items if state in (None, item["state"]["S"])]
        return found[:limit]

    async def states(self, routes: Sequence[Route]) -> list[HookState]:
        """Return what is known of each hook."""
        known = await self._known()

        async def state(route: Route) -> HookState:
            due, dead = await asyncio.gather(self._total("due", route.hook), self._total("dead", route.hook))
            paused = known.get(f"paused#{route.hook}")
            reason, until_ms = (None, 0) if paused is None else (paused["reason"]["S"], int(paused["until"]["N"]))
            return HookState(route.hook, due, dead, _disabled(route, known), reason, until_ms)

        return await asyncio.gather(*map(state, routes))

    async def totals(self) -> tuple[int, int]:
        """Return how many deliveries of all hooks are due, and how many dead."""
        hooks = self._hooks_of(await self._known())
        due = await asyncio.gather(*(self._total("due", hook) for hook in hooks))
        dead = await asyncio.gather(*(self._total("dead", hook) for hook in hooks))
        return sum(due), sum(dead)

    async def _total(self, state: DeliveryState, hook: str) -> int:
        queues = (place_of(hook, state, shard) for shard in range(self._shards))
        return sum(await asyncio.gather(*(self._table.count("due", queue) for queue in queues)))

    async def pause(self, hook: str, until_ms: int | None, reason: str) -> None:
        """Note a pause, or its end."""
        at = key("hooks", f"paused#{hook}")
        if until_ms is None:
            await self._table.delete(at)
        else:
            await self._table.put({**at, "until": number(until_ms), "reason": text(reason)})

    async def disabled(self) -> list[Disabled]:
        """Return the hooks that are disabled, by their names."""
        known = await self._known()
        found = [(sk.partition("#")[2], item) for sk, item in known.items() if sk.startswith("disabled#")]
        return [Disabled(hook, item["target"]["S"], item["reason"]["S"]) for hook, item in sorted(found)]

    async def disable(self, entry: Disabled) -> None:
        """Note that a hook is disabled."""
        at = key("hooks", f"disabled#{entry.hook}")
        await self._table.put({**at, "target": text(entry.target), "reason": text(entry.reason)})
        self._last_known = None

    async def register(self, hooks: Collection[str]) -> None:
        """Note that there are deliveries of these hooks, so that they are counted."""
        if hooks:
            await asyncio.gather(*(self._table.put(key("hooks", f"hook#{hook}")) for hook in hooks))
            self._last_known = None

    async def _known(self, *, max_age_s: float = 0) -> dict[str, Item]:
        """Return what is known of hooks, by the items' sort keys; what others wrote since `max_age_s` may miss."""
        now_s = asyncio.get_running_loop().time()
        if self._last_known is None or now_s - self._read_s >= max_age_s:
            self._read_s = now_s
            self._last_known = {item["sk"]["S"]: item for item in await self._table.query(None, "hooks")}
        return self._last_known

    def _hooks_of(self, known: Iterable[str]) -> list[str]:
        return [sk.removeprefix("hook#") for sk in known if sk.startswith("hook#")]


def _disabled(route: Route, known: Mapping[str, Item]) -> str | None:
    item = known.get(f"disabled#{route.hook}")
    return None if item is None or item["target"]["S"] != route.target else str(item["reason"]["S"])


def _span(prefix: str, first: int, last: int) -> Item:
    return {"first": text(f"{prefix}{first:010d}"), "last": text(f"{prefix}{last:010d}")}
