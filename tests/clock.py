"""Clocks that tests move by hand, so that no test waits for a real backoff."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from submitter.clock import Changing, Clock


class HandClock(Clock):
    """A clock that stands still until it is moved. Ids and keys are still random."""

    def __init__(self, now_ms: int = 1_781_080_800_000) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms

    def now_s(self) -> float:
        return self.ms / 1000

    def chance(self) -> float:
        return 0.5

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


class SkippingClock(Clock):
    """Real time that a test can skip: sleeps and waits whose end was skipped end at once.

    Timeouts stay real: they limit work that is under way, and that work takes real time.
    """

    def __init__(self) -> None:
        self._skipped_s = 0.0
        self._waits: set[asyncio.Timeout] = set()

    def now_ms(self) -> int:
        return super().now_ms() + int(self._skipped_s * 1000)

    def now_s(self) -> float:
        return super().now_s() + self._skipped_s

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._skipped_s

    async def sleep(self, seconds: float) -> None:
        async with self._waiting(seconds):
            await asyncio.Event().wait()

    async def wait_for_change(self, ledger: Changing, version: int, timeout_s: float | None) -> None:
        async with self._waiting(timeout_s):
            await ledger.wait_for_change(version, None)

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        async with self._waiting(timeout_s):
            await event.wait()

    @asynccontextmanager
    async def _waiting(self, seconds: float | None) -> AsyncIterator[None]:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)

    def skip(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self._skipped_s += seconds
        for wait in self._waits:
            when = wait.when()
            if when is not None and not wait.expired():
                wait.reschedule(when - seconds)

    async def skip_until(self, is_reached: Callable[[], bool], *, step_s: float = 1.0, limit_s: float = 60) -> None:
        """Move on by steps until something is reached; fail after `limit_s` real seconds."""
        async with asyncio.timeout(limit_s):
            while not is_reached():
                self.skip(step_s)
                await asyncio.sleep(0.01)
