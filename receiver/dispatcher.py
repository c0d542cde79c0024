"""The outbox dispatcher: claims due deliveries, sends them to hooks, settles them.

A claim is a lease that is longer than any hook's timeout. If a worker crashes while sending, its lease
expires and another worker retries: delivery is at least once.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from receiver.delivery_policy import CircuitBreaker, TokenBucket, after_attempt, evaluate_when
from receiver.destinations.base import Destination
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import PROGRESS, Hook
from submitter.clock import Clock
from submitter.errors import LedgerUnavailable
from submitter.event import with_raw
from submitter.ledger.base import Delivery, Ledger, Settlement
from submitter.log import Logger

LEASE_MARGIN_S = 30
ROUTE_EVERY_S = 1.0
"""How often to claim while no hook has capacity: that creates deliveries of new events, which hooks' states count."""

CLAIM_WITHIN_S = 0.005
"""How long the free slots of a hook wait for others, while it has more due deliveries than slots."""

log = Logger("delivery")


class DeliveryMetrics(Protocol):
    """The metrics of deliveries."""

    def delivery(self, hook: str, result: str, seconds: float) -> None:
        """Observe the duration of an attempt, in seconds, by its result."""
        ...

    def breaker(self, hook: str, *, is_open: bool) -> None:
        """Set whether a hook's circuit breaker is open."""
        ...


