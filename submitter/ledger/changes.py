"""Change notification within a process, with a timed re-check for changes by other processes."""

import asyncio

RECHECK_S = 1.0


class Changes:
    """Implements a ledger's `version` and `wait_for_change` for engines without reliable notifications.

    A change by this process wakes its waiters at once. A change by another process may come without
    a notification, so every wait ends after RECHECK_S at the latest.
    """

    def __init__(self) -> None:
        self.version = 0
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Count a change, and wake every waiter."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, version: int, timeout_s: float | None) -> None:
        """Return after a change since `version`, after RECHECK_S, or after `timeout_s` (None: no limit)."""
        if self.version != version:
            return
        try:
            async with asyncio.timeout(RECHECK_S if timeout_s is None else min(RECHECK_S, timeout_s)):
                await self._changed.wait()
        except TimeoutError:
            if timeout_s is None or timeout_s > RECHECK_S:
                self.wake()
