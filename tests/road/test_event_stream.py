"""A vendor that reports by an event stream (Oxen.ai): reconnection, missed events, tasks it forgets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from submitter.sandbox.oxen import OxenSandbox
from submitter.submit import Submitter
from submitter.task import TaskStatus
from tests.world import World


@contextlib.asynccontextmanager
async def submitter(world: World) -> AsyncIterator[Submitter]:
    """Open the submitter of another process, with the current settings."""
    async with Submitter(
        world.settings.common, world.open_ledger(), look_for_s=(0.0, 0.05), sending_lease_s=1.0
    ) as opened:
        yield opened


def created(world: World) -> dict[str, int]:
    return {name: sandbox.counts["created"] for name, sandbox in world.sandboxes.items()}


# -- failover -------------------------------------------------------------------------------------


async def oxen_world(world: World) -> OxenSandbox:
    oxen = world.stand_in("oxen")
    assert isinstance(oxen, OxenSandbox)
    await world.start()
    async with asyncio.timeout(60):
        while oxen.counts["streams"] == 0:
            await asyncio.sleep(0.01)
    return oxen


async def ended(oxen: OxenSandbox) -> None:
    """Wait until the only task has ended at the vendor and its event was dropped."""
    async with asyncio.timeout(60):
        while next(iter(oxen.jobs.values())).is_open or not (
            oxen.counts["callbacks"] + oxen.counts["callbacks_dropped"]
        ):
            await asyncio.sleep(0.01)


async def test_tasks_at_oxen_are_followed_by_the_stream_without_a_query(world: World) -> None:
    oxen = await oxen_world(world)
    tasks = [await world.submitter.submit(world.request(vendor="oxen")) for _ in range(3)]
    assert {(await task.result(timeout=60)).status for task in tasks} == {TaskStatus.SUCCEED}
    assert (oxen.counts["queries"], oxen.counts["streams"]) == (0, 1)


async def test_an_event_before_the_answer_to_create_is_held_back(world: World) -> None:
    oxen = await oxen_world(world)
    world.faults(create_late=1, late_s=5)
    submitting = asyncio.create_task(world.submitter.submit(world.request(vendor="oxen")))
    async with asyncio.timeout(60):
        while not oxen.counts["callbacks"]:
            await asyncio.sleep(0.01)
    await world.clock.skip_until(submitting.done)
    task = await submitting
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
    assert oxen.counts["queries"] == 0


async def test_a_broken_stream_is_reopened_and_missed_events_are_polled(world: World) -> None:
    oxen = await oxen_world(world)
    world.faults(drop=1)
    task = await world.submitter.submit(world.request(vendor="oxen"))
    await ended(oxen)
    for queue in oxen.subscribers:
        queue.put_nowait(None)
    await world.clock.skip_until(lambda: oxen.counts["streams"] == 2)
    done = await task.result(timeout=60)
    assert (done.status, done.heard_from_vendor) == (TaskStatus.SUCCEED, False)
    assert oxen.counts["streams"] == 2


async def test_a_deployment_that_forgets_ended_tasks_is_followed_by_its_stream(world: World) -> None:
    oxen = await oxen_world(world)
    world.faults(forget=1)
    done = await (await world.submitter.submit(world.request(vendor="oxen"))).result(timeout=60)
    assert (done.status, oxen.counts["queries"]) == (TaskStatus.SUCCEED, 0)


async def test_a_forgotten_task_without_an_event_is_abandoned_with_the_reason(world: World) -> None:
    world.environ["KLING_RELAY_ABANDON_AFTER_S"] = "3600"
    oxen = await oxen_world(world)
    world.faults(forget=1, drop=1)
    task = await world.submitter.submit(world.request(vendor="oxen"))
    await ended(oxen)
    done = await world.skip_to_end(task)
    assert done.status is TaskStatus.ABANDONED
    assert "oxen does not know this task" in done.status_message


async def test_a_cancelled_task_is_found_by_a_poll(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    oxen = await oxen_world(world)
    oxen.pace_s = 5
    task = await world.submitter.submit(world.request(vendor="oxen"))
    next(iter(oxen.jobs.values())).status = "cancelled"
    done = await task.result(timeout=60)
    assert (done.status, done.status_message) == (TaskStatus.FAILED, "cancelled")


async def test_an_unintelligible_event_is_quarantined(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    oxen = await oxen_world(world)
    world.faults(no_url=1)
    task = await world.submitter.submit(world.request(vendor="oxen"))
    ledger = world.open_ledger()
    async with asyncio.timeout(60):
        while not (
            quarantined := [one for one in await ledger.quarantined(9) if "media_generation_completed" in one.reason]
        ):
            await ledger.wait_for_change(ledger.version(), 0.1)
    assert quarantined[0].vendor == "oxen"
    next(iter(oxen.jobs.values())).has_url = True
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
    await ledger.close()


async def test_oxen_needs_no_public_url(world: World) -> None:
    oxen = world.stand_in("oxen")
    await world.start(receiver=False)
    for name in ("KLING_RELAY_PUBLIC_URL", "KLING_RELAY_MEDIA_STORE"):
        del world.environ[name]
    files = f"{world.hook_url}/files"
    async with submitter(world) as without:
        request = world.request(vendor="oxen", image=f"{files}/girl.png", video=f"{files}/dance.mp4")
        assert (await without.submit(request)).task.vendor == "oxen"
    assert oxen.counts["created"] == 1
