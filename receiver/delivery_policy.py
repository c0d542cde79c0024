"""Delivery policy: event filter, retry schedule, dead letters, rate limit, circuit breaker. Pure.

The circuit breaker pauses a hook that keeps failing:

    closed ── FAILURES in a row ──▶ open ── after a pause ──▶ one probe ── delivered ──▶ closed
                                     ▲                             └── failed: a longer pause ──┐
                                     └──────────────────────────────────────────────────────────┘

While the breaker is open the hook gets no attempts, so an outage does not use up its events' retry schedules.
"""

import msgspec

from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event
from submitter.ledger.base import Delivery, Settlement
from submitter.schedule import Backoff

FAILURES = 10
"""Consecutive failures that open the circuit breaker."""

PAUSE = Backoff(first_s=5, factor=2, max_s=300)
"""How long the breaker stays open; longer after each failed probe."""


class CircuitBreaker(msgspec.Struct, frozen=True):
    """The state of one hook's circuit breaker.

    `failures` counts consecutive failures, `opened` how often it opened since the last success. It is
    open until `until_s` (Unix seconds), then allows a probe; None means closed.
    """

    failures: int = 0
    opened: int = 0
    until_s: float | None = None

    def capacity(self, capacity: int, sending: int, now_s: float) -> int:
        """Return how many of `capacity` attempts may start while `sending` are in flight: all, one probe, or none."""
        if self.until_s is None:
            return capacity
        return min(capacity, 1) if now_s >= self.until_s and sending == 0 else 0

    def after(self, *, is_delivered: bool, now_s: float, chance: float) -> "CircuitBreaker":
        """Return the breaker after an attempt that ended at `now_s`; `chance` (0 to 1) is the pause's jitter."""
        if is_delivered:
            return CircuitBreaker()
        failures = self.failures + 1
        was_open_already = self.until_s is not None and now_s < self.until_s
        if failures < FAILURES or was_open_already:  # attempts that started before it opened may still end
            return CircuitBreaker(failures, self.opened, self.until_s)
        return CircuitBreaker(failures, self.opened + 1, now_s + PAUSE.delay_s(self.opened, chance))


class TokenBucket(msgspec.Struct, frozen=True):
    """A token bucket rate limit: one token allows one delivery.

    It has `tokens` at `at_s` (Unix seconds), gains `rate` per second, and holds one second's worth, at least 1.
    """

    rate: float
    tokens: float
    at_s: float

    def at(self, now_s: float) -> "TokenBucket":
        """Return the bucket as refilled by `now_s`."""
        filled = self.tokens + max(now_s - self.at_s, 0) * self.rate
        return TokenBucket(self.rate, min(filled, max(self.rate, 1.0)), now_s)

    def take(self, count: int) -> "TokenBucket":
        """Return the bucket with `count` tokens fewer."""
        return TokenBucket(self.rate, self.tokens - count, self.at_s)

    @property
    def next_s(self) -> float:
        """Seconds from `at_s` until there is a token."""
        return max(0.0, (1 - self.tokens) / self.rate)


class WhenResult(msgspec.Struct, frozen=True):
    """The result of a hook's `when`; `error` says why it could not be evaluated."""

    is_wanted: bool
    error: str | None = None


def evaluate_when(hook: Hook, event: Event) -> WhenResult:
    """Evaluate the hook's `when` over the event. What JMESPath calls false (false, null, empty) filters the event out.

    If the evaluation fails, in any way, the event is wanted: a function that got null must not lose it.
    """
    if hook.when is None:
        return WhenResult(True)
    try:
        value = hook.when.search(msgspec.json.decode(event.body))
        return WhenResult(bool(value) or (value == 0 and value is not False))  # in JMESPath, 0 is true
    except Exception as error:  # noqa: BLE001 - its functions raise TypeError, OverflowError, RecursionError, ...
        return WhenResult(True, f"{type(error).__name__}: {error}")


def after_attempt(outcome: Outcome, delivery: Delivery, hook: Hook, now_ms: int, chance: float) -> Settlement:
    """Return how to settle an attempt: done, dead, or due again; `chance` (0 to 1) is the retry's jitter."""
    if outcome.is_delivered:
        return Settlement("done")
    if outcome.is_gone:
        return Settlement("dead", error=outcome.answer, disable_endpoint=hook.endpoint_fingerprint)
    if outcome.is_final or delivery.attempts >= len(hook.schedule_s):
        return Settlement("dead", error=outcome.answer)
    delay_s = hook.schedule_s[delivery.attempts] * (1 + chance / 10)
    delay_s = max(delay_s, outcome.retry_after_s or 0)
    return Settlement("due", due_at_ms=now_ms + int(delay_s * 1000), error=outcome.answer)