class Dispatcher:
    """Claims, sends and settles deliveries. Each hook has a concurrency limit, so a slow hook delays no other."""

    def __init__(
        self,
        ledger: Ledger,
        hooks: Sequence[Hook],
        destinations: Mapping[str, Destination],
        clock: Clock,
        metrics: DeliveryMetrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._hooks = {hook.name: hook for hook in hooks}
        self._destinations = destinations
        self._clock = clock
        self._metrics = metrics
        self._sending: dict[str, set[tuple[int, int]]] = {hook.name: set() for hook in hooks}
        self._breakers = {hook.name: CircuitBreaker() for hook in hooks}
        self._attempts: set[asyncio.Task[None]] = set()
        now_s = clock.now_s()
        self._buckets = {
            hook.name: TokenBucket(hook.rate, max(hook.rate, 1.0), now_s) for hook in hooks if hook.rate is not None
        }
        timeouts = max((hook.timeout_s for hook in hooks), default=0)
        self._lease_ms = int((timeouts + LEASE_MARGIN_S) * 1000)
        self.attempts_started = 0
        self.ready = asyncio.Event()
        """Set after a commit, and when slots are free for what the last claim left. The worker clears it."""
        self._is_behind = False  # whether the last claim left due deliveries, or may have
        self._route_at_s = -math.inf
        self._claiming: asyncio.TimerHandle | None = None

    async def dispatch(self, started: set[asyncio.Task[None]] | None = None) -> float | None:
        """Start every due attempt within capacity; return the seconds until the next is due, or None.

        The attempts are added to `started`, for a caller that waits for its own attempts only. An
        attempt ends with a commit, which wakes the callers of `wait_for_change`.
        """
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic_s()
        capacities = {name: self._capacity(hook, now_ms / 1000) for name, hook in self._hooks.items()}
        if not any(capacities.values()) and now_s < self._route_at_s:
            self._is_behind = True
            return self._next_wait_s(now_ms, self._route_at_s - now_s)
        self._route_at_s = now_s + ROUTE_EVERY_S
        subscriptions = [hook.subscription(capacities[name]) for name, hook in self._hooks.items()]
        claimed = await self._ledger.claim_deliveries(subscriptions, now_ms, self._lease_ms)
        claimed_of = Counter(delivery.hook for delivery in claimed.items)
        self._is_behind = any(claimed_of[name] == capacity for name, capacity in capacities.items())
        for delivery in claimed.items:
            self.attempts_started += 1
            self._sending[delivery.hook].add((delivery.id, delivery.attempts))
            attempt = asyncio.create_task(self._attempt(delivery))
            attempt.add_done_callback(partial(self._ended, delivery))
            self._attempts.add(attempt)
            if started is not None:
                started.add(attempt)
            if delivery.hook in self._buckets:
                self._buckets[delivery.hook] = self._buckets[delivery.hook].take(1)
        if claimed.next_due_ms is None:
            return self._next_wait_s(now_ms)
        return self._next_wait_s(now_ms, max(0.0, (claimed.next_due_ms - self._clock.now_ms()) / 1000))

    def _next_wait_s(self, now_ms: int, *waits_s: float) -> float | None:
        """Return the least of `waits_s` and of the seconds until rate limits and circuit breakers allow more."""
        tokens_s = [bucket.next_s for bucket in self._buckets.values() if bucket.next_s > 0]
        probes_s = [breaker.until_s for breaker in self._breakers.values() if breaker.until_s is not None]
        paused_s = [until_s - now_ms / 1000 for until_s in probes_s if until_s > now_ms / 1000]
        return min([*waits_s, *tokens_s, *paused_s], default=None)

    def _capacity(self, hook: Hook, now_s: float) -> int:
        sending = len(self._sending[hook.name])
        capacity = hook.concurrency - sending
        bucket = self._buckets.get(hook.name)
        if bucket is not None:
            self._buckets[hook.name] = bucket = bucket.at(now_s)
            capacity = min(capacity, int(bucket.tokens))
        return self._breakers[hook.name].capacity(max(capacity, 0), sending, now_s)

    async def _attempt(self, delivery: Delivery) -> None:
        hook = self._hooks[delivery.hook]
        has_changed, answer = False, ""
        try:
            is_filtered = hook.when is not None or hook.latest_only
            skip_reason = await self._skip_reason(hook, delivery) if is_filtered else None
            if skip_reason is None:
                outcome, settlement = await self._send(hook, await self._with_raw(hook, delivery))
                has_changed, answer = self._update_breaker(hook, outcome), outcome.answer
            else:
                log.info("delivery.skipped", hook=hook.name, event_id=delivery.event.id, reason=skip_reason)
                settlement = Settlement("done")
        except LedgerUnavailable as error:
            log.error("delivery.unsettled", hook=hook.name, event_id=delivery.event.id, reason=str(error))
            return
        finally:
            self._free_slot(delivery)  # the next claim need not wait for this settlement
        try:
            await self._ledger.settle(delivery, settlement)
            if has_changed:
                await self._record_pause(hook, answer)
        except LedgerUnavailable as error:
            log.error("delivery.unsettled", hook=hook.name, event_id=delivery.event.id, reason=str(error))

    def _ended(self, delivery: Delivery, attempt: asyncio.Task[None]) -> None:
        self._free_slot(delivery)  # its first step does not run if it is cancelled before
        self._attempts.discard(attempt)

    def _free_slot(self, delivery: Delivery) -> None:
        """Free the slot of an attempt. Idempotent."""
        sending = self._sending[delivery.hook]
        sending.discard((delivery.id, delivery.attempts))
        if not self._is_behind:
            return
        # A claim costs as much as several attempts: it waits for half of the slots, but not long for one that hangs.
        if 2 * len(sending) <= self._hooks[delivery.hook].concurrency:
            self.ready.set()
        elif self._claiming is None:
            self._claiming = asyncio.get_running_loop().call_later(CLAIM_WITHIN_S, self._claim_late)

    def _claim_late(self) -> None:
        self._claiming = None
        self.ready.set()

    async def _send(self, hook: Hook, delivery: Delivery) -> tuple[Outcome, Settlement]:
        """Send the event; return the outcome, and how to settle the delivery."""
        started_s = self._clock.now_s()
        try:
            async with self._clock.timeout(hook.timeout_s):  # limits the whole attempt; httpx's limits each read
                outcome = await self._destinations[hook.name].send(delivery.event, started_s)
        except TimeoutError:
            outcome = Outcome(False, f"no answer within {hook.timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 - a broken destination must not stop the others
            outcome = failed_outcome(error)
        now_ms = self._clock.now_ms()
        settlement = after_attempt(outcome, delivery, hook, now_ms, self._clock.chance())
        if self._metrics is not None:
            self._metrics.delivery(hook.name, settlement.state, now_ms / 1000 - started_s)
        log.info(
            "delivery.attempted",
            hook=hook.name,
            event_id=delivery.event.id,
            type=delivery.event.type,
            external_task_id=delivery.event.external_task_id,
            attempt=delivery.attempts,
            result=settlement.state,
            answer=outcome.answer,
            seconds=round(now_ms / 1000 - started_s, 3),
        )
        return outcome, settlement

    def _update_breaker(self, hook: Hook, outcome: Outcome) -> bool:
        """Count an outcome; return whether the hook's circuit breaker opened or closed.

        A final failure is about the event and does not count.
        """
        if outcome.is_final:
            return False
        before = self._breakers[hook.name]
        after = before.after(is_delivered=outcome.is_delivered, now_s=self._clock.now_s(), chance=self._clock.chance())
        self._breakers[hook.name] = after
        return after.until_s != before.until_s

    async def _record_pause(self, hook: Hook, reason: str) -> None:
        """Record the state of the hook's circuit breaker, which has changed."""
        until_s = self._breakers[hook.name].until_s
        if self._metrics is not None:
            self._metrics.breaker(hook.name, is_open=until_s is not None)
        if until_s is None:
            log.info("hook.resumed", hook=hook.name)
            await self._ledger.pause(hook.name, None)
        else:
            pause_s = round(until_s - self._clock.now_s(), 1)
            log.warning("hook.paused", hook=hook.name, pause_s=pause_s, reason=reason)
            await self._ledger.pause(hook.name, int(until_s * 1000), reason)

    async def _skip_reason(self, hook: Hook, delivery: Delivery) -> str | None:
        """Return why the hook does not want this delivery; None means that it does."""
        when = evaluate_when(hook, delivery.event)
        if when.error is not None:
            log.warning("hook.when_failed", hook=hook.name, event_id=delivery.event.id, reason=when.error)
        if not when.is_wanted:
            return "`when` is false for this event"
        if hook.latest_only and delivery.event.type in PROGRESS:
            task = await self._ledger.get(delivery.event.external_task_id)
            if task.sequence > delivery.event.sequence:
                return "`latest_only`: the task has a later event"
        return None

    async def _with_raw(self, hook: Hook, delivery: Delivery) -> Delivery:
        """Return the delivery as the hook wants it: with the vendor's last body inside the event, or unchanged."""
        if not hook.raw:
            return delivery
        tasks = await self._ledger.get_many([delivery.event.external_task_id])
        event = with_raw(delivery.event, tasks[0].raw if tasks else "")
        return replace(delivery, event=event)

    async def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the attempts in flight; cancel them after `timeout_s`, to be retried once their leases expire."""
        if not self._attempts:
            return
        _, pending = await asyncio.wait(self._attempts, timeout=timeout_s)
        for attempt in pending:
            attempt.cancel()

    async def close(self) -> None:
        """Close every destination."""
        for destination in self._destinations.values():
            await destination.close()
