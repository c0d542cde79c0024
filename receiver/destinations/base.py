"""The interface of a destination (send, reach, close), and the error for an invalid hook."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from receiver.destinations.outcome import Outcome
from submitter.errors import InvalidSettings, Problem
from submitter.event import Event

if TYPE_CHECKING:
    from receiver.hook import Hook
    from submitter.clock import Clock
    from submitter.ledger.base import Tasks


class Destination(Protocol):
    """A bus, queue, endpoint or store that receives a hook's events."""

    async def send(self, event: Event, now_s: float) -> Outcome:
        """Make one delivery attempt at `now_s` (Unix seconds); return after the acknowledgement or the failure.

        An expected failure is an outcome, not an exception.
        """
        ...

    async def reach(self) -> str | None:
        """Check connectivity without sending an event; return None, or why the check failed."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


@runtime_checkable
class UsesLedger(Protocol):
    """A destination that records its results in the ledger."""

    def use(self, ledger: "Tasks", clock: "Clock") -> None:
        """Set the ledger and the clock; called before the first event."""
        ...


def invalid_hook(hook: "Hook", field: str, value: str, limit: str, remedy: str) -> InvalidSettings:
    """Return the error for an invalid field in a hook's settings."""
    return InvalidSettings([Problem(f"hook[{hook.name}].{field}", value, limit, remedy)])
