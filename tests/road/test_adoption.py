"""Never a stranger's task: one that another ledger of the same account created with the same id is not adopted."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from submitter.errors import IdConflict, InvalidRequest, SubmissionUnknown, VendorRefused
from submitter.http import NotSent
from submitter.ledger import open_ledger
from submitter.observation import OutcomeUnknown
from submitter.sandbox.kling import KlingSandbox
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus
from tests.world import World


@contextlib.asynccontextmanager
async def staging(world: World) -> AsyncIterator[Submitter]:
    """Open the submitter of another system, with another ledger, that uses the same account."""
    ledger = open_ledger(f"sqlite:///{world.folder / 'staging.db'}")
    async with Submitter(world.settings.common, ledger, clock=world.clock) as opened:
        yield opened


async def stored(world: World, id: str = "order-1") -> Task:
    ledger = world.open_ledger()
    try:
        return await ledger.get(id)
    finally:
        await ledger.close()


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_an_id_that_another_ledger_used_is_a_conflict_and_its_task_is_not_adopted(world: World, api: str) -> None:
    if api == "v1":
        world.use_v1()
    await world.start()
    request = world.request(external_task_id="order-1")
    async with staging(world) as other:
        await other.submit(request, callback=False)
    with pytest.raises(IdConflict, match=r"was used before at kling.*Nothing was created or charged") as conflict:
        await world.submitter.submit(request)
    assert conflict.value.vendor == "kling"
    task = await stored(world)
    assert (task.status, task.task_id, task.cost, task.videos) == (TaskStatus.REFUSED, None, (), ())
    await world.inbox.until(1)
    assert [event["type"] for event in world.inbox.events] == ["task.refused"]
    assert world.kling.counts["created"] == 1


async def test_an_id_of_a_pruned_task_is_a_conflict(world: World) -> None:
    await world.start()
    request = world.request(external_task_id="order-1")
    await (await world.submitter.submit(request)).result(timeout=60)
    await world.inbox.until(3)
    ledger = world.open_ledger()
    while not await ledger.prune(world.clock.now_ms() + 1, 10):  # possible once the last delivery is settled
        await ledger.wait_for_change(ledger.version(), 1)
    await ledger.close()
    with pytest.raises(IdConflict):
        await world.submitter.submit(request)
    assert world.kling.counts["created"] == 1


@pytest.mark.parametrize("api", ["v1", "v2"])
async def test_a_strangers_task_that_a_lookup_finds_is_not_adopted(world: World, api: str) -> None:
    """The create is ambiguous, and the only task with this id was created an hour before."""
    if api == "v1":
        world.use_v1()
    await world.start()
    request = world.request(external_task_id="order-1")
    async with staging(world) as other:
        await other.submit(request, callback=False)
    world.clock.skip(3600)
    world.faults(refuse="maintenance")  # 503: it may have created a task
    with pytest.raises(IdConflict):
        await world.submitter.submit(request)
    assert (await stored(world)).status is TaskStatus.REFUSED


async def test_our_own_task_that_a_lookup_finds_is_adopted(world: World) -> None:
    await world.start()
    world.faults(create_5xx=1)
    task = await world.submitter.submit(world.request(external_task_id="order-1"))
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
    assert task.task.first_sent_at_ms is not None
    assert world.kling.counts["created"] == 1


async def test_a_strangers_task_that_a_poll_finds_is_not_adopted(world: World) -> None:
    """The submitter dies without an answer; the relay looks for the task by its id."""
    await world.start()
    request = world.request(external_task_id="order-1")
    async with staging(world) as other:
        await other.submit(request, callback=False)
    world.clock.skip(3600)
    await abandoned_create(world, request)
    await world.clock.skip_until(lambda: "task.refused" in types(world), step_s=10)
    assert types(world) == ["task.submission_unknown", "task.refused"]
    assert "was used before" in (await stored(world)).status_message


async def abandoned_create(world: World, request: Any) -> None:
    """Leave a task whose create may have been sent, and whose submitter is gone."""
    prepared = await world.submitter.prepare(request)
    candidates = [await world.submitter._candidate(name) for name in prepared.vendors]
    creator = world.submitter.creator
    task = await world.submitter._reservations.reserve(prepared, candidates, callback=True)
    await creator.observe(task.external_task_id, creator.send_lease(task.lease_owner or "", begins=True))
    await creator.observe(task.external_task_id, OutcomeUnknown("the submitter was killed", task.lease_owner))


def types(world: World) -> list[str]:
    return list(dict.fromkeys(event["type"] for event in world.inbox.events))


async def test_an_element_that_does_not_exist_is_refused_at_once_in_the_vendors_words(world: World) -> None:
    assert isinstance(world.kling, KlingSandbox)
    world.kling.elements = frozenset()
    await world.start()
    request = world.request(external_task_id="order-1", element_id="829836802793406551")
    with pytest.raises(VendorRefused, match=r"element 829836802793406551 does not exist .*request_id sandbox-"):
        await world.submitter.submit(request)
    assert (world.kling.counts["create_v2"], world.kling.counts["query_v2"]) == (1, 0)
    assert (await stored(world)).status is TaskStatus.REFUSED


# -- adopt ----------------------------------------------------------------------------------------


async def test_adopt_asks_the_vendor_and_takes_over_what_it_says(world: World) -> None:
    await world.start()
    async with staging(world) as other:  # stands for the create whose answer was lost
        theirs = await other.submit(world.request(vendor="kling"), callback=False)
    await abandoned_create(world, world.request(external_task_id="order-1"))
    task_id = str(theirs.task.task_id)
    with pytest.raises(InvalidRequest, match=f"the vendor has it as {theirs.external_task_id}"):
        await world.submitter.adopt("order-1", task_id)
    job = world.kling.jobs[task_id]
    job.request.external_id = None  # as a task that was created in the vendor's console
    adopted = (await world.submitter.adopt("order-1", task_id)).task
    assert adopted.task_id == task_id
    assert adopted.status in (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED)


async def test_adopt_refuses_an_unknown_task_one_of_another_row_and_a_silent_vendor(world: World) -> None:
    await world.start()
    first = await world.submitter.submit(world.request(external_task_id="order-0"))
    await abandoned_create(world, world.request(external_task_id="order-1"))
    with pytest.raises(InvalidRequest, match="not that of order-0"):
        await world.submitter.adopt("order-1", str(first.task.task_id))
    with pytest.raises(InvalidRequest, match="does not know this task"):
        await world.submitter.adopt("order-1", "12345")
    with pytest.raises(InvalidRequest, match="order-0 is "):
        await world.submitter.adopt("order-0", "12345")

    async def cut(*_: Any, **__: Any) -> NotSent:
        return NotSent("the network is cut")

    world.submitter.creator.http.run = cut  # type: ignore[method-assign]
    with pytest.raises(SubmissionUnknown, match=r"the network is cut\. Nothing was changed"):
        await world.submitter.adopt("order-1", "12345")
    assert (await stored(world)).status is TaskStatus.SUBMISSION_UNKNOWN
