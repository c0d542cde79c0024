"""Deliveries: what an outcome means, and that no hook delays another."""

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.delivery import Bucket, Dispatcher, judge
from receiver.destinations.base import Outcome
from receiver.hooks import SCHEDULE_S, Hook, read_hooks
from submitter.errors import Problem
from submitter.event import Event
from submitter.ledger.base import Delivery
from submitter.ledger.sqlite import SqliteLedger
from submitter.task import TaskStatus
from tests.conformance.ledgers import report, task
from tests.conftest import HOOK_SECRET, HandClock

HOOK = Hook("a", "https://example.com")
NOW = 1_781_080_800_000


def delivery(attempts: int) -> Delivery:
    return Delivery(1, "a", Event("evt_1", "task.failed", "order-1", 1, 0, b"{}"), "due", attempts, 0)


def test_the_schedule_is_kept_and_ends_in_a_dead_letter() -> None:
    failed = Outcome(False, "HTTP 500")
    delays = []
    for attempt in range(1, len(SCHEDULE_S)):
        settlement = judge(failed, delivery(attempt), HOOK, NOW, 0)
        assert settlement.state == "due"
        delays.append((settlement.due_at_ms - NOW) / 1000)
    hours = [hours * 3600 for hours in (2, 5, 10, 14, 20, 24)]
    assert delays == [5, 60, 300, 1800, *hours]
    last = judge(failed, delivery(len(SCHEDULE_S)), HOOK, NOW, 0)
    assert (last.state, last.error) == ("dead", "HTTP 500")


@given(st.integers(1, 10), st.floats(0, 1), st.none() | st.floats(0, 86400))
def test_a_retry_is_never_before_its_schedule_nor_before_it_was_asked_for(
    attempts: int, chance: float, wish: float | None
) -> None:
    settlement = judge(Outcome(False, "HTTP 503", retry_after_s=wish), delivery(attempts), HOOK, NOW, chance)
    delay_s = (settlement.due_at_ms - NOW) / 1000
    assert SCHEDULE_S[attempts] - 0.001 <= delay_s <= max(SCHEDULE_S[attempts] * 1.1, wish or 0)
    assert delay_s >= (wish or 0) - 0.001


def test_what_no_other_attempt_can_better_is_dead_at_once_and_says_nothing_of_the_hook() -> None:
    settlement = judge(Outcome(False, "too large", is_final=True), delivery(1), HOOK, NOW, 0)
    assert (settlement.state, settlement.error, settlement.disable_target) == ("dead", "too large", None)


def test_gone_disables_the_target() -> None:
    settlement = judge(Outcome(False, "HTTP 410", is_gone=True), delivery(1), HOOK, NOW, 0)
    assert (settlement.state, settlement.disable_target) == ("dead", HOOK.target)


@given(st.floats(0.1, 100), st.lists(st.floats(0, 5), min_size=1, max_size=50))
def test_a_bucket_never_gives_more_than_its_rate(rate: float, pauses: list[float]) -> None:
    bucket, taken, now = Bucket(rate, max(rate, 1.0), 0.0), 0, 0.0
    for pause in pauses:
        now += pause
        bucket = bucket.at(now)
        count = int(bucket.tokens)
        bucket, taken = bucket.take(count), taken + count
        assert taken <= max(rate, 1.0) + now * rate + 1e-6


