"""A hook: one subscriber of task events, and its retry schedule. Pure."""

import hashlib
from typing import TYPE_CHECKING

import msgspec

from receiver.signature import Secret
from submitter.ledger.base import Subscription

if TYPE_CHECKING:
    from jmespath.parser import ParsedResult

EVENTS = (
    "task.submitted",
    "task.processing",
    "task.succeed",
    "task.failed",
    "task.refused",
    "task.archived",
    "task.abandoned",
    "task.submission_unknown",
)
TEST = "task.test"
"""The event that `kling-relay hooks test` sends. It is about no real task."""

PROGRESS = frozenset({"task.submitted", "task.processing"})
"""The events that `latest_only` drops once their task has a later event."""

MINUTE, HOUR = 60, 3600
SCHEDULE_S = (0, 5, MINUTE, 5 * MINUTE, 30 * MINUTE, *(hours * HOUR for hours in (2, 5, 10, 14, 20, 24)))
"""Seconds to wait before each attempt, including the first: Standard Webhooks' recommendation, extended."""


class Hook(msgspec.Struct, frozen=True):
    """One subscriber: its destination URL, and which events it gets how.

    `events` are the wanted types (None: all), `when` a compiled JMESPath filter. `schedule_s` has one
    delay for each attempt. `rate` is in deliveries per second; None is no limit. With `ordered`, a
    task's events are sent one after the other. `latest_only` drops superseded progress events. `raw` adds
    the last body that the vendor sent about the task. `max_mb` is the largest file that an archive copies,
    in MiB.
    """

    name: str
    url: str
    events: frozenset[str] | None = None
    secrets: tuple[Secret, ...] = ()
    mode: str = "structured"
    schedule_s: tuple[float, ...] = SCHEDULE_S
    timeout_s: float = 15
    concurrency: int = 10
    rate: float | None = None
    ordered: bool = False
    when: "ParsedResult | None" = None
    latest_only: bool = False
    raw: bool = False
    max_mb: int = 1024

    def __repr__(self) -> str:
        return f"Hook({self.name!r})"  # the URL may contain a password

    @property
    def scheme(self) -> str:
        """The URL's scheme, which selects the kind of destination."""
        return self.url.partition(":")[0]

    @property
    def endpoint_fingerprint(self) -> str:
        """A fingerprint of the URL. A hook is disabled by it, so a new URL enables the hook again."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def subscription(self, capacity: int) -> Subscription:
        """Return the hook as the ledger sees it: at most `capacity` deliveries may be claimed now."""
        return Subscription(self.name, self.events, self.endpoint_fingerprint, capacity, self.ordered)
