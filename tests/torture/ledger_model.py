"""A reference model of a ledger: events, deliveries, polls, quarantine, by the protocol's docstrings. Pure.

Where the protocol leaves a choice to the engine (which due deliveries a claim takes), the model states what is
allowed, and takes over what the engine chose.
"""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from submitter.event import Event
from submitter.ledger.base import Delivery, Settlement, Subscription
from tests.torture.model import TaskModel

Key = tuple[str, str, int]
"""A delivery: hook, external_task_id, sequence."""

QUARANTINE_MAX = 5


@dataclass
class DeliveryModel:
    """One delivery. `claims` counts every claim, also those before a replay, which `attempts` does not.

    `error` is None where nothing is promised: after a replay, engines keep or drop the last error.
    """

    due_at_ms: int
    state: str = "due"
    attempts: int = 0
    error: str | None = ""
    claims: int = 0


@dataclass
class Bodies:
    """The quarantined bodies of a task: of each, how often it came and when it came last."""

    times: Counter[bytes] = field(default_factory=Counter)
    last_ms: dict[bytes, int] = field(default_factory=dict)


@dataclass
class LedgerModel:
    """One ledger. `poll_at_ms`: when a poll is due, or (leased) when its lease ends."""

    tasks: dict[str, TaskModel] = field(default_factory=dict)
    poll_at_ms: dict[str, int | None] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)
    outbox: list[tuple[str, int]] = field(default_factory=list)
    deliveries: dict[Key, DeliveryModel] = field(default_factory=dict)
    disabled: dict[str, tuple[str, str]] = field(default_factory=dict)
    paused: dict[str, tuple[int, str]] = field(default_factory=dict)
    quarantine: dict[str, Bodies] = field(default_factory=dict)

    # -- tasks --------------------------------------------------------------------------------

    def open_tasks(self, vendor: str) -> int:
        return sum(task.is_open and task.vendor == vendor for task in self.tasks.values())

    def reserve(self, task: TaskModel, poll_at_ms: int, slots: int | None) -> bool | None:
        """Return whether the call creates the task; None: no slot is free."""
        if task.id in self.tasks:
            return False
        if slots is not None and self.open_tasks(task.vendor) >= slots:
            return None
        self.tasks[task.id], self.poll_at_ms[task.id], self.events[task.id] = task, poll_at_ms, []
        return True

    def store_event(self, event: Event) -> None:
        self.events[event.external_task_id].append(event)
        self.outbox.append((event.external_task_id, event.sequence))

    def due_polls(self, now_ms: int) -> dict[str, int]:
        return {id: at_ms for id, at_ms in self.poll_at_ms.items() if at_ms is not None and at_ms <= now_ms}

    def make_due(self, vendor: str, now_ms: int) -> int:
        known = [one for one in self.tasks.values() if one.is_open and one.vendor == vendor and one.task_id is not None]
        for task in known:
            self.poll_at_ms[task.id] = min(self.poll_at_ms[task.id] or now_ms, now_ms)
        return len(known)

    # -- deliveries ---------------------------------------------------------------------------

    def is_disabled(self, subscription: Subscription) -> bool:
        return self.disabled.get(subscription.hook, ("", ""))[0] == subscription.endpoint_fingerprint

    def empty_outbox(self, subscriptions: Sequence[Subscription], now_ms: int) -> None:
        """Make one delivery of each event for each subscription that wants its type."""
        for id, sequence in self.outbox:
            event = self.events[id][sequence - 1]
            for subscription in subscriptions:
                if subscription.events is not None and event.type not in subscription.events:
                    continue
                made = DeliveryModel(now_ms)
                if self.is_disabled(subscription):
                    made.state, made.error = "dead", f"hook disabled: {self.disabled[subscription.hook][1]}"
                self.deliveries[subscription.hook, id, sequence] = made
        self.outbox.clear()

    def of_hook(self, hook: str, state: str) -> dict[Key, DeliveryModel]:
        return {key: one for key, one in self.deliveries.items() if key[0] == hook and one.state == state}

    def unblocked(self, subscription: Subscription) -> dict[Key, DeliveryModel]:
        """Return the due deliveries of a hook, leased ones too, that no earlier event of their task blocks."""
        due = self.of_hook(subscription.hook, "due")
        if not subscription.ordered:
            return due
        first: dict[str, int] = {}
        for _, id, sequence in due:
            first[id] = min(first.get(id, sequence), sequence)
        return {key: one for key, one in due.items() if key[2] == first[key[1]]}

    def claimable(self, subscription: Subscription, now_ms: int) -> set[Key]:
        return {key for key, one in self.unblocked(subscription).items() if one.due_at_ms <= now_ms}

    def claim(self, key: Key, until_ms: int) -> DeliveryModel:
        one = self.deliveries[key]
        one.attempts, one.claims, one.due_at_ms = one.attempts + 1, one.claims + 1, until_ms
        return one

    def next_due_ms(self, subscriptions: Iterable[Subscription], claimed: Counter[str]) -> int | None:
        """Return when a claim can find something next, at the hooks whose capacity is not used up."""
        times = (
            one.due_at_ms
            for subscription in subscriptions
            if claimed[subscription.hook] < subscription.capacity
            for one in self.unblocked(subscription).values()
        )
        return min(times, default=None)

    def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        """Store the outcome if the claim is held by `attempts`; return whether it was."""
        one = self.deliveries.get(key_of(delivery))
        is_held = one is not None and one.state == "due" and one.attempts == delivery.attempts
        if one is not None and is_held:
            one.state, one.due_at_ms, one.error = settlement.state, settlement.due_at_ms, settlement.error
        if settlement.disable_endpoint is not None:
            self.disabled[delivery.hook] = (settlement.disable_endpoint, settlement.error)
            for due in self.of_hook(delivery.hook, "due").values():
                due.state, due.error = "dead", f"hook disabled: {settlement.error}"
        return is_held

    def replay(self, hook: str, now_ms: int, id: str | None) -> int:
        self.disabled.pop(hook, None)
        dead = [one for key, one in self.of_hook(hook, "dead").items() if id in (None, key[1])]
        for one in dead:
            one.state, one.attempts, one.due_at_ms, one.error = "due", 0, now_ms, None
        return len(dead)

    # -- maintenance --------------------------------------------------------------------------

    def prunable(self, before_ms: int) -> set[str]:
        kept = {id for id, _ in self.outbox} | {id for (_, id, _), one in self.deliveries.items() if one.state == "due"}
        return {
            id for id, task in self.tasks.items() if not task.is_open and task.updated_ms < before_ms and id not in kept
        }

    def forget(self, id: str) -> None:
        for by_id in (self.tasks, self.poll_at_ms, self.events):
            del by_id[id]
        self.deliveries = {key: one for key, one in self.deliveries.items() if key[1] != id}

    def forget_bodies(self, before_ms: int, left: Set[tuple[str, bytes]]) -> None:
        """Forget old bodies, except those that the ledger may leave to the next call."""
        for id, bodies in self.quarantine.items():
            for body in [
                body for body, at_ms in bodies.last_ms.items() if at_ms < before_ms and (id, body) not in left
            ]:
                del bodies.times[body], bodies.last_ms[body]

    def add_body(self, id: str, body: bytes, now_ms: int) -> None:
        """Keep the newest bodies of a task; the newest one takes over the count of those that make room for it."""
        bodies = self.quarantine.setdefault(id, Bodies())
        bodies.times[body] += 1
        bodies.last_ms[body] = now_ms
        while len(bodies.times) > QUARANTINE_MAX:
            oldest = min(bodies.last_ms, key=bodies.last_ms.__getitem__)
            bodies.times[body] += bodies.times.pop(oldest)
            del bodies.last_ms[oldest]

    def counts(self) -> dict[str, int]:
        counts = Counter(f"task.{task.status}" for task in self.tasks.values() if task.is_open)
        for state in ("due", "dead"):
            counts[f"delivery.{state}"] = sum(one.state == state for one in self.deliveries.values())
        counts["quarantine"] = sum(len(bodies.times) for bodies in self.quarantine.values())
        return {name: count for name, count in counts.items() if count}


def key_of(delivery: Delivery) -> Key:
    return delivery.hook, delivery.event.external_task_id, delivery.event.sequence
