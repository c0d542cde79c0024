"""Never a second bill: creates without a clear answer, submitters that come back late, repeated retries."""

import asyncio
from typing import Any

import pytest

from submitter.errors import LedgerUnavailable, SubmissionUnknown, VendorRefused
from submitter.http import Outcome, Unanswered, VendorHttp
from submitter.observation import CreateRefused, OutcomeUnknown
from submitter.request import retry_id
from submitter.task import TaskStatus
from submitter.vendors.base import HttpRequest
from tests.world import World


class LateHttp(VendorHttp):
    """Holds the first create back: its sender gets no answer, and `arrive` sends it later."""

    held: HttpRequest | None = None

    async def run(self, request: HttpRequest, *, fresh: bool = False) -> Outcome:
        if fresh and self.held is None:
            self.held = request
            return Unanswered("the connection was cut")
        return await super().run(request, fresh=fresh)

    async def arrive(self) -> None:
        assert self.held is not None
        await super().run(self.held, fresh=True)


async def test_a_create_that_arrives_after_a_later_refusal_is_adopted(world: World) -> None:
    await world.start()
    late = LateHttp()
    world.create_with(late)
    world.faults(refuse="balance")
    request = world.request(external_task_id="order-1")
    with pytest.raises(VendorRefused, match="Buy another one"):
        await world.submitter.submit(request)
    world.faults(drop=1)
    await late.arrive()
    task = (await world.submitter.submit(request)).task
    assert (task.task_id, world.kling.counts["created"]) == (next(iter(world.kling.jobs)), 1)


async def test_its_callbacks_alone_bring_a_refused_task_back(world: World) -> None:
    await world.start()
    late = LateHttp()
    world.create_with(late)
    world.faults(refuse="balance")
    with pytest.raises(VendorRefused):
        await world.submitter.submit(world.request(external_task_id="order-1"))
    world.faults()
    await late.arrive()
    await world.inbox.until(4)
    seen = list(dict.fromkeys(event["type"] for event in world.inbox.events))
    assert (seen[0], seen[-1], world.kling.counts["created"]) == ("task.refused", "task.succeed", 1)


async def test_what_another_submitter_sent_after_our_look_at_the_row_counts(world: World) -> None:
    """The row is read, then another submitter sends without an answer, then the lease is taken."""
    world.stand_in("novita")
    await world.start(receiver=False)
    prepared = await world.submitter.prepare(world.request(external_task_id="order-1", vendor="novita"))
    candidates = [await world.submitter._candidate("novita")]
    reservations, creator = world.submitter._reservations, world.submitter.creator
    first = await reservations.reserve(prepared, candidates, callback=True)
    await creator.observe("order-1", CreateRefused("no balance", first.lease_owner))
    before = await world.submitter._ledger.get("order-1")
    other = await reservations.reserve(prepared, candidates, callback=True)
    await creator.observe("order-1", creator.send_lease(other.lease_owner, begins=True))
    await creator.observe("order-1", OutcomeUnknown("no answer", other.lease_owner))

    class Stale:
        async def get(self, external_task_id: str) -> Any:
            return before

        def __getattr__(self, name: str) -> Any:
            return getattr(world.submitter._ledger, name)

    reservations._ledger = Stale()
    task = await reservations.reserve(prepared, candidates, callback=True)
    assert task.may_have_been_sent


async def test_refused_tasks_that_start_again_wait_for_a_free_slot(world: World) -> None:
    world.environ["KLING_RELAY_PARALLEL"] = "1"
    await world.start()
    world.faults(refuse="balance")
    requests = [world.request(external_task_id=f"order-{number}") for number in range(3)]
    for request in requests:
        with pytest.raises(VendorRefused):
            await world.submitter.submit(request)
    world.faults()
    ledger, most = world.open_ledger(), 0
    again = asyncio.gather(*map(world.submitter.submit, requests))
    while not again.done():
        most = max(most, await ledger.open_tasks("kling"))
        await asyncio.wait({again}, timeout=0.02)
    await ledger.close()
    assert (len(await again), most) == (3, 1)


async def test_the_answer_to_a_create_is_stored_when_the_ledger_is_back(world: World) -> None:
    await world.start()
    world.faults(drop=1)
    ledger, failures = world.submitter._ledger, 3
    apply = ledger.apply

    async def failing(external_task_id: str, decide: Any) -> Any:
        nonlocal failures
        if world.kling.counts["created"] and failures:
            failures -= 1
            raise LedgerUnavailable("the disk is full")
        return await apply(external_task_id, decide)

    ledger.apply = failing  # type: ignore[method-assign]
    submitting = asyncio.create_task(world.submitter.submit(world.request(external_task_id="order-1")))
    await world.clock.skip_until(submitting.done)
    assert ((await submitting).task.status, failures) == (TaskStatus.SUBMITTED, 0)


async def test_a_repeated_retry_returns_the_first_ones_task(world: World) -> None:
    world.faults(fail=1)
    await world.start()
    failed = await world.submitter.submit(world.request(external_task_id="order-1"))
    assert (await failed.result(timeout=60)).status is TaskStatus.FAILED
    first, second = await asyncio.gather(*(world.submitter.retry("order-1") for _ in range(2)))
    third = await world.submitter.retry("order-1")
    assert {task.external_task_id for task in (first, second, third)} == {"order-1~2"}
    assert world.kling.counts["created"] == 2


def test_the_id_of_a_retry_counts_up_and_stays_valid() -> None:
    assert retry_id("order-1") == "order-1~2"
    assert retry_id("order-1~2") == "order-1~3"
    long = retry_id("x" * 128)
    assert (long, len(retry_id(long))) == (retry_id("x" * 128), 34)


async def test_a_submitter_that_lost_its_lease_says_so_and_changes_nothing(world: World) -> None:
    await world.start(receiver=False)
    world.faults(refuse="balance")
    task = await world.submitter._reservations.reserve(
        await world.submitter.prepare(world.request(external_task_id="order-1")),
        [await world.submitter._candidate("kling")],
        callback=True,
    )
    world.clock.skip(3600)
    creator = world.submitter.creator
    taken = await creator.observe("order-1", creator.send_lease("another"))
    assert taken.lease_owner == "another"
    with pytest.raises(SubmissionUnknown, match="stopped for longer than its lease"):
        await creator._record_refusal(task, "no balance")
    assert (await world.submitter._ledger.get("order-1")) == taken


async def test_a_takeover_after_a_wait_for_a_slot_decides_by_the_row_as_it_is_then(world: World) -> None:
    """Meanwhile another submitter restarted the task, moved it, began to send, and died."""
    world.stand_in("novita")
    await world.start(receiver=False)
    submitter, creator = world.submitter, world.submitter.creator
    prepared = await submitter.prepare(world.request(external_task_id="order-1", vendor="kling,novita"))
    candidates = [await submitter._candidate(name) for name in ("kling", "novita")]
    first = await submitter._reservations.reserve(prepared, candidates, callback=True)
    await creator.observe("order-1", CreateRefused("no balance", first.lease_owner))

    async def wait_while_another_sends(_: object) -> None:
        restarted = await creator.observe("order-1", creator.send_lease("other"))
        await creator.move_to(restarted, candidates[1], "no balance")
        await creator.observe("order-1", creator.send_lease("other", begins=True))
        world.clock.skip(3600)

    submitter._reservations._free_slot = wait_while_another_sends  # type: ignore[method-assign,assignment]
    taken = await submitter._reservations.reserve(prepared, candidates, callback=True)
    assert (taken.vendor, taken.may_have_been_sent, list(taken.unanswered_since_ms)) == ("novita", True, ["novita"])
