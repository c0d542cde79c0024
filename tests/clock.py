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
    """Real time that a test can skip: sleeps, timeouts and waits whose end was skipped end at once."""

    def __init__(self) -> None:
        self._skipped_s = 0.0
        self._timeouts: set[asyncio.Timeout] = set()

    def now_ms(self) -> int:
        return super().now_ms() + int(self._skipped_s * 1000)

    def now_s(self) -> float:
        return super().now_s() + self._skipped_s

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._skipped_s

    async def sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with self.timeout(seconds):
                await asyncio.Event().wait()

    @asynccontextmanager
    async def timeout(self, seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
        async with asyncio.timeout(seconds) as timeout:
            self._timeouts.add(timeout)
            try:
                yield timeout
            finally:
                self._timeouts.discard(timeout)

    async def wait_for_change(self, ledger: Changing, version: int, timeout_s: float | None) -> None:
        with suppress(TimeoutError):
            async with self.timeout(timeout_s):
                await ledger.wait_for_change(version, None)

    def skip(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self._skipped_s += seconds
        for timeout in self._timeouts:
            when = timeout.when()
            if when is not None and not timeout.expired():
                timeout.reschedule(when - seconds)

    async def skip_until(self, is_reached: Callable[[], bool], *, step_s: float = 1.0, limit_s: float = 20) -> None:
        """Move on by steps until something is reached; fail after `limit_s` real seconds."""
        async with asyncio.timeout(limit_s):
            while not is_reached():
                self.skip(step_s)
                await asyncio.sleep(0.01)
