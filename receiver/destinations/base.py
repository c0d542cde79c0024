"""What a destination promises."""

from typing import Protocol

import msgspec

from submitter.event import Event


class Outcome(msgspec.Struct, frozen=True):
    """What became of one attempt.

    `is_gone` says that the destination asked for nothing more, ever. `retry_after_s` is its wish.
    """

    is_delivered: bool
    answer: str
    retry_after_s: float | None = None
    is_gone: bool = False


class Destination(Protocol):
    """One kind of destination."""

    async def send(self, event: Event, now_s: float) -> Outcome:
        """Send one event once, and return when it was acknowledged or was not. Raises nothing of its own."""
        ...

    async def reach(self) -> str | None:
        """Return None when the destination can be reached, or why not; sends no event."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...
