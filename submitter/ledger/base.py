"""The ledger protocol: durable task state and a transactional outbox, whatever the engine.

Every engine keeps these invariants; `tests/conformance/ledgers.py` checks them:

    state        Only `apply` changes a task's status.
    atomicity    A task's new state and its event are stored in one transaction.
    durability   No method returns before its writes are durable.
    leases       A claim of a poll or a delivery expires by itself after `lease_ms`. The work of a
                 crashed worker is then claimed again: delivery is at least once.
    sharing      Several processes may use one ledger at the same time.

Callers pass the current time as `now_ms`. Times are Unix milliseconds.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from submitter.event import Event
from submitter.schedule import DELAY_MAX_S
from submitter.task import Task, TaskStatus
from submitter.transition import Decide, Transition

T = TypeVar("T")


class Applied(msgspec.Struct, frozen=True):
    """The result of `apply`: the task as it is now, and the stored transition (None: nothing changed)."""

    task: Task
    transition: Transition | None


class Reserved(msgspec.Struct, frozen=True):
    """The result of `reserve`: the stored task, and whether this call created it."""

    task: Task
    is_new: bool


class Subscription(msgspec.Struct, frozen=True):
    """A hook, as `claim_deliveries` needs it.

    `events` are the event types that the hook wants (None: all). `endpoint_fingerprint` identifies
    its endpoint: a disabled hook that moves to another endpoint is enabled again. `capacity` is how
    many deliveries may be claimed for it now. `ordered`: a task's events are delivered one at a
    time, in the order of their `sequence`.
    """

    hook: str
    events: frozenset[str] | None
    endpoint_fingerprint: str
    capacity: int
    ordered: bool = False


HOOK_DISABLED = "hook disabled: "
"""The prefix of a dead delivery's `last_error` when its hook was disabled. The reason follows."""

DeliveryState = Literal["due", "done", "dead"]


class Delivery(msgspec.Struct, frozen=True):
    """One event for one hook. `attempts` counts the claims so far, this one included.

    While it is claimed, it is stored as `due`, with `due_at_ms` at the end of the lease.
    """

    id: int
    hook: str
    event: Event
    state: DeliveryState
    attempts: int
    due_at_ms: int
    last_error: str = ""


class Settlement(msgspec.Struct, frozen=True):
    """The outcome of a claimed delivery: `done`, `dead` (a dead letter), or `due` again at `due_at_ms`.

    `disable_endpoint` is the fingerprint of an endpoint that answered that it is gone: its hook is disabled.
    """

    state: DeliveryState
    due_at_ms: int = 0
    error: str = ""
    disable_endpoint: str | None = None


class Claimed(msgspec.Struct, Generic[T], frozen=True):
    """The result of a claim: the leased items, and when to claim again (None: only after a change).

    `next_due_ms` disregards hooks whose capacity is used up: a settle frees capacity, and is a change.
    """

    items: list[T]
    next_due_ms: int | None


class HookState(msgspec.Struct, frozen=True):
    """A hook's delivery counts and condition.

    `disabled` is the reason why its endpoint is disabled, or None. `paused` is the reason why no
    attempt starts before `paused_until_ms` (its circuit breaker is open), or None.
    """

    hook: str
    due: int = 0
    dead: int = 0
    disabled: str | None = None
    paused: str | None = None
    paused_until_ms: int = 0


AHEAD_MAX_MS = (DELAY_MAX_S + 86_400) * 1000
"""A poll or a delivery that is due later than this from now was leased while a clock was wrong: it is due now."""

QUARANTINED_MAX = 5
"""The bodies that are kept of a task: where nothing is signed, anyone with its callback URL can send any number."""


class Quarantined(msgspec.Struct, frozen=True):
    """An authentic callback body that could not be parsed.

    `times` counts its repetitions, and of the newest body of a task those of older bodies that made room for it.
    """

    external_task_id: str
    vendor: str
    received_at_ms: int
    reason: str
    body: bytes
    times: int = 1

    @property
    def digest(self) -> str:
        """The SHA-256 of the body (hexadecimal). Repetitions are recognised by it."""
        return hashlib.sha256(self.body).hexdigest()


class Record(msgspec.Struct, frozen=True):
    """A task with its events and deliveries, as it is copied from one ledger to another.

    `poll_at_ms` is when the next poll is due (None: never). Delivery ids differ between ledgers: here they are 0.
    """

    task: Task
    poll_at_ms: int | None
    events: list[Event]
    deliveries: list[Delivery]


class Disabled(msgspec.Struct, frozen=True):
    """A hook whose endpoint answered that it is gone, and that answer as the reason."""

    hook: str
    endpoint_fingerprint: str
    reason: str


