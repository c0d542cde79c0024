"""A ledger beside its model: each call goes to both, and each difference is an error that names it."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from submitter.event import Event
from submitter.ledger import Ledger
from submitter.ledger.base import Applied, Delivery, Quarantined, Settlement, Subscription
from submitter.ledger.copying import copy
from submitter.task import Task
from submitter.transition import Transition
from tests.torture.comparison import MANY, Broken, Comparison, check
from tests.torture.engines import Store
from tests.torture.ledger_model import Key, LedgerModel, key_of
from tests.torture.model import copy_of
from tests.torture.observations import Seen, decide, differences, new_model, new_task, predict
from tests.torture.sequences import broken_rules

T = TypeVar("T")


class Claim(msgspec.Struct, frozen=True):
    """A delivery that a worker holds; `number` is the number of this claim of it."""

    delivery: Delivery
    number: int


class CheckedLedger:
    """Two handles of one store, as two processes have them, and the model of the store.

    `is_sound`: everything was read and compared after the last call.
    """

    def __init__(self, store: Store, hooks: Sequence[Subscription], counts: Counter[str]) -> None:
        self.runner = asyncio.Runner()
        self.store, self.hooks, self.counts = store, list(hooks), counts
        self.handles: list[Ledger] = []
        self.model = LedgerModel()
        self.stored: dict[str, Task] = {}
        self.claims: list[Claim] = []
        self._comparison = Comparison()
        self._event_ids: dict[str, str] = {}
        self._checks = 0
        self.is_sound = False
        self._open_store(store)

    def _open_store(self, store: Store) -> None:
        async def opened() -> list[Ledger]:
            return [store.open(), store.open()]

        self.store, self.handles = store, self.run(opened())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        self.is_sound = False
        return self.runner.run(work)

    def run_both(self, *work: Coroutine[Any, Any, T]) -> list[T]:
        async def both() -> list[T]:
            return await asyncio.gather(*work)

        return self.run(both())

    def close(self) -> None:
        for handle in self.handles:
            self.run(handle.close())
        self.run(self.store.drop())
        self.runner.close()

    def reopen(self, which: int) -> None:
        async def again() -> Ledger:
            await self.handles[which].close()
            return self.store.open()

        self.handles[which] = self.run(again())

    # -- tasks --------------------------------------------------------------------------------

    def reserve(self, which: int, id: str, vendor: str, request: str, slots: int | None, now_ms: int) -> None:
        task = new_task(id, now_ms, vendor, request)
        expected = self.model.reserve(new_model(id, now_ms, vendor, request), now_ms + 10_000, slots)
        found = self.run(self.handles[which].reserve(task, slots))
        check(f"reserve of {id} with {slots} slots", None if found is None else found.is_new, expected)
        if found is not None:
            self.stored.setdefault(id, task)
            check(f"the task that reserve of {id} returns", found.task, self.stored[id])

    def apply(self, which: int, id: str, seen: Seen, now_ms: int) -> None:
        expected = copy_of(self.model.tasks[id])
        event_type = predict(expected, seen, now_ms)
        applied = self.run(self.handles[which].apply(id, decide(seen, now_ms)))
        self._check_applied(id, seen, applied, now_ms)
        check(f"the fields of {id} after {seen} (expected, found)", differences(expected, applied.task), {})
        check(f"the event of {seen} on {id}", applied.transition and applied.transition.event_type, event_type)
        self.model.tasks[id] = expected
        self._take_over(id, applied.task, [event_type] if event_type else [], applied.transition is not None)

    def apply_two(self, id: str, seen: tuple[Seen, Seen], now_ms: int) -> None:
        """Two processes observe something about one task at once: the result is as in one of the two orders."""
        orders = []
        for order in (seen, seen[::-1]):
            expected = copy_of(self.model.tasks[id])
            types = [predict(expected, one, now_ms) for one in order]
            orders.append((expected, [type for type in types if type is not None]))
        both = (handle.apply(id, decide(one, now_ms)) for handle, one in zip(self.handles, seen, strict=True))
        is_changed = any(applied.transition is not None for applied in self.run_both(*both))
        task = self.run(self.handles[0].get(id))
        found = [event.type for event in self.run(self.handles[0].events(id))[self.model.tasks[id].sequence :]]
        for expected, expected_types in orders:
            if not differences(expected, task) and found == expected_types:
                self.model.tasks[id] = expected
                self._take_over(id, task, found, is_changed)
                return
        raise Broken(f"{id} after {seen} at once is as after neither order: {task}, with the new events {found}")

    def refuse_decision(self, which: int, id: str) -> None:
        """A decision that raises changes nothing, and its caller gets the exception."""

        def fails(_: Task) -> Transition | None:
            raise ZeroDivisionError

        try:
            self.run(self.handles[which].apply(id, fails))
        except ZeroDivisionError:
            return
        raise Broken(f"apply to {id} swallowed the exception of its decision")

    def _check_applied(self, id: str, seen: Seen, applied: Applied, now_ms: int) -> None:
        before = self.stored[id]
        decided = decide(seen, now_ms)(before)
        moved = decided or Transition(before)
        check(f"what apply to {id} returns", applied, Applied(moved.task, decided))
        check(f"the rules that {seen} broke on {id}", broken_rules(before, moved, seen.at(now_ms), now_ms), [])

    def _take_over(self, id: str, task: Task, types: Sequence[str], is_changed: bool) -> None:
        """Store what the model leaves to the product: when to poll, and the bodies of the new events."""
        if is_changed:
            self.stored[id] = task
            self.model.poll_at_ms[id] = task.poll_at_ms
            self.model.tasks[id].updated_ms = task.updated_at_ms
        events = self.run(self.handles[0].events(id))
        known = self.model.events[id]
        check(f"the sequences of {id}'s events", [one.sequence for one in events], list(range(1, task.sequence + 1)))
        check(f"the earlier events of {id}", events[: len(known)], known)
        check(f"the types of {id}'s new events", [one.type for one in events[len(known) :]], list(types))
        for event in events[len(known) :]:
            self._check_event(event, task)
            self.model.store_event(event)

    def _check_event(self, event: Event, task: Task) -> None:
        body = msgspec.json.decode(event.body)
        name = f"{event.external_task_id} #{event.sequence}, created at {task.created_at_ms}"
        found = (body["id"], body["type"], body["subject"], int(body["sequence"]), event.time_ms)
        expected = (event.id, event.type, task.external_task_id, event.sequence, task.updated_at_ms)
        check(f"the body of event {name}", found, expected)
        used = self._event_ids.setdefault(event.id, name)
        if used != name:
            check(f"the event that has the id of {name}", used.partition(",")[0], name.partition(",")[0])
            self.counts["event ids of a pruned task used again"] += 1

    # -- polls --------------------------------------------------------------------------------

    def claim_polls(self, which: int, now_ms: int, lease_ms: int, limit: int) -> None:
        due = self.model.due_polls(now_ms)
        claimed = self.run(self.handles[which].claim_polls(now_ms, lease_ms, limit))
        ids = [task.external_task_id for task in claimed.items]
        check("polls that are claimed although they are not due, or twice", [id for id in ids if id not in due], [])
        check("the due times of the claimed polls", sorted(due[id] for id in set(ids)), sorted(due.values())[:limit])
        for task in claimed.items:
            check("a task whose poll is claimed", task, self.stored[task.external_task_id])
            self.model.poll_at_ms[task.external_task_id] = now_ms + lease_ms
        times = [at_ms for at_ms in self.model.poll_at_ms.values() if at_ms is not None]
        self._check_next_due("poll", claimed.next_due_ms, min(times, default=None))

    def make_due(self, which: int, vendor: str, now_ms: int) -> None:
        expected = self.model.make_due(vendor, now_ms)
        check(f"make_due of {vendor}", self.run(self.handles[which].make_due(vendor, now_ms)), expected)

    def _check_next_due(self, what: str, found: int | None, expected: int | None) -> None:
        if self.store.is_sql:
            check(f"when the next {what} is due", found, expected)
        elif expected is not None and (found is None or found > expected):
            raise Broken(f"the next {what} is due at {expected}, and a claim says {found}: it could wait for ever")

    # -- deliveries ---------------------------------------------------------------------------

    def with_capacities(self, capacities: Sequence[int]) -> list[Subscription]:
        pairs = zip(self.hooks, capacities, strict=True)
        return [msgspec.structs.replace(hook, capacity=capacity) for hook, capacity in pairs]

    def claim(self, which: int, capacities: Sequence[int], now_ms: int, lease_ms: int) -> int:
        subscriptions = self.with_capacities(capacities)
        self.model.empty_outbox(subscriptions, now_ms)
        claimable = {hook.hook: self.model.claimable(hook, now_ms) for hook in subscriptions}
        claimed = self.run(self.handles[which].claim_deliveries(subscriptions, now_ms, lease_ms))
        by_hook = self._hold(claimed.items, claimable, now_ms + lease_ms)
        for hook in subscriptions:
            most = min(hook.capacity, len(claimable[hook.hook]))
            check(f"how many deliveries a claim of {hook.hook} got", by_hook[hook.hook], most)
        self._check_next_due("delivery", claimed.next_due_ms, self.model.next_due_ms(subscriptions, by_hook))
        return len(claimed.items)

    def claim_two(self, capacities: Sequence[int], now_ms: int, lease_ms: int) -> None:
        """Two workers claim at once: none gets what the other one got; one of them may leave something."""
        subscriptions = self.with_capacities(capacities)
        self.model.empty_outbox(subscriptions, now_ms)
        claimable = {hook.hook: self.model.claimable(hook, now_ms) for hook in subscriptions}
        both = (handle.claim_deliveries(subscriptions, now_ms, lease_ms) for handle in self.handles)
        claims = self.run_both(*both)
        by_hook = self._hold([one for claim in claims for one in claim.items], claimable, now_ms + lease_ms)
        for hook in subscriptions:
            if by_hook[hook.hook] > 2 * hook.capacity:
                raise Broken(f"two claims of {hook.hook} with capacity {hook.capacity} got {by_hook[hook.hook]}")

    def _hold(self, items: Iterable[Delivery], claimable: dict[str, set[Key]], until_ms: int) -> Counter[str]:
        by_hook: Counter[str] = Counter()
        free = set().union(*claimable.values())
        for delivery in items:
            key = key_of(delivery)
            if key not in free:
                raise Broken(f"a claim got {key}, which is not due, leased, blocked or claimed twice: {delivery}")
            free.remove(key)
            by_hook[delivery.hook] += 1
            one = self.model.claim(key, until_ms)
            check(f"the attempts of the claimed {key}", delivery.attempts, one.attempts)
            check(f"the event of the claimed {key}", delivery.event, self.model.events[key[1]][key[2] - 1])
            self.claims.append(Claim(delivery, one.claims))
        return by_hook

    def settle(self, which: int, claim: Claim, settlement: Settlement) -> None:
        key = key_of(claim.delivery)
        one = self.model.deliveries.get(key)
        is_old = one is not None and one.claims != claim.number and one.attempts == claim.delivery.attempts
        expected = self.model.settle(claim.delivery, settlement)
        found = self.run(self.handles[which].settle(claim.delivery, settlement))
        if is_old and expected:  # `attempts` starts again at a replay: the number of a claim from before it can return
            self.counts["settles by a claim from before a replay"] += 1
        if not is_old or self.store.is_sql:
            check(f"whether claim {claim.number} of {key} was still held", found, expected)

    def replay(self, which: int, hook: str, now_ms: int, id: str | None) -> None:
        expected = self.model.replay(hook, now_ms, id)
        check(f"replay of {hook}", self.run(self.handles[which].replay(hook, now_ms, id)), expected)

    def move_hook(self, name: str, endpoint: str) -> None:
        self.hooks = [
            msgspec.structs.replace(hook, endpoint_fingerprint=endpoint) if hook.hook == name else hook
            for hook in self.hooks
        ]

    def pause(self, which: int, hook: str, until_ms: int | None) -> None:
        self.run(self.handles[which].pause(hook, until_ms, "HTTP 500"))
        self.model.paused.pop(hook, None)
        if until_ms is not None:
            self.model.paused[hook] = (until_ms, "HTTP 500")

    # -- maintenance --------------------------------------------------------------------------

    def quarantine(self, which: int, id: str, body: bytes, now_ms: int) -> None:
        self.model.add_body(id, body, now_ms)
        self.run(self.handles[which].quarantine(Quarantined(id, "kling", now_ms, "unknown status", body)))

    def prune(self, which: int, before_ms: int, limit: int) -> None:
        prunable = self.model.prunable(before_ms)
        count = self.run(self.handles[which].prune(before_ms, limit))
        left = set(self.run(self.handles[which].ids(None, MANY)))
        gone = self.model.tasks.keys() - left
        check("how many tasks were pruned", (count, len(gone)), (min(limit, len(prunable)),) * 2)
        check("pruned tasks that must be kept", gone - prunable, set())
        for id in gone:
            self.model.forget(id)
            del self.stored[id]
        self.claims = [one for one in self.claims if one.delivery.event.external_task_id not in gone]
        self._comparison.forget(gone)
        left_bodies: set[tuple[str, bytes]] = set()
        if count == limit and not self.store.is_sql:  # DynamoDB stops at the limit; a later call prunes other bodies
            entries = self.run(self.handles[which].quarantined(MANY))
            left_bodies = {(one.external_task_id, one.body) for one in entries}
        self.model.forget_bodies(before_ms, left_bodies)

    def move_to_copy(self, now_ms: int) -> None:
        """Empty the outbox, copy the ledger into an empty one, and go on with the copy; pauses are not copied."""
        self.claim(0, [0] * len(self.hooks), now_ms, 0)
        target = self.store.another()

        async def copied() -> None:
            into = target.open()
            try:
                await copy(self.handles[0], into)
            finally:
                await into.close()
            for handle in self.handles:
                await handle.close()
            await self.store.drop()

        self.run(copied())
        self._open_store(target)
        self.claims, self._comparison = [], Comparison()
        self.model.paused.clear()

    # -- invariants ---------------------------------------------------------------------------

    def check_all(self) -> None:
        """Read everything through one of the two processes, and compare it with the model."""
        self._checks += 1
        reader = self.handles[self._checks % 2]
        self.run(self._comparison.compare(reader, self.model, self.stored, self.hooks))
        self.is_sound = True
