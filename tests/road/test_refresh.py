"""`refresh` and `retry`: the vendor is asked before anything is paid for again; result URLs are renewed."""

from typing import Any

import pytest

from submitter.errors import InvalidRequest, SubmissionUnknown, TaskNotFound
from submitter.http import NotSent
from submitter.task import Task, TaskStatus
from tests.road.test_adoption import abandoned_create, types
from tests.world import World


async def abandoned(world: World, **changes: Any) -> Task:
    """Return a task that the relay stopped waiting for, while the vendor works on it."""
    world.environ["KLING_RELAY_ABANDON_AFTER_S"] = "3600"
    vendor = changes.get("vendor", "kling")
    sandbox = world.stand_in(vendor)
    sandbox.pace_s = 7200
    await world.start()
    task = await world.skip_to_end(await world.submitter.submit(world.request(external_task_id="order-1", **changes)))
    assert task.status is TaskStatus.ABANDONED
    return task


async def end(world: World, vendor: str = "kling") -> None:
    """Let the vendor end the task, without a callback."""
    world.faults(drop=1)
    (job,) = world.stand_in(vendor).jobs.values()
    await world.clock.skip_until(lambda: not job.is_open, step_s=600)


@pytest.mark.parametrize("vendor", ["kling", "novita", "highway", "aihubmax", "oxen"])
async def test_refresh_brings_an_abandoned_task_to_its_truth(world: World, vendor: str) -> None:
    await abandoned(world, vendor=vendor)
    await end(world, vendor)
    (found,) = await world.submitter.refresh("order-1")
    assert (found.outcome, found.task.status) == ("answered", TaskStatus.SUCCEED)
    assert found.task.videos
    await world.clock.skip_until(lambda: "task.succeed" in types(world))
    assert types(world)[-2:] == ["task.abandoned", "task.succeed"]


async def test_refresh_of_a_task_that_the_vendor_works_on_says_so_and_changes_nothing(world: World) -> None:
    task = await abandoned(world)
    (found,) = await world.submitter.refresh("order-1")
    assert (found.outcome, found.task.status) == ("answered", TaskStatus.ABANDONED)
    assert found.message in ("kling says submitted", "kling says processing")
    assert found.task == task


async def test_retry_of_an_abandoned_task_asks_first(world: World) -> None:
    await abandoned(world)
    with pytest.raises(InvalidRequest, match=r"order-1 is abandoned .*kling says (submitted|processing)"):
        await world.submitter.retry("order-1")
    await end(world)
    with pytest.raises(InvalidRequest, match="order-1 is succeed"):  # it was asked, and has a result now
        await world.submitter.retry("order-1")
    assert world.kling.counts["created"] == 1


async def test_retry_of_an_abandoned_task_that_failed_or_is_absent_gets_a_new_id(world: World) -> None:
    await abandoned(world)
    (job,) = world.kling.jobs.values()
    job.status = "failed"
    again = await world.submitter.retry("order-1", new_id="order-2")
    assert (again.task.metadata["retry_of"], world.kling.counts["created"]) == ("order-1", 2)


async def test_retry_of_an_abandoned_task_that_the_vendor_does_not_know_gets_a_new_id(world: World) -> None:
    await abandoned(world)
    world.kling.jobs.clear()
    again = await world.submitter.retry("order-1", new_id="order-2")
    assert again.external_task_id == "order-2"


async def test_retry_without_an_answer_sends_nothing(world: World) -> None:
    await abandoned(world)

    async def cut(*_: Any, **__: Any) -> NotSent:
        return NotSent("the network is cut")

    world.submitter.creator.http.run = cut  # type: ignore[method-assign]
    with pytest.raises(SubmissionUnknown, match=r"the network is cut\. Nothing was sent"):
        await world.submitter.retry("order-1")
    (found,) = await world.submitter.refresh("order-1")
    assert (found.outcome, found.task.status) == ("no_answer", TaskStatus.ABANDONED)


async def test_refresh_asks_nothing_about_a_task_that_was_not_sent_or_is_being_sent(world: World) -> None:
    await world.start(receiver=False)
    prepared = await world.submitter.prepare(world.request(external_task_id="order-1"))
    candidates = [await world.submitter._candidate("kling")]
    await world.submitter._reservations.reserve(prepared, candidates, callback=True)
    (sending,) = await world.submitter.refresh("order-1")
    assert (sending.outcome, sending.message) == ("not_asked", "a submitter is sending it at the moment")
    world.clock.skip(3600)
    (unsent,) = await world.submitter.refresh("order-1")
    assert (unsent.outcome, unsent.message) == ("not_asked", "nothing was sent to the vendor")
    await abandoned_create(world, world.request(external_task_id="order-2", vendor="kling"))
    (absent,) = await world.submitter.refresh("order-2")
    assert (absent.outcome, absent.report) == ("answered", None)
    with pytest.raises(TaskNotFound):
        await world.submitter.refresh("order-3")


async def test_refresh_renews_the_urls_of_a_result_without_an_event(world: World) -> None:
    world.stand_in("novita")
    world.faults(expire_s=60)
    await world.start()
    task = await world.submitter.submit(world.request(external_task_id="order-1", vendor="novita"))
    done = await task.result(timeout=60)
    await world.inbox.until(2)
    world.clock.skip(3600)
    (found,) = await world.submitter.refresh("order-1")
    assert (found.outcome, found.task.status) == ("answered", TaskStatus.SUCCEED)
    before, after = done.videos[0].expires_at_ms, found.task.videos[0].expires_at_ms
    assert before is not None
    assert after is not None
    assert after >= before + 3_600_000
    ledger = world.open_ledger()
    assert [event.type for event in await ledger.events("order-1")] == ["task.submitted", "task.succeed"]
    await ledger.close()


async def test_several_tasks_are_asked_for_at_once(world: World) -> None:
    await world.start()
    tasks = [await world.submitter.submit(world.request()) for _ in range(3)]
    for task in tasks:
        await task.result(timeout=60)
    ids = [task.external_task_id for task in tasks]
    found = await world.submitter.refresh(*ids)
    assert [one.task.external_task_id for one in found] == ids
    assert {one.outcome for one in found} == {"answered"}
    assert world.kling.counts["query_v2"] == 1
