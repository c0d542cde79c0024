"""Time and randomness: the only module that reads them. Tests pass their own clock."""

import asyncio
import random
import secrets
import time
import uuid
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol


class Changing(Protocol):
    """The part of a ledger that a clock needs."""

    async def wait_for_change(self, version: int, timeout_s: float | None) -> None:
        """Return once something was committed since `version`, or after `timeout_s` seconds."""
        ...


class Clock:
    """Passed in to every decision and every loop, so that no test waits for real time."""

    def now_ms(self) -> int:
        """Return Unix milliseconds."""
        return time.time_ns() // 1_000_000

    def now_s(self) -> float:
        """Return Unix seconds."""
        return time.time()

    def monotonic_s(self) -> float:
        """Return seconds that never decrease, for measuring durations."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`; if 0 or less, yield to other tasks once."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Return a context manager that raises TimeoutError if its block takes longer; None sets no limit."""
        return asyncio.timeout(seconds)

    async def wait_for_change(self, ledger: Changing, version: int, timeout_s: float | None) -> None:
        """Return once something was committed since `version`, or after `timeout_s` seconds."""
        await ledger.wait_for_change(version, timeout_s)

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        """Return once `event` is set, or after `timeout_s` seconds; None sets no limit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()

    def chance(self) -> float:
        """Return a number from 0 to 1, for jitter."""
        return random.random()  # noqa: S311 - jitter is no secret

    def new_id(self) -> str:
        """Return a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits."""
        rand = secrets.randbits(74)
        high, low = rand >> 62, rand & ((1 << 62) - 1)
        return str(uuid.UUID(int=self.now_ms() << 80 | 0x7 << 76 | high << 64 | 0b10 << 62 | low))

    def new_key(self, size: int) -> bytes:
        """Return `size` random bytes for a key."""
        return secrets.token_bytes(size)
