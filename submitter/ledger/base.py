"""What a ledger promises, whatever keeps it.

The law: `apply` is the only door to a task's status. A task's new state and its event are one
transaction, and no method returns before that is durable. A claim is a lease: it ends by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from submitter.errors import InvalidSettings, Problem
from submitter.event import Event
from submitter.task import Decide, Task, TaskStatus, Transition

T = TypeVar("T")


class Applied(msgspec.Struct, frozen=True):
    """What `apply` did: the task as it is now, and the transition, or None when nothing changed."""

    task: Task
    transition: Transition | None


class Reserved(msgspec.Struct, frozen=True):
    """What `reserve` did: the task with this id, and whether this call made it."""

    task: Task
    is_new: bool


class Route(msgspec.Struct, frozen=True):
    """A hook as the ledger sees it: its name, the event types it wants (None: all), a fingerprint
    of where it leads, how many deliveries may be claimed for it now, and whether a task's events
    go one after the other, each once the one before it has ended.
    """

    hook: str
    events: frozenset[str] | None
    target: str
    room: int
    ordered: bool = False


DeliveryState = Literal["due", "done", "dead"]


class Delivery(msgspec.Struct, frozen=True):
    """One event on its way to one hook. `attempts` counts those begun, this one included."""

    id: int
    hook: str
    event: Event
    state: DeliveryState
    attempts: int
    due_at_ms: int
    last_error: str = ""


class Settlement(msgspec.Struct, frozen=True):
    """How a claimed delivery ended: `done`, `dead`, or `due` again at `due_at_ms`.

    `disable_target` names the target that said it is gone: its hook gets nothing more.
    """

    state: DeliveryState
    due_at_ms: int = 0
    error: str = ""
    disable_target: str | None = None


class Claimed(msgspec.Struct, Generic[T], frozen=True):
    """What a claim got, and when it is worth claiming again (Unix milliseconds; None: on a change)."""

    items: list[T]
    next_due_ms: int | None


class HookState(msgspec.Struct, frozen=True):
    """What the ledger knows of one hook. `disabled` is the reason, or None; `paused` is why nothing
    is attempted before `paused_until_ms`, or None.
    """

    hook: str
    due: int = 0
    dead: int = 0
    disabled: str | None = None
    paused: str | None = None
    paused_until_ms: int = 0


class Quarantined(msgspec.Struct, frozen=True):
    """An authentic body that could not be understood; `times` counts its repetitions."""

    external_task_id: str
    vendor: str
    received_at_ms: int
    reason: str
    body: bytes
    times: int = 1


class Record(msgspec.Struct, frozen=True):
    """A task with everything that hangs on it, as it moves from one ledger to another.

    `poll_at_ms` is when it is asked about next. The deliveries' ids are each ledger's own: 0 here.
    """

    task: Task
    poll_at_ms: int | None
    events: list[Event]
    deliveries: list[Delivery]


class Disabled(msgspec.Struct, frozen=True):
    """A hook whose target said that it is gone, and how."""

    hook: str
    target: str
    reason: str


class Ledger(Protocol):
    """The protocol. Every method raises LedgerUnavailable when the engine cannot answer."""

    async def reserve(self, task: Task, slots: int | None = None) -> Reserved | None:
        """Store `task` unless its id exists; return the stored one.

        With `slots`, a new task is stored only while fewer than that many tasks of its vendor
        are between reservation and end; None is returned when there is no room.
        """
        ...

    async def apply(self, external_task_id: str, decide: Decide) -> Applied:
        """Call `decide` with the task and store what it returns, with its event, as one transaction.

        `decide` is pure and may be called more than once. Raises TaskNotFound, and whatever
        `decide` raises; then nothing was stored.
        """
        ...

    async def get(self, external_task_id: str) -> Task:
        """Return the task; raise TaskNotFound."""
        ...

    async def get_many(self, external_task_ids: Sequence[str]) -> list[Task]:
        """Return those of these tasks that exist, in any order."""
        ...

    async def by_task_ids(self, vendor: str, task_ids: Sequence[str]) -> list[Task]:
        """Return those of a vendor's tasks that it knows by these ids, in any order."""
        ...

    async def tasks(
        self, *, status: TaskStatus | None = None, vendor: str | None = None, before_id: str | None = None, limit: int
    ) -> list[Task]:
        """Return tasks, the newest first; `before_id` continues behind that task."""
        ...

    async def open_tasks(self, vendor: str) -> int:
        """Return how many of a vendor's tasks are between reservation and end."""
        ...

    async def events(self, external_task_id: str) -> list[Event]:
        """Return a task's events in their order."""
        ...

    async def claim_polls(self, now_ms: int, lease_ms: int, limit: int) -> Claimed[Task]:
        """Return tasks whose poll is due, the longest overdue first; no other claim returns them for `lease_ms`."""
        ...

    async def hasten(self, vendor: str, now_ms: int) -> int:
        """Make every open task that the vendor has due for a poll now, and return how many there are."""
        ...

    async def claim_deliveries(self, routes: Sequence[Route], now_ms: int, lease_ms: int) -> Claimed[Delivery]:
        """Make deliveries of the events that no hook was given yet, then claim those that are due.

        Each route gets at most `room`. An event goes to every route that wants it; one that is
        disabled gets it as dead. An ordered route gets no delivery while an earlier one of the same
        task is due or under way. Each attempt counted is durable before it is returned.
        """
        ...

    async def settle(self, delivery: Delivery, settlement: Settlement) -> bool:
        """End a claim; return False when it was no longer held (its lease ended and another took it)."""
        ...

    async def deliveries(self, *, hook: str | None, state: DeliveryState | None, limit: int) -> list[Delivery]:
        """Return deliveries, the newest first."""
        ...

    async def replay(self, hook: str, now_ms: int, external_task_id: str | None = None) -> int:
        """Make a hook's dead deliveries due again (one task's, or all), enable it, return how many."""
        ...

    async def pause(self, hook: str, until_ms: int | None, reason: str = "") -> None:
        """Note that nothing is attempted for a hook before `until_ms`, or (None) that it is again."""
        ...

    async def hook_states(self, routes: Iterable[Route]) -> list[HookState]:
        """Return what is known of each of these hooks."""
        ...

    async def quarantine(self, entry: Quarantined) -> None:
        """Keep a body; the same body of the same task is kept once and counted."""
        ...

    async def quarantined(self, limit: int) -> list[Quarantined]:
        """Return what is in quarantine, the newest first."""
        ...

    async def ids(self, after_id: str | None, limit: int) -> list[str]:
        """Return the tasks' ids, in the ledger's own order; `after_id` continues behind that task."""
        ...

    async def records(self, external_task_ids: Sequence[str]) -> list[Record]:
        """Return these tasks, which exist, with all that hangs on them, in this order.

        Of an event that no hook was given yet, nothing tells: give it to them first (`claim_deliveries`).
        """
        ...

    async def load(self, records: Sequence[Record]) -> None:
        """Store what another ledger's `records` returned. For a ledger that nobody uses."""
        ...

    async def disabled(self) -> list[Disabled]:
        """Return the hooks that are disabled."""
        ...

    async def disable(self, entry: Disabled) -> None:
        """Note that a hook is disabled."""
        ...

    async def prune(self, before_ms: int, limit: int) -> int:
        """Delete up to `limit` tasks that have ended and were not updated since `before_ms`; return how many.

        Their events and deliveries go with them, and what quarantine keeps of that time. A task with
        an event still on its way to a hook stays.
        """
        ...

    async def counts(self) -> Mapping[str, int]:
        """Return how many open tasks there are by `task.<status>`, and `delivery.due`,
        `delivery.dead` and `quarantine`. What has ended is not counted: that would cost more each day.
        """
        ...

    def mark(self) -> int:
        """Return a mark of the ledger's present state, to wait from."""
        ...

    async def changed(self, mark: int, timeout_s: float | None) -> None:
        """Return once any process has committed something since `mark`, or after `timeout_s` seconds."""
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of the engine."""
        ...


def shown(url: str) -> str:
    """Return a ledger's URL without its password and its options, for logs and messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")
    user = f"{host[0].partition(':')[0]}@" if host[1] else ""
    return f"{parts.scheme}://{user}{host[2]}{parts.path}"