class Tasks(Protocol):
    """Task state: reserve, apply, read, claim polls, quarantine, wait for changes."""

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        """Insert `task` unless its external_task_id exists; return the stored task.

        Idempotent: of several calls with one id, exactly one creates the task and returns `is_new`.
        With `slots`, a task is created only while its vendor has fewer than `slots` open tasks, and
        None is returned otherwise. Concurrent calls with `slots` never exceed that limit. A task
        that exists is returned even if no slot is free.
        """
        ...

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        """Call `decide` with the task; store the new state that it returns, and its event, in one transaction.

        Changes of one task are serialized: `decide` gets the state that the previous change stored.
        `decide` must be pure: it may run more than once, and in another thread. When it returns
        None, nothing is stored. Raises TaskNotFound and any exception of `decide`; then nothing is
        stored either.
        """
        ...

    async def get(self, external_task_id: str) -> Task:
        """Return the task as last committed; raise TaskNotFound."""
        ...

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        """Return the tasks with these ids, in any order. Ids that do not exist are left out."""
        ...

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        """Return a vendor's tasks by the vendor's own task ids, in any order. Unknown ids are left out."""
        ...

    async def tasks(
        self, *, status: TaskStatus | None = None, vendor: str | None = None, before_id: str | None = None, limit: int
    ) -> list[Task]:
        """Return up to `limit` tasks, newest first: by `created_at_ms`, then by id.

        `before_id` is the last id of the previous page; an unknown one raises TaskNotFound. A listing
        may miss the latest changes where an engine's index lags (DynamoDB).
        """
        ...

    async def open_tasks(self, vendor: str) -> int:
        """Return the number of a vendor's open tasks: those that are reserved and have not ended."""
        ...

    async def events(self, external_task_id: str) -> list[Event]:
        """Return a task's events in the order of their `sequence`."""
        ...

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        """Lease up to `limit` tasks whose poll is due, the longest overdue first.

        No other claim returns a leased task before `now_ms + lease_ms`, unless that is more than AHEAD_MAX_MS from
        its own time: then a clock was ahead, and the next claim may return it. An `apply` that changes the task ends
        the lease: the next poll is then due at the task's own `poll_at_ms`.
        """
        ...

    async def make_due(self, vendor: str, now_ms: int) -> int:
        """Make a poll due now for every open task of a vendor that has a vendor task id; return their number.

        Tasks that are due earlier stay due. A poll lease on such a task ends.
        """
        ...

    async def quarantine(self, entry: Quarantined) -> None:
        """Store a body that could not be parsed. The same body of the same task is stored once: `times` grows."""
        ...

    def version(self) -> int:
        """Return a change counter, to pass to `wait_for_change`."""
        ...

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        """Return once any process committed a change since `version`, or after `timeout_s` seconds (None: no limit).

        A reserve, apply, settle, replay or make_due is noticed at once by this process, and by others
        within a second. The method may return although nothing changed: check, then wait again.
        """
        ...


class Outbox(Protocol):
    """Transactional outbox: turns events into deliveries to hooks, at least once."""

    async def claim_deliveries(
        self, subscriptions: Sequence[Subscription], now_ms: int, lease_ms: int
    ) -> Claimed[Delivery]:
        """Create deliveries for the events in the outbox, then lease due deliveries, up to each hook's `capacity`.

        An event leaves the outbox with one delivery for each subscription that wants its type, even
        when several workers claim at once. The delivery is due, or dead if the hook is disabled.

        No other claim returns a leased delivery before `now_ms + lease_ms`, but for a lease that was taken by a
        clock that was ahead, as with polls. Its incremented `attempts` is durable before it is returned.

        For an ordered hook, a delivery is blocked until every earlier event of its task is done or
        dead. Blocked deliveries take none of the capacity. A hook without capacity delays no other.
        """
        ...

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        """End a claim: store its outcome if the claim is still held, and return whether it was.

        Compare-and-set on `attempts`: nothing is stored if the lease expired and the delivery was
        claimed again, or if the hook was disabled meanwhile. `disable_endpoint` takes effect either
        way: the hook is disabled, and all of its due deliveries become dead.
        """
        ...

    async def deliveries(self, *, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        """Return up to `limit` deliveries, newest first; None does not filter."""
        ...

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None = None) -> int:
        """Make a hook's dead letters due at `now_ms` (of one task, or all) and enable it; return their number.

        Their `attempts` start again at 0.
        """
        ...

    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        """Record that a hook is paused until `until_ms`, or (None) that it is not.

        Only `hook_states` reads it. Claims disregard it: the dispatcher lowers the hook's `capacity`.
        """
        ...

    async def hook_states(self, subscriptions: Iterable[Subscription]) -> list[HookState]:
        """Return the state of each of these hooks, in this order."""
        ...


class Maintenance(Protocol):
    """Operations: list the quarantine, copy to another engine, prune, count, close."""

    async def quarantined(self, limit: int, external_task_id: str | None = None) -> list[Quarantined]:
        """Return up to `limit` quarantined bodies, newest first; with an id, only those of that task."""
        ...

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        """Return up to `limit` task ids in the engine's own order; `after_id` is the last id of the previous page."""
        ...

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        """Return these tasks, which must exist, with their events and deliveries, in this order.

        A record does not show that an event is still in the outbox. Empty the outbox first
        (`claim_deliveries`), or such an event is never delivered from the copy.
        """
        ...

    async def load(self, records: Sequence[Record]) -> None:
        """Store another ledger's `records` in a ledger that no other process uses yet."""
        ...

    async def disabled(self) -> list[Disabled]:
        """Return the disabled hooks, by name."""
        ...

    async def disable(self, entry: Disabled) -> None:
        """Record that a hook is disabled. For copies: in operation, `settle` disables a hook."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` ended tasks that were last updated before `before_ms`; return their number.

        Their events and deliveries are deleted too, and bodies quarantined before `before_ms`. A task
        with an event in the outbox or a due delivery is kept.
        """
        ...

    async def counts(self) -> Mapping[str, int]:
        """Return `task.<status>` for open tasks, `delivery.due`, `delivery.dead` and `quarantine`.

        Ended tasks are not counted: the cost would grow with the ledger.
        """
        ...

    async def check_write(self) -> None:
        """Commit a write that changes nothing; raise LedgerUnavailable if none is possible (full disk, read-only)."""
        ...

    async def close(self) -> None:
        """Finish pending writes, then release connections and threads."""
        ...


class Ledger(Tasks, Outbox, Maintenance, Protocol):
    """The whole protocol. Every method raises LedgerUnavailable when the engine does not answer."""
