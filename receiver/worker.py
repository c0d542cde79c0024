"""Background loops: deliver events, poll overdue tasks, listen to event streams.

Commits and stream events wake the loops, and freed slots wake the dispatcher. Timers serve only work that is due later,
and a busy hook with few free slots.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from receiver.dispatcher import Dispatcher
from receiver.poller import Poller
from receiver.stream_listener import StreamListener
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable
from submitter.ledger.base import Tasks
from submitter.log import Logger

STOP_TIMEOUT_S = 20.0
CLAIM_TIMEOUT_S = 5.0
PAUSE_AFTER_ERROR_S = 1.0
POLL_EVERY_S = 0.25

log = Logger("worker")


class Worker:
    """Runs the loops until it is stopped, or one pass for a tick."""

    def __init__(
        self,
        ledger: Tasks,
        dispatcher: Dispatcher,
        poller: Poller,
        listeners: Sequence[StreamListener] = (),
        *,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._dispatcher = dispatcher
        self._poller = poller
        self._listeners = listeners
        self._loops: list[asyncio.Task[None]] = []
        self._claiming: asyncio.Task[float | None] | None = None

    def start(self, *, polls: bool = True) -> None:
        """Start the loops in the running event loop; without `polls`, only those of deliveries."""
        self._loops = [
            asyncio.create_task(self._repeat("deliver", self._deliver_once)),
            asyncio.create_task(self._repeat("watch", self._watch_once)),
        ]
        if polls:
            self._loops += [
                asyncio.create_task(self._repeat("poll", self._poll_once)),
                *(asyncio.create_task(listener.run()) for listener in self._listeners),
            ]

    async def stop(self) -> None:
        """Stop the loops; wait up to CLAIM_TIMEOUT_S for a claim, then STOP_TIMEOUT_S for the attempts in flight."""
        for loop in self._loops:
            loop.cancel()
        for loop in self._loops:
            with suppress(asyncio.CancelledError):
                await loop
        if self._claiming is not None:  # what it claims would otherwise wait for the end of its lease
            await asyncio.wait({self._claiming}, timeout=CLAIM_TIMEOUT_S)
        await self._dispatcher.finish(STOP_TIMEOUT_S)
        await self._dispatcher.close()

    async def deliver(self) -> int:
        """Make every attempt that is due now, wait for all of them, and return their number.

        Cancelling it cancels its own attempts only. They are claimed again once their leases expire.
        """
        count = 0
        while True:
            started: set[asyncio.Task[None]] = set()
            try:
                wait_s = await self._dispatcher.dispatch(started)
                if started:
                    await asyncio.wait(started)
            finally:
                for attempt in started:
                    attempt.cancel()
            count += len(started)
            if not started and wait_s != 0:
                return count

    async def deliver_within(self, budget_s: float) -> None:
        """Make the attempts that are due now, for at most `budget_s` seconds. The next tick retries what failed."""
        try:
            async with self._clock.timeout(budget_s):
                await self.deliver()
        except TimeoutError:
            log.info("deliver.cut_off", budget_s=budget_s)
        except LedgerUnavailable as error:
            log.error("deliver.stalled", reason=str(error))

    async def poll(self) -> int:
        """Poll every task that is due now, and return how many were polled."""
        before = self._poller.polled
        await self._poller.poll()
        return self._poller.polled - before

    async def tick(self, budget_s: float) -> Mapping[str, int]:
        """Deliver due events and poll overdue tasks, for at most `budget_s` seconds. The rest stays due."""
        delivered, polled = self._dispatcher.attempts_started, self._poller.polled
        with suppress(TimeoutError):
            async with self._clock.timeout(budget_s):
                await self.deliver()
                await self.poll()
                await self.deliver()
        return {
            "delivered": self._dispatcher.attempts_started - delivered,
            "polled": self._poller.polled - polled,
        }

    async def _deliver_once(self) -> None:
        """Start the attempts that are due; return when there may be more, and slots for them."""
        ready = self._dispatcher.ready
        ready.clear()
        self._claiming = asyncio.create_task(self._dispatcher.dispatch())
        wait_s = await asyncio.shield(self._claiming)
        await self._clock.wait(ready, wait_s)

    async def _watch_once(self) -> None:
        """Wake the dispatcher; return after the next commit. It claims after `version` is read, so it misses none."""
        version = self._ledger.version()
        self._dispatcher.ready.set()
        await self._clock.wait_for_change(self._ledger, version, None)

    async def _poll_once(self) -> None:
        version, started_s = self._ledger.version(), self._clock.monotonic_s()
        wait_s = await self._poller.poll()
        await self._clock.wait_for_change(self._ledger, version, wait_s)
        await self._clock.sleep(started_s + POLL_EVERY_S - self._clock.monotonic_s())

    async def _repeat(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except LedgerUnavailable as error:
                log.error(f"{name}.stalled", reason=str(error))
                await self._clock.sleep(PAUSE_AFTER_ERROR_S)
            except Exception:
                log.exception(f"{name}.failed")
                await self._clock.sleep(PAUSE_AFTER_ERROR_S)
