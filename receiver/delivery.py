"""Telling hooks: what an attempt's outcome means (pure), and claim, send, settle.

A claim is a lease that outlives the hook's timeout: whoever dies while sending is replaced by
whoever claims next, so a hook may get an event twice and never not at all.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog
from jmespath.exceptions import JMESPathError

from receiver.breaker import Breaker
from receiver.destinations.base import Destination, Outcome
from receiver.hooks import PROGRESS, Hook
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable
from submitter.ledger.base import Delivery, Ledger, Settlement

LEASE_MARGIN_S = 30

log = structlog.get_logger("delivery")


class Bucket(msgspec.Struct, frozen=True):
    """A token bucket: `tokens` are left at `at_s`; a token is a delivery. Holds one second's worth."""

    rate: float
    tokens: float
    at_s: float

    def at(self, now_s: float) -> "Bucket":
        """Return the bucket as it has filled by `now_s`."""
        filled = self.tokens + max(now_s - self.at_s, 0) * self.rate
        return Bucket(self.rate, min(filled, max(self.rate, 1.0)), now_s)

    def take(self, count: int) -> "Bucket":
        """Return the bucket with `count` tokens less."""
        return Bucket(self.rate, self.tokens - count, self.at_s)

    @property
    def next_s(self) -> float:
        """Seconds from `at_s` until there is a token."""
        return max(0.0, (1 - self.tokens) / self.rate)


def judge(outcome: Outcome, delivery: Delivery, hook: Hook, now_ms: int, chance: float) -> Settlement:
    """Return what an attempt's outcome means: done, dead, or due again; `chance` (0 to 1) is the jitter."""
    if outcome.is_delivered:
        return Settlement("done")
    if outcome.is_gone:
        return Settlement("dead", error=outcome.answer, disable_target=hook.target)
    if outcome.is_final or delivery.attempts >= len(hook.schedule_s):
        return Settlement("dead", error=outcome.answer)
    delay_s = hook.schedule_s[delivery.attempts] * (1 + chance / 10)
    delay_s = max(delay_s, outcome.retry_after_s or 0)
    return Settlement("due", due_at_ms=now_ms + int(delay_s * 1000), error=outcome.answer)


def is_wanted(hook: Hook, delivery: Delivery) -> bool:
    """Tell whether the hook's `when` holds for the event (JMESPath's truth: null, false and what is empty are not).

    An event for which it cannot be evaluated is wanted: nothing is lost by a function that got null.
    """
    if hook.when is None:
        return True
    try:
        return bool(hook.when.search(msgspec.json.decode(delivery.event.body)))
    except JMESPathError as error:
        log.warning("hook.when_failed", hook=hook.name, event_id=delivery.event.id, reason=str(error))
        return True


class Metrics(Protocol):
    """What deliveries count."""

    def delivery(self, hook: str, result: str, seconds: float) -> None:
        """Count an attempt by its result."""
        ...

    def breaker(self, hook: str, *, is_open: bool) -> None:
        """Show whether a hook is left alone."""
        ...


