"""Waiting for a change: woken by this process's own at once, by another's within a second."""

import asyncio

LOOK_EVERY_S = 1.0


class Changes:
    """What a ledger's `mark` and `changed` stand on, where other processes may tell nothing."""

    def __init__(self) -> None:
        self.mark = 0
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Wake who waits here."""
        self.mark += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, mark: int, timeout_s: float | None) -> None:
        """Return once something changed since `mark`, or another process may have changed something, or it is time."""
        if self.mark != mark:
            return
        try:
            async with asyncio.timeout(LOOK_EVERY_S if timeout_s is None else min(LOOK_EVERY_S, timeout_s)):
                await self._changed.wait()
        except TimeoutError:
            if timeout_s is None or timeout_s > LOOK_EVERY_S:
                self.wake()