def open_ledger(url: str) -> Ledger:
    """Open the ledger that `url` names; raise InvalidSettings, naming the remedy.

    `sqlite:///relative.db` or `sqlite:////absolute.db`; `postgresql://user:password@host/database?schema=...`;
    `dynamodb://table?region=...`.
    """
    scheme = urlsplit(url).scheme
    if scheme == "dynamodb":
        from submitter.ledger.dynamodb import DynamoLedger

        return DynamoLedger(url)
    if scheme == "sqlite" and url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        from submitter.ledger.sqlite import SqliteLedger

        return SqliteLedger(url.removeprefix("sqlite:///"))
    if scheme in ("postgresql", "postgres"):
        try:
            from submitter.ledger.postgres import PostgresLedger
        except ImportError as error:
            remedy = "Install it: pip install 'kling-relay[postgres]'."
            problem = Problem("KLING_RELAY_LEDGER", f"{scheme}://", f"needs the extra `postgres` ({error})", remedy)
            raise InvalidSettings([problem]) from error

        return PostgresLedger(url)
    remedy = "Use sqlite:///relay.db, sqlite:////an/absolute/path.db, or one of the others."
    limit = "sqlite:///path, postgresql://user:password@host/database or dynamodb://table?region=..."
    raise InvalidSettings([Problem("KLING_RELAY_LEDGER", f"scheme {scheme!r}", limit, remedy)])
