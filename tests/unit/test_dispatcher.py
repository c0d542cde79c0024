"""The dispatcher: concurrency, rate limit, timeout and cancellation of deliveries."""

import asyncio

import pytest

from receiver.destinations.outcome import Outcome
from receiver.dispatcher import Dispatcher
from receiver.hook import Hook
from receiver.poller import Poller
from receiver.worker import Worker
from submitter.clock import Clock
from submitter.event import Event
from submitter.http import VendorHttp
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.task import TaskStatus
from tests.clock import HandClock
from tests.conformance.ledgers import report, task


class Slow:
    """An in-memory destination whose answers wait for a gate. It counts concurrent sends."""

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


async def fill(ledger: SqliteLedger, count: int) -> None:
    for i in range(count):
        await ledger.reserve(task(f"t{i}"))
        await ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED))


async def test_a_hanging_hook_delays_no_other_and_stays_within_its_concurrency(ledger: SqliteLedger) -> None:
    await fill(ledger, 30)
    hooks = [Hook("hangs", "https://a", concurrency=3), Hook("works", "https://b", concurrency=50)]
    hangs, works = Slow(), Slow(is_open=True)
    dispatcher = Dispatcher(ledger, hooks, {"hangs": hangs, "works": works}, HandClock())
    await dispatcher.dispatch()
    async with asyncio.timeout(5):
        while works.sent < 30 or hangs.waiting < 3:
            version = ledger.version()
            await ledger.wait_for_change(version, 0.05)
    await dispatcher.dispatch()
    assert hangs.most == 3
    hangs.gate.set()
    async with asyncio.timeout(5):
        while hangs.sent < 30:
            await dispatcher.dispatch()
            await dispatcher.finish()
    assert hangs.most == 3


async def test_an_attempt_cancelled_before_its_first_step_frees_its_slot(ledger: SqliteLedger) -> None:
    await fill(ledger, 2)
    clock = HandClock()
    works = Slow(is_open=True)
    dispatcher = Dispatcher(ledger, [Hook("works", "https://a", concurrency=2)], {"works": works}, clock)
    started: set[asyncio.Task[None]] = set()
    await dispatcher.dispatch(started)
    for attempt in started:  # as an exhausted budget does
        attempt.cancel()
    await asyncio.gather(*started, return_exceptions=True)
    assert works.sent == 0
    clock.pass_s(3600)  # past the leases
    await dispatcher.dispatch()
    await dispatcher.finish()
    assert works.sent == 2


async def test_a_hooks_rate_limit_is_enforced(ledger: SqliteLedger) -> None:
    await fill(ledger, 20)
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


async def test_an_attempt_that_exceeds_the_timeout_is_a_failure(ledger: SqliteLedger) -> None:
    await fill(ledger, 1)
    hook = Hook("hangs", "https://a", timeout_s=0.1, schedule_s=(0, 60))
    clock = HandClock()
    dispatcher = Dispatcher(ledger, [hook], {"hangs": Slow()}, clock)
    await dispatcher.dispatch()
    await dispatcher.finish()
    (waiting,) = await ledger.deliveries(hook="hangs", state="due", limit=9)
    assert waiting.last_error == "no answer within 0.1 s"
    assert waiting.due_at_ms == clock.ms + 63_000


class Failing(Slow):
    """Its answer is a failure."""

    async def send(self, event: Event, now_s: float) -> Outcome:
        self.sent += 1
        return Outcome(False, "HTTP 500")


@pytest.mark.parametrize("concurrency", [1, 2, 8])
async def test_an_open_circuit_breaker_sends_one_probe_after_each_pause(ledger: SqliteLedger, concurrency: int) -> None:
    await fill(ledger, 60)
    clock, failing = HandClock(), Failing()
    hook = Hook("fails", "https://a", concurrency=concurrency, schedule_s=(0, *[3600] * 9))
    dispatcher = Dispatcher(ledger, [hook], {"fails": failing}, clock)
    worker = Worker(ledger, dispatcher, Poller(ledger, {}, VendorHttp(), clock), clock=clock)
    await worker.deliver()
    sent = [failing.sent]
    for _ in range(3):
        clock.pass_s(600)  # longer than any pause
        worker.start()
        while (await ledger.hook_states([hook.subscription(1)]))[0].paused_until_ms < clock.ms:
            await ledger.wait_for_change(ledger.version(), 0.05)
        await worker.stop()
        sent.append(failing.sent - sum(sent))
    assert sent[1:] == [1, 1, 1]


async def test_a_worker_that_stops_sends_what_it_is_claiming(ledger: SqliteLedger) -> None:
    await fill(ledger, 40)
    works, clock = Slow(is_open=True), Clock()
    dispatcher = Dispatcher(ledger, [Hook("works", "https://a", concurrency=8)], {"works": works}, clock)
    worker = Worker(ledger, dispatcher, Poller(ledger, {}, VendorHttp(), clock), clock=clock)
    worker.start()
    for _ in range(3):
        await asyncio.sleep(0)  # the first claim is on its way
    await worker.stop()
    leased = [one for one in await ledger.deliveries(hook="works", state="due", limit=99) if one.attempts]
    assert (works.sent, leased) == (8, [])
