"""The delivery policy: retry schedule, dead letters, rate limit, circuit breaker."""

import jmespath
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from receiver.delivery_policy import FAILURES, PAUSE, CircuitBreaker, TokenBucket, after_attempt, evaluate_when
from receiver.destinations.outcome import Outcome
from receiver.hook import SCHEDULE_S, Hook
from submitter.event import Event
from submitter.ledger.base import Delivery

HOOK = Hook("a", "https://example.com")
NOW = 1_781_080_800_000


def delivery(attempts: int) -> Delivery:
    return Delivery(1, "a", Event("evt_1", "task.failed", "order-1", 1, 0, b"{}"), "due", attempts, 0)


def test_retries_follow_the_schedule_and_end_in_a_dead_letter() -> None:
    failed = Outcome(False, "HTTP 500")
    delays = []
    for attempt in range(1, len(SCHEDULE_S)):
        settlement = after_attempt(failed, delivery(attempt), HOOK, NOW, 0)
        assert settlement.state == "due"
        delays.append((settlement.due_at_ms - NOW) / 1000)
    hours = [hours * 3600 for hours in (2, 5, 10, 14, 20, 24)]
    assert delays == [5, 60, 300, 1800, *hours]
    last = after_attempt(failed, delivery(len(SCHEDULE_S)), HOOK, NOW, 0)
    assert (last.state, last.error) == ("dead", "HTTP 500")


@given(st.integers(1, 10), st.floats(0, 1), st.none() | st.floats(0, 86400))
def test_a_retry_is_never_earlier_than_its_schedule_or_retry_after(
    attempts: int, chance: float, retry_after_s: float | None
) -> None:
    outcome = Outcome(False, "HTTP 503", retry_after_s=retry_after_s)
    settlement = after_attempt(outcome, delivery(attempts), HOOK, NOW, chance)
    delay_s = (settlement.due_at_ms - NOW) / 1000
    assert SCHEDULE_S[attempts] - 0.001 <= delay_s <= max(SCHEDULE_S[attempts] * 1.1, retry_after_s or 0)
    assert delay_s >= (retry_after_s or 0) - 0.001


def test_a_permanent_failure_is_dead_lettered_at_once_and_does_not_disable_the_endpoint() -> None:
    settlement = after_attempt(Outcome(False, "too large", is_final=True), delivery(1), HOOK, NOW, 0)
    assert (settlement.state, settlement.error, settlement.disable_endpoint) == ("dead", "too large", None)


def test_gone_disables_the_endpoint() -> None:
    settlement = after_attempt(Outcome(False, "HTTP 410", is_gone=True), delivery(1), HOOK, NOW, 0)
    assert (settlement.state, settlement.disable_endpoint) == ("dead", HOOK.endpoint_fingerprint)


@given(st.floats(0.1, 100), st.lists(st.floats(0, 5), min_size=1, max_size=50))
def test_a_token_bucket_never_exceeds_its_rate(rate: float, pauses_s: list[float]) -> None:
    bucket, taken, now_s = TokenBucket(rate, max(rate, 1.0), 0.0), 0, 0.0
    for pause_s in pauses_s:
        now_s += pause_s
        bucket = bucket.at(now_s)
        count = int(bucket.tokens)
        bucket, taken = bucket.take(count), taken + count
        assert taken <= max(rate, 1.0) + now_s * rate + 1e-6


def fail(breaker: CircuitBreaker, times: int, now_s: float) -> CircuitBreaker:
    for _ in range(times):
        breaker = breaker.after(is_delivered=False, now_s=now_s, chance=0.5)
    return breaker


def test_the_breaker_opens_after_consecutive_failures_only() -> None:
    assert fail(CircuitBreaker(), FAILURES - 1, 100).capacity(10, 0, 100) == 10
    opened = fail(CircuitBreaker(), FAILURES, 100)
    assert opened.capacity(10, 0, 100) == 0
    one_success = fail(CircuitBreaker(), FAILURES - 1, 100).after(is_delivered=True, now_s=100, chance=0.5)
    assert fail(one_success, FAILURES - 1, 100).capacity(10, 0, 100) == 10


def test_after_its_pause_the_breaker_allows_one_probe_whose_success_closes_it() -> None:
    opened = fail(CircuitBreaker(), FAILURES, 100)
    assert opened.until_s == 105
    assert opened.capacity(10, 0, 104.9) == 0
    assert opened.capacity(10, 0, 105) == 1
    assert opened.capacity(10, 1, 105) == 0  # one probe at a time
    assert opened.after(is_delivered=True, now_s=105, chance=0.5) == CircuitBreaker()


def test_each_failed_probe_lengthens_the_pause_up_to_five_minutes() -> None:
    breaker, now_s, pauses = fail(CircuitBreaker(), FAILURES, 0), 0.0, []
    for _ in range(8):
        assert breaker.until_s is not None
        pauses.append(breaker.until_s - now_s)
        now_s = breaker.until_s
        breaker = fail(breaker, 1, now_s)
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300]


def test_attempts_in_flight_when_the_breaker_opens_do_not_lengthen_its_pause() -> None:
    opened = fail(CircuitBreaker(), FAILURES, 100)
    assert fail(opened, 20, 101).until_s == opened.until_s


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1000)), max_size=60))
def test_the_breaker_never_stays_open_forever(attempts: list[tuple[bool, float]]) -> None:
    breaker, now_s = CircuitBreaker(), 0.0
    for is_delivered, passed_s in attempts:
        now_s += passed_s
        breaker = breaker.after(is_delivered=is_delivered, now_s=now_s, chance=1)
    assert breaker.capacity(1, 0, now_s + PAUSE.max_s * 1.25) == 1


@pytest.mark.parametrize(
    ("when", "is_wanted"),
    [
        ("data.status == 'succeed'", True),
        ("data.status == 'failed'", False),
        ("data.count", True),  # 0 is true in JMESPath
        ("data.missing", False),
        ("data.empty", False),
        ("length(data.missing)", True),  # an expression that fails filters nothing out
    ],
)
def test_when_is_evaluated_by_jmespaths_truth(when: str, is_wanted: bool) -> None:
    body = msgspec.json.encode({"data": {"status": "succeed", "count": 0, "empty": []}})
    event = Event("evt_1", "task.succeed", "order-1", 1, 0, body)
    hook = Hook("a", "https://a", when=jmespath.compile(when))
    assert evaluate_when(hook, event).is_wanted is is_wanted


@pytest.mark.parametrize("error", [OverflowError("too large"), RecursionError(), ValueError("?"), KeyError("x")])
def test_a_when_that_raises_anything_loses_no_event(error: Exception) -> None:
    class Broken:
        def search(self, value: object) -> object:
            raise error

    found = evaluate_when(replace(HOOK, when=Broken()), delivery(0).event)
    assert (found.is_wanted, type(error).__name__ in str(found.error)) == (True, True)