class Slow:
    """A destination whose answers wait for a gate; counts how many wait at once. In memory, not a real one."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()
        self.waiting = self.most = self.sent = 0

    async def send(self, event: Event, now_s: float) -> Outcome:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        await self.gate.wait()
        self.waiting -= 1
        self.sent += 1
        return Outcome(True, "ok")

    async def reach(self) -> str | None:
        return None

    async def close(self) -> None:
        return None


async def filled(ledger: SqliteLedger, count: int) -> None:
    for i in range(count):
        await ledger.reserve(task(f"t{i}"))
        await ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED))


async def test_a_hook_that_hangs_delays_no_other_and_keeps_to_its_concurrency(ledger: SqliteLedger) -> None:
    await filled(ledger, 30)
    hooks = [Hook("hangs", "https://a", concurrency=3), Hook("works", "https://b", concurrency=50)]
    hangs, works = Slow(), Slow(is_open=True)
    dispatcher = Dispatcher(ledger, hooks, {"hangs": hangs, "works": works}, HandClock())
    await dispatcher.dispatch()
    async with asyncio.timeout(5):
        while works.sent < 30 or hangs.waiting < 3:
            mark = ledger.mark()
            await ledger.changed(mark, 0.05)
    await dispatcher.dispatch()
    assert hangs.most == 3
    hangs.gate.set()
    async with asyncio.timeout(5):
        while hangs.sent < 30:
            await dispatcher.dispatch()
            await dispatcher.finish()
    assert hangs.most == 3


async def test_an_attempt_that_is_cancelled_before_it_begins_gives_its_room_back(ledger: SqliteLedger) -> None:
    await filled(ledger, 2)
    clock = HandClock()
    works = Slow(is_open=True)
    dispatcher = Dispatcher(ledger, [Hook("works", "https://a", concurrency=2)], {"works": works}, clock)
    begun: set[asyncio.Task[None]] = set()
    await dispatcher.dispatch(begun)
    for attempt in begun:  # as a budget that ends just now does
        attempt.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
    assert works.sent == 0
    clock.pass_s(3600)  # the leases end
    await dispatcher.dispatch()
    await dispatcher.finish()
    assert works.sent == 2


async def test_a_rate_is_enforced(ledger: SqliteLedger) -> None:
    await filled(ledger, 20)
    clock = HandClock()
    hook = Hook("limited", "https://a", rate=4)
    limited = Slow(is_open=True)
    dispatcher = Dispatcher(ledger, [hook], {"limited": limited}, clock)
    sent = []
    for _ in range(4):
        wait_s = await dispatcher.dispatch()
        await dispatcher.finish()
        sent.append(limited.sent)
        assert wait_s is not None
        clock.pass_s(1)
    assert sent == [4, 8, 12, 16]


async def test_an_attempt_that_takes_too_long_is_a_failure(ledger: SqliteLedger) -> None:
    await filled(ledger, 1)
    hook = Hook("hangs", "https://a", timeout_s=0.1, schedule_s=(0, 60))
    clock = HandClock()
    dispatcher = Dispatcher(ledger, [hook], {"hangs": Slow()}, clock)
    await dispatcher.dispatch()
    await dispatcher.finish()
    (waiting,) = await ledger.deliveries(hook="hangs", state="due", limit=9)
    assert waiting.last_error == "no answer within 0.1 s"
    assert waiting.due_at_ms == clock.ms + 63_000


GOOD = {"name": "billing", "url": "https://billing.example.com/kling", "secret": "env:S"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "hook[1].name"),
        ({"url": "ftp://x/y"}, "hook[billing].url"),
        ({"url": "https://"}, "hook[billing].url"),
        ({"url": "redis:///stream"}, "hook[billing].url"),
        ({"url": "redis://host/stream"}, "hook[billing].secret"),
        ({"when": "data.["}, "hook[billing].when"),
        ({"latest_only": "yes"}, "hook[billing].latest_only"),
        ({"events": ["task.done"]}, "hook[billing].events"),
        ({"events": "task.succeed"}, "hook[billing].events"),
        ({"secret": "whsec_inline"}, "hook[billing].secret"),
        ({"secret": "env:MISSING"}, "hook[billing].secret"),
        ({"secret": "env:SHORT"}, "hook[billing].secret"),
        ({"secret": "env:ED"}, "hook[billing].secret"),
        ({"signature": "v1a"}, "hook[billing].secret"),
        ({"mode": "xml"}, "hook[billing].mode"),
        ({"schedule": []}, "hook[billing].schedule"),
        ({"schedule": [0, -5]}, "hook[billing].schedule"),
        ({"timeout_s": 0}, "hook[billing].timeout_s"),
        ({"timeout_s": "15"}, "hook[billing].timeout_s"),
        ({"concurrency": 0}, "hook[billing].concurrency"),
        ({"rate": 0}, "hook[billing].rate"),
        ({"retries": 3}, "hook[billing].retries"),
    ],
)
def test_a_wrong_hook_names_hook_and_field_and_never_the_secret(change: dict[str, object], field: str) -> None:
    environ = {"S": HOOK_SECRET, "SHORT": "whsec_YWJj", "ED": "whsk_" + HOOK_SECRET.removeprefix("whsec_")}
    problems: list[Problem] = []

    def follow(where: str, reference: str) -> str | None:
        kind, _, name = reference.partition(":")
        if kind != "env":
            return reference
        if name not in environ:
            problems.append(Problem(where, reference, "a variable that is set", f"Set {name}."))
        return environ.get(name)

    read_hooks([GOOD | change], follow, problems)
    assert field in [problem.field for problem in problems]
    for problem in problems:
        assert "YWJj" not in str(problem)
        assert HOOK_SECRET not in str(problem)


def test_a_good_hook_is_read_and_shows_no_secret() -> None:
    problems: list[Problem] = []
    (hook,) = read_hooks(
        [GOOD | {"url": "https://user:pass@example.com/x"}],
        lambda where, reference: HOOK_SECRET if reference == "env:S" else reference,
        problems,
    )
    assert problems == []
    assert "pass" not in repr(hook)
    assert HOOK_SECRET not in repr(hook)
    assert msgspec.structs.asdict(hook)["schedule_s"] == SCHEDULE_S
