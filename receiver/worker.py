"""The loops behind the receiver. Woken by commits, or by a vendor's stream; a timer only for what is due later."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import structlog

from receiver.delivery import Dispatcher
from receiver.listen import Listener
from receiver.poll import Poller
from submitter.errors import LedgerUnavailable
from submitter.ledger.base import Ledger

STOP_TIMEOUT_S = 20.0
PAUSE_AFTER_ERROR_S = 1.0
# The least time between two claims. An idle hook is told at once; under load, one claim serves many commits,
# unless a hook has used its room up and more may be waiting for it.
DELIVER_EVERY_S = 0.02
DELIVER_BEHIND_S = 0.002
POLL_EVERY_S = 0.25

log = structlog.get_logger("worker")

Step = Callable[[], Awaitable[float | None]]


class Worker:
    """Delivers and polls until it is stopped, or for one tick."""

    def __init__(
        self, ledger: Ledger, dispatcher: Dispatcher, poller: Poller, listeners: Sequence[Listener] = ()
    ) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._poller = poller
        self._listeners = listeners
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin the loops in the running event loop."""
        self._loops = [
            asyncio.create_task(self._run("deliver", self._dispatcher.dispatch, self._deliver_every_s)),
            asyncio.create_task(self._run("poll", self._poller.poll, lambda: POLL_EVERY_S)),
            *(asyncio.create_task(listener.run()) for listener in self._listeners),
        ]

    async def stop(self) -> None:
        """End the loops, then wait for the attempts under way."""
        for loop in self._loops:
            loop.cancel()
        for loop in self._loops:
            with suppress(asyncio.CancelledError):
                await loop
        await self._dispatcher.finish(STOP_TIMEOUT_S)
        await self._dispatcher.close()

    async def deliver(self) -> int:
        """Make every attempt that is due now, wait for their ends, and return how many there were.

        Once it is cancelled, so are its attempts, and nobody else's: they are claimed again when their leases end.
        """
        count = 0
        while True:
            begun: set[asyncio.Task[None]] = set()
            try:
                wait_s = await self._dispatcher.dispatch(begun)
                if begun:
                    await asyncio.wait(begun)
            finally:
                for attempt in begun:
                    attempt.cancel()
            count += len(begun)
            if not begun and wait_s != 0:
                return count

    async def deliver_within(self, budget_s: float) -> None:
        """Make the attempts that are due now, as far as `budget_s` lasts; what goes wrong is left to the next tick."""
        try:
            async with asyncio.timeout(budget_s):
                await self.deliver()
        except TimeoutError:
            log.info("deliver.cut_off", budget_s=budget_s)
        except LedgerUnavailable as error:
            log.error("deliver.stalled", reason=str(error))

    async def poll(self) -> int:
        """Ask about every task that is due now, and return how many were asked about."""
        before = self._poller.asked
        await self._poller.poll()
        return self._poller.asked - before

    async def tick(self, budget_s: float) -> Mapping[str, int]:
        """Deliver what is due and poll what is silent, within `budget_s`; what is left keeps its place."""
        delivered, polled = self._dispatcher.begun, self._poller.asked
        with suppress(TimeoutError):
            async with asyncio.timeout(budget_s):
                await self.deliver()
                await self.poll()
                await self.deliver()
        return {"delivered": self._dispatcher.begun - delivered, "polled": self._poller.asked - polled}

    def _deliver_every_s(self) -> float:
        return DELIVER_BEHIND_S if self._dispatcher.is_behind else DELIVER_EVERY_S

    async def _run(self, name: str, step: Step, every_s: Callable[[], float]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                mark, begun_s = self._ledger.mark(), loop.time()
                wait_s = await step()
                await self._ledger.changed(mark, wait_s)
                await asyncio.sleep(begun_s + every_s() - loop.time())
            except LedgerUnavailable as error:
                log.error(f"{name}.stalled", reason=str(error))
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)
            except Exception:
                log.exception(f"{name}.failed")
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)