class Dispatcher:
    """Claims what is due, sends it, settles it. Each hook has room of its own, so none delays another."""

    def __init__(
        self,
        ledger: Ledger,
        hooks: Sequence[Hook],
        destinations: Mapping[str, Destination],
        clock: Clock,
        metrics: Metrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._hooks = {hook.name: hook for hook in hooks}
        self._destinations = destinations
        self._clock = clock
        self._metrics = metrics
        self._sending: dict[str, set[tuple[int, int]]] = {hook.name: set() for hook in hooks}
        self._breakers = {hook.name: Breaker() for hook in hooks}
        self._attempts: set[asyncio.Task[None]] = set()
        now_s = clock.now_s()
        self._buckets = {
            hook.name: Bucket(hook.rate, max(hook.rate, 1.0), now_s) for hook in hooks if hook.rate is not None
        }
        timeouts = max((hook.timeout_s for hook in hooks), default=0)
        self._lease_ms = int((timeouts + LEASE_MARGIN_S) * 1000)
        self.begun = 0
        self.is_behind = False
        """Whether a hook's room was used up by the last claim, so that there may be more for it at once."""

    async def dispatch(self, begun: set[asyncio.Task[None]] | None = None) -> float | None:
        """Begin every attempt that is due and has room; return the seconds until the next, or None.

        The attempts go into `begun`, for a caller that waits for its own. The end of an attempt is
        a change of the ledger, which wakes whoever waits for one.
        """
        now_ms = self._clock.now_ms()
        rooms = {name: self._room(hook, now_ms / 1000) for name, hook in self._hooks.items()}
        routes = [hook.route(rooms[name]) for name, hook in self._hooks.items()]
        claimed = await self._ledger.claim_deliveries(routes, now_ms, self._lease_ms)
        taken = Counter(delivery.hook for delivery in claimed.items)
        self.is_behind = any(room > 0 and taken[name] == room for name, room in rooms.items())
        for delivery in claimed.items:
            self.begun += 1
            self._sending[delivery.hook].add((delivery.id, delivery.attempts))
            attempt = asyncio.create_task(self._attempt(delivery))
            # One that is cancelled before its first step ends here, and nowhere else.
            attempt.add_done_callback(partial(self._ended, delivery))
            self._attempts.add(attempt)
            if begun is not None:
                begun.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
            if delivery.hook in self._buckets:
                self._buckets[delivery.hook] = self._buckets[delivery.hook].take(1)
        waits = [bucket.next_s for name, bucket in self._buckets.items() if bucket.next_s > 0]
        opens_s = [breaker.until_s for breaker in self._breakers.values() if breaker.until_s is not None]
        waits.extend(until_s - now_ms / 1000 for until_s in opens_s if until_s > now_ms / 1000)
        if claimed.next_due_ms is not None:
            waits.append(max(0.0, (claimed.next_due_ms - self._clock.now_ms()) / 1000))
        return min(waits, default=None)

    def _room(self, hook: Hook, now_s: float) -> int:
        sending = len(self._sending[hook.name])
        room = hook.concurrency - sending
        bucket = self._buckets.get(hook.name)
        if bucket is not None:
            self._buckets[hook.name] = bucket = bucket.at(now_s)
            room = min(room, int(bucket.tokens))
        return self._breakers[hook.name].room(max(room, 0), sending, now_s)

    async def _attempt(self, delivery: Delivery) -> None:
        hook = self._hooks[delivery.hook]
        outcome = None
        try:
            skipped = await self._skipped(hook, delivery)
            if skipped is None:
                outcome, settlement = await self._send(hook, delivery)
            else:
                log.info("delivery.skipped", hook=hook.name, event_id=delivery.event.id, reason=skipped)
                settlement = Settlement("done")
        except LedgerUnavailable as error:
            log.error("delivery.unsettled", hook=hook.name, event_id=delivery.event.id, reason=str(error))
            return
        finally:
            self._ended(delivery)  # before it is settled: that wakes whoever claims the next
        try:
            await self._ledger.settle(delivery, settlement)
            if outcome is not None:
                await self._note(hook, outcome)
        except LedgerUnavailable as error:
            log.error("delivery.unsettled", hook=hook.name, event_id=delivery.event.id, reason=str(error))

    def _ended(self, delivery: Delivery, _: object = None) -> None:
        """Give back the room of an attempt, if it was not given back."""
        self._sending[delivery.hook].discard((delivery.id, delivery.attempts))

    async def _send(self, hook: Hook, delivery: Delivery) -> tuple[Outcome, Settlement]:
        """Make the attempt, and return what became of it, and what that means."""
        begun_s = self._clock.now_s()
        try:
            async with asyncio.timeout(hook.timeout_s):  # of the whole attempt: httpx's is for each read
                outcome = await self._destinations[hook.name].send(delivery.event, begun_s)
        except TimeoutError:
            outcome = Outcome(False, f"no answer within {hook.timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 - a broken destination must not take the others with it
            outcome = Outcome(False, f"{type(error).__name__}: {error}"[:500])
        now_ms = self._clock.now_ms()
        settlement = judge(outcome, delivery, hook, now_ms, self._clock.chance())
        if self._metrics is not None:
            self._metrics.delivery(hook.name, settlement.state, now_ms / 1000 - begun_s)
        log.info(
            "delivery.attempted",
            hook=hook.name,
            event_id=delivery.event.id,
            type=delivery.event.type,
            external_task_id=delivery.event.external_task_id,
            attempt=delivery.attempts,
            result=settlement.state,
            answer=outcome.answer,
            seconds=round(now_ms / 1000 - begun_s, 3),
        )
        return outcome, settlement

    async def _note(self, hook: Hook, outcome: Outcome) -> None:
        """Open or close the hook's breaker. What was wrong with an event says nothing of the hook."""
        if outcome.is_final:
            return
        before = self._breakers[hook.name]
        after = before.after(is_delivered=outcome.is_delivered, now_s=self._clock.now_s(), chance=self._clock.chance())
        self._breakers[hook.name] = after
        if after.until_s == before.until_s:
            return
        if self._metrics is not None:
            self._metrics.breaker(hook.name, is_open=after.until_s is not None)
        if after.until_s is None:
            log.info("hook.resumed", hook=hook.name)
            await self._ledger.pause(hook.name, None)
        else:
            pause_s = round(after.until_s - self._clock.now_s(), 1)
            log.warning("hook.paused", hook=hook.name, pause_s=pause_s, reason=outcome.answer)
            await self._ledger.pause(hook.name, int(after.until_s * 1000), outcome.answer)

    async def _skipped(self, hook: Hook, delivery: Delivery) -> str | None:
        """Return why the hook does not want a delivery after all, or None."""
        if not is_wanted(hook, delivery):
            return "`when` does not hold"
        if hook.latest_only and delivery.event.type in PROGRESS:
            task = await self._ledger.get(delivery.event.external_task_id)
            if task.sequence > delivery.event.sequence:
                return "a later event has overtaken it"
        return None

    async def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the attempts under way; after `timeout_s` leave them to their leases."""
        if not self._attempts:
            return
        _, pending = await asyncio.wait(self._attempts, timeout=timeout_s)
        for attempt in pending:
            attempt.cancel()

    async def close(self) -> None:
        """Close every destination."""
        for destination in self._destinations.values():
            await destination.close()
