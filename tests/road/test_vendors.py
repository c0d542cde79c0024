"""End-to-end tests with several vendors: failover, unknown outcomes, callbacks, event streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from submitter.callback_expectation import sends_callbacks
from submitter.callback_url import KeyRing, callback_url
from submitter.clock import Clock
from submitter.errors import IdConflict, InvalidRequest, InvalidSettings, SubmissionUnknown, VendorRefused
from submitter.observation import SendLease
from submitter.request import MotionControl
from submitter.sandbox.faults import Faults
from submitter.schedule import Backoff, PollPolicy
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus
from submitter.transition import transition
from tests.world import KEY, World


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


@pytest.mark.parametrize("kind", ["capacity", "maintenance"])
async def test_a_vendor_without_capacity_or_under_maintenance_fails_over(world: World, kind: Any) -> None:
    world.stand_in("novita")
    await world.start()
    world.kling.set_faults(Faults(refuse=kind))
    task = await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    assert (task.task.vendor, created(world)) == ("novita", {"kling": 0, "novita": 1})
    assert world.kling.counts["query_v2"] == (3 if kind == "maintenance" else 0)  # a 5xx needs lookups first
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    again = await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    assert again.task.task_id == done.task_id
    with pytest.raises(IdConflict, match="a different vendor"):
        await world.submitter.submit(world.request(vendor="kling", external_task_id="order-1"))
    assert created(world) == {"kling": 0, "novita": 1}
    types = [event["type"] for event in world.inbox.events]
    submitted = world.inbox.events[types.index("task.submitted")]["data"]
    assert submitted["vendor"] == "novita"
    assert submitted["status_message"].startswith("sent to novita because it was refused by kling: ")


async def test_if_all_vendors_refuse_one_with_a_temporary_refusal_is_retried(world: World) -> None:
    world.stand_in("novita").set_faults(Faults(refuse="balance"))
    world.kling.slots = 0
    await world.start()
    submitting = asyncio.create_task(world.submitter.submit(world.request(vendor="novita,kling,highway")))
    world.stand_in("novita")
    with pytest.raises(InvalidSettings, match="HIGHWAY_API_KEY"):  # every named vendor needs credentials
        await submitting
    submitting = asyncio.create_task(world.submitter.submit(world.request(vendor="kling,novita")))
    async with asyncio.timeout(60):
        while world.kling.counts["refused_1303"] < 2:
            await asyncio.sleep(0.01)
    world.kling.slots = 5
    task = await submitting
    assert (task.task.vendor, created(world)) == ("kling", {"kling": 1, "novita": 0})


async def test_an_unreachable_vendor_fails_over(world: World) -> None:
    world.stand_in("novita")
    world.environ["KLING_BASE_URL"] = "http://127.0.0.1:9"
    await world.start()
    task = await world.submitter.submit(world.request(vendor="kling,novita"))
    assert task.task.vendor == "novita"
    assert "unreachable" in task.task.refused_by[0].reason


async def test_an_invalid_request_does_not_fail_over(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    request = world.request(vendor="kling,novita", video=f"{world.hook_url}/files/missing.mp4")
    with pytest.raises(VendorRefused, match="kling refused: video cannot be fetched"):
        await world.submitter.submit(request)
    assert world.sandboxes["novita"].counts["refused_invalid"] == 0


async def test_the_parallel_limit_of_one_vendor_fails_over(world: World) -> None:
    world.stand_in("novita")
    world.kling.pace_s = 5
    world.hooks += "[vendor.kling]\nparallel = 1\n"
    await world.start()
    first = await world.submitter.submit(world.request(vendor="kling,novita"))
    second = await world.submitter.submit(world.request(vendor="kling,novita"))
    assert (first.task.vendor, second.task.vendor) == ("kling", "novita")
    assert "the configured limit of 1" in second.task.refused_by[0].reason


async def test_an_unsuitable_vendor_is_left_out_and_no_suitable_vendor_is_an_error(world: World) -> None:
    for vendor in ("novita", "oxen"):
        world.stand_in(vendor)
    await world.start(receiver=False)
    request = world.request(vendor="novita,kling", element_id="829836802793406551")
    prepared = await world.submitter.prepare(request)
    assert prepared.vendors == ("kling",)
    assert "novita is left out: element_id" in prepared.warnings[0]
    with pytest.raises(InvalidRequest, match="Or use kling"):
        await world.submitter.prepare(replace(request, vendor="novita,oxen"))
    with pytest.raises(InvalidRequest, match="vendor"):
        await world.submitter.prepare(replace(request, vendor=" , "))
    with pytest.raises(InvalidRequest, match="one of kling, novita"):
        await world.submitter.prepare(replace(request, vendor="kling,unknown"))


async def test_the_default_mode_is_the_vendors_first(world: World) -> None:
    oxen = world.stand_in("oxen")
    await world.start()
    with pytest.raises(InvalidRequest, match="Or use kling or novita or highway or aihubmax"):
        await world.submitter.submit(world.request(vendor="oxen", mode="std"))
    with pytest.raises(InvalidRequest, match="requires one"):
        await world.submitter.submit(world.request(vendor="oxen", prompt=""))
    await world.submitter.submit(world.request(vendor="oxen"))
    assert next(iter(oxen.jobs.values())).request.resolution == "1080p"
    await world.submitter.submit(world.request())
    assert next(iter(world.kling.jobs.values())).request.resolution == "720p"


async def test_a_request_refused_by_all_vendors_starts_again_at_the_first(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    world.faults(refuse="balance")
    request = world.request(vendor="kling,novita", external_task_id="order-1")
    with pytest.raises(VendorRefused, match=r"novita refused.*refused by kling: no balance"):
        await world.submitter.submit(request)
    ledger = world.open_ledger()
    refused = await ledger.get("order-1")
    assert (refused.status, [one.vendor for one in refused.refused_by]) == (TaskStatus.REFUSED, ["kling"])
    assert [event.type for event in await ledger.events("order-1")] == ["task.refused"]
    assert (await ledger.open_tasks("kling"), await ledger.open_tasks("novita")) == (0, 0)
    await ledger.close()
    world.faults()
    task = await world.submitter.submit(request)
    assert (task.task.vendor, task.task.refused_by) == ("kling", ())
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED


async def test_a_callback_of_a_vendor_that_refused_is_quarantined(world: World, client: httpx.AsyncClient) -> None:
    world.stand_in("novita").pace_s = 5
    await world.start()
    world.kling.set_faults(Faults(refuse="balance"))
    await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    url = callback_url(world.receiver_url, KeyRing.read(f"test:{KEY}"), "kling", "order-1", Clock().now_s())
    body = b'{"id": "1", "status": "failed", "message": "late"}'
    answer = await client.post(url, content=body, headers=world.kling.sign(body))
    assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "quarantined")
    assert (await world.submitter.task("order-1")).task.status is TaskStatus.SUBMITTED


# -- unknown outcomes -----------------------------------------------------------------------------


def order_1(world: World, vendor: str) -> MotionControl:
    return world.request(vendor=vendor, external_task_id="order-1", video=f"{world.hook_url}/files/dance.mp4")


async def reserve(world: World, vendor: str, *, begins: bool) -> None:
    """Store the row of a submitter that died before, or (`begins`) after, it started to send."""
    async with submitter(world) as dying:
        prepared = await dying.prepare(order_1(world, vendor))
    ledger = world.open_ledger()
    now_ms = Clock().now_ms() - 60_000
    poll_policy = world.settings.common.vendors[vendor].poll_policy
    blank = Task("order-1", vendor, TaskStatus.CREATED, now_ms, now_ms, poll_policy, request=prepared.stored_request)
    sent = transition(blank, SendLease("the dead", now_ms + 1, begins), now_ms)
    assert sent is not None
    await ledger.reserve(sent.task)
    await ledger.close()


async def test_the_task_of_a_submitter_that_died_before_sending_is_sent_again(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    await reserve(world, "novita", begins=False)
    task = await world.submitter.submit(order_1(world, "novita"))
    assert (await task.result(timeout=60)).status is TaskStatus.SUCCEED
    assert created(world)["novita"] == 1


async def test_the_task_of_a_submitter_that_died_while_sending_is_settled_by_an_operator(world: World) -> None:
    world.stand_in("novita")
    await world.start(receiver=False)
    await reserve(world, "novita", begins=True)
    with pytest.raises(SubmissionUnknown, match="cannot be queried by external_task_id"):
        await world.submitter.submit(order_1(world, "novita"))
    with pytest.raises(SubmissionUnknown):
        await world.submitter.retry("order-1")
    assert created(world)["novita"] == 0
    task = await world.submitter.retry("order-1", absent=True)
    assert task.task.status is TaskStatus.SUBMITTED
    assert created(world)["novita"] == 1
    with pytest.raises(InvalidRequest, match="There is nothing to adopt"):
        await world.submitter.adopt("order-1", "another")


async def test_a_callback_settles_an_unknown_submission(world: World) -> None:
    novita = world.stand_in("novita")
    await world.start()
    world.faults(create_5xx=1)
    with pytest.raises(SubmissionUnknown, match="tasks adopt order-1 TASK_ID"):
        await world.submitter.submit(order_1(world, "novita"))
    done = await (await world.submitter.task("order-1")).result(timeout=60)
    assert (done.status, done.task_id) == (TaskStatus.SUCCEED, next(iter(novita.jobs)))
    await world.inbox.until(2)
    assert [event["type"] for event in world.inbox.events] == ["task.submission_unknown", "task.succeed"]


async def test_a_task_that_was_never_sent_is_reported_as_not_sent(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    await reserve(world, "novita", begins=False)
    task = await world.submitter.task("order-1")
    await world.inbox.until(1)
    assert world.inbox.events[0]["type"] == "task.refused"
    assert "before a create was sent" in world.inbox.events[0]["data"]["status_message"]
    again = await world.submitter.retry("order-1")
    assert (await again.result(timeout=60)).external_task_id == task.external_task_id


# -- callbacks ------------------------------------------------------------------------------------


def success(*, heard: bool, expected: bool = True) -> Task:
    poll_policy = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
    return Task(
        "a", "novita", TaskStatus.SUCCEED, 0, 0, poll_policy, expects_callback=expected, heard_from_vendor=heard
    )


def test_callbacks_are_expected_until_results_come_only_from_polls() -> None:
    assert sends_callbacks([])
    assert sends_callbacks([success(heard=False, expected=False)])  # --no-callback is no evidence
    assert not sends_callbacks([success(heard=False)])
    assert sends_callbacks([success(heard=False), success(heard=True)])


async def test_a_vendor_that_sends_no_callbacks_is_polled_sooner_until_it_does(world: World) -> None:
    world.stand_in("novita")
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.3"
    world.hooks += '[vendor.novita]\ncallbacks = "auto"\n'
    await world.start()
    world.faults(drop=1)
    first = await world.submitter.submit(world.request(vendor="novita"))
    default = world.settings.common.vendors["novita"].poll_policy
    assert first.task.poll_policy == default
    assert (await first.result(timeout=60)).status is TaskStatus.SUCCEED
    world.faults()
    second = await world.submitter.submit(world.request(vendor="novita"))
    assert second.task.poll_policy.while_expected == default.while_unexpected
    assert (await second.result(timeout=60)).heard_from_vendor
    third = await world.submitter.submit(world.request(vendor="novita"))
    assert third.task.poll_policy == default


async def test_callbacks_false_sends_no_url_and_polls(world: World) -> None:
    novita = world.stand_in("novita")
    world.hooks += "[vendor.novita]\ncallbacks = false\n"
    del world.environ["KLING_RELAY_MEDIA_STORE"]
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.1"
    await world.start()
    request = world.request(vendor="novita", video=f"{world.hook_url}/files/dance.mp4")
    done = await (await world.submitter.submit(request)).result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert next(iter(novita.jobs.values())).request.callback_url is None


async def test_a_final_status_without_a_result_is_polled_again(world: World) -> None:
    aihubmax = world.stand_in("aihubmax")
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.1"
    await world.start()
    world.faults(no_url=1)
    task = await world.submitter.submit(world.request(vendor="aihubmax"))
    async with asyncio.timeout(60):
        while aihubmax.counts["queries"] < 2:
            await asyncio.sleep(0.01)
    ledger = world.open_ledger()
    assert (await ledger.get(task.external_task_id)).status is TaskStatus.SUBMITTED
    assert await ledger.quarantined(9) == []
    next(iter(aihubmax.jobs.values())).has_url = True
    done = await task.result(timeout=60)
    assert done.status is TaskStatus.SUCCEED
    assert done.cost == ()  # its `credits_reserved` is no cost
    await ledger.close()


async def test_a_local_image_is_published_for_a_vendor_that_takes_only_urls(world: World) -> None:
    aihubmax = world.stand_in("aihubmax")
    await world.start()
    await world.submitter.submit(world.request(vendor="aihubmax"))
    asked = next(iter(aihubmax.jobs.values())).request
    assert asked.image.startswith(f"{world.receiver_url}/media/")
    del world.environ["KLING_RELAY_MEDIA_STORE"]
    async with submitter(world) as without:
        with pytest.raises(InvalidRequest, match="Or use kling or novita or highway"):
            await without.prepare(world.request(vendor="aihubmax", video=f"{world.hook_url}/files/dance.mp4"))


# -- Oxen.ai's event stream -----------------------------------------------------------------------


def test_callbacks_cannot_be_enabled_for_a_vendor_that_sends_none(world: World) -> None:
    (world.folder / "relay.toml").write_text('[vendor.oxen]\ncallbacks = true\n[vendor.novita]\ncallbacks = "maybe"\n')
    with pytest.raises(InvalidSettings, match="oxen sends no callbacks") as wrong:
        _ = world.settings
    assert "'maybe' (one of true, false, auto)" in str(wrong.value)
