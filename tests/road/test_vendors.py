"""Several vendors on one road: who is sent what, who is believed, who is asked."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from submitter.callback_url import KeyRing, callback_url
from submitter.clock import Clock
from submitter.errors import IdConflict, InvalidRequest, InvalidSettings, SubmissionUnknown, VendorRefused
from submitter.learned import calls_back
from submitter.request import MotionControl
from submitter.sandbox.faults import Faults
from submitter.sandbox.oxen import OxenSandbox
from submitter.schedule import Backoff, Patience
from submitter.submit import Submitter
from submitter.task import Sending, Task, TaskStatus, transition
from tests.conftest import KEY, World


@contextlib.asynccontextmanager
async def submitter(world: World) -> AsyncIterator[Submitter]:
    """Another process's submitter, with the settings as they are now."""
    async with Submitter(
        world.settings.common, world.open_ledger(), look_for_s=(0.0, 0.05), sending_lease_s=1.0
    ) as made:
        yield made


def created(world: World) -> dict[str, int]:
    return {name: sandbox.counts["created"] for name, sandbox in world.sandboxes.items()}


# -- failover -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["capacity", "maintenance"])
async def test_a_full_or_closed_vendor_is_passed_over(world: World, kind: Any) -> None:
    world.stand_in("novita")
    await world.start()
    world.kling.set_faults(Faults(refuse=kind))
    task = await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    assert (task.task.vendor, created(world)) == ("novita", {"kling": 0, "novita": 1})
    assert world.kling.counts["query_v2"] == (3 if kind == "maintenance" else 0)  # a 5xx is looked for before
    done = await task.result(timeout=20)
    assert done.status is TaskStatus.SUCCEED
    again = await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    assert again.task.task_id == done.task_id
    with pytest.raises(IdConflict, match="another vendor"):
        await world.submitter.submit(world.request(vendor="kling", external_task_id="order-1"))
    assert created(world) == {"kling": 0, "novita": 1}
    types = [event["type"] for event in world.inbox.events]
    submitted = world.inbox.events[types.index("task.submitted")]["data"]
    assert submitted["vendor"] == "novita"
    assert submitted["status_message"].startswith("sent to novita, since it was refused by kling: ")


async def test_when_all_refuse_the_one_that_is_only_full_is_waited_for(world: World) -> None:
    world.stand_in("novita").set_faults(Faults(refuse="balance"))
    world.kling.slots = 0
    await world.start()
    submitting = asyncio.create_task(world.submitter.submit(world.request(vendor="novita,kling,highway")))
    world.stand_in("novita")
    with pytest.raises(InvalidSettings, match="HIGHWAY_API_KEY"):  # every vendor that is named must be usable
        await submitting
    submitting = asyncio.create_task(world.submitter.submit(world.request(vendor="kling,novita")))
    async with asyncio.timeout(20):
        while world.kling.counts["refused_1303"] < 2:
            await asyncio.sleep(0.01)
    world.kling.slots = 5
    task = await submitting
    assert (task.task.vendor, created(world)) == ("kling", {"kling": 1, "novita": 0})


async def test_a_vendor_that_cannot_be_reached_is_passed_over(world: World) -> None:
    world.stand_in("novita")
    world.environ["KLING_BASE_URL"] = "http://127.0.0.1:9"
    await world.start()
    task = await world.submitter.submit(world.request(vendor="kling,novita"))
    assert task.task.vendor == "novita"
    assert "unreachable" in task.task.tried[0].reason


async def test_what_another_vendor_would_refuse_as_well_goes_nowhere(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    request = world.request(vendor="kling,novita", video=f"{world.hook_url}/files/missing.mp4")
    with pytest.raises(VendorRefused, match="kling refused: video cannot be fetched"):
        await world.submitter.submit(request)
    assert world.sandboxes["novita"].counts["refused_invalid"] == 0


async def test_our_own_limit_at_one_vendor_sends_to_the_next(world: World) -> None:
    world.stand_in("novita")
    world.kling.pace_s = 5
    world.hooks += "[vendor.kling]\nparallel = 1\n"
    await world.start()
    first = await world.submitter.submit(world.request(vendor="kling,novita"))
    second = await world.submitter.submit(world.request(vendor="kling,novita"))
    assert (first.task.vendor, second.task.vendor) == ("kling", "novita")
    assert "our own limit of 1" in second.task.tried[0].reason


async def test_a_vendor_that_cannot_do_it_is_left_out_and_none_that_can_is_an_error(world: World) -> None:
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
        await world.submitter.prepare(replace(request, vendor="kling,nobody"))


async def test_the_mode_is_the_vendors_first_unless_it_is_chosen(world: World) -> None:
    oxen = world.stand_in("oxen")
    await world.start()
    with pytest.raises(InvalidRequest, match="Or use kling or novita or highway or aihubmax"):
        await world.submitter.submit(world.request(vendor="oxen", mode="std"))
    with pytest.raises(InvalidRequest, match="requires one"):
        await world.submitter.submit(world.request(vendor="oxen", prompt=""))
    await world.submitter.submit(world.request(vendor="oxen"))
    assert next(iter(oxen.jobs.values())).asked.resolution == "1080p"
    await world.submitter.submit(world.request())
    assert next(iter(world.kling.jobs.values())).asked.resolution == "720p"


async def test_what_was_refused_everywhere_begins_anew_at_the_first(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    world.faults(refuse="balance")
    request = world.request(vendor="kling,novita", external_task_id="order-1")
    with pytest.raises(VendorRefused, match=r"novita refused.*refused by kling: no balance"):
        await world.submitter.submit(request)
    ledger = world.open_ledger()
    refused = await ledger.get("order-1")
    assert (refused.status, refused.refused, [one.vendor for one in refused.tried]) == (
        TaskStatus.CREATED,
        True,
        ["kling"],
    )
    assert (await ledger.open_tasks("kling"), await ledger.open_tasks("novita")) == (0, 0)
    await ledger.close()
    world.faults()
    task = await world.submitter.submit(request)
    assert (task.task.vendor, task.task.tried) == ("kling", ())
    assert (await task.result(timeout=20)).status is TaskStatus.SUCCEED


async def test_a_callback_of_the_vendor_that_refused_is_kept_and_not_believed(
    world: World, client: httpx.AsyncClient
) -> None:
    world.stand_in("novita").pace_s = 5
    await world.start()
    world.kling.set_faults(Faults(refuse="balance"))
    await world.submitter.submit(world.request(vendor="kling,novita", external_task_id="order-1"))
    url = callback_url(world.receiver_url, KeyRing.read(f"test:{KEY}"), "kling", "order-1", Clock().now_s())
    body = b'{"id": "1", "status": "failed", "message": "late"}'
    answer = await client.post(url, content=body, headers=world.kling.sign(body))
    assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "quarantined")
    assert (await world.submitter.task("order-1")).task.status is TaskStatus.SUBMITTED


# -- what nobody knows ----------------------------------------------------------------------------


def order_1(world: World, vendor: str) -> MotionControl:
    return world.request(vendor=vendor, external_task_id="order-1", video=f"{world.hook_url}/files/dance.mp4")


async def reserve(world: World, vendor: str, *, begins: bool) -> None:
    """Leave a row as a submitter does that died: before, or after, it began to send."""
    async with submitter(world) as dying:
        prepared = await dying.prepare(order_1(world, vendor))
    ledger = world.open_ledger()
    now_ms = Clock().now_ms() - 60_000
    patience = world.settings.common.vendors[vendor].patience
    blank = Task("order-1", vendor, TaskStatus.CREATED, now_ms, now_ms, patience, request=prepared.asked)
    sent = transition(blank, Sending("the dead", now_ms + 1, begins), now_ms)
    assert sent is not None
    await ledger.reserve(sent.task)
    await ledger.close()


async def test_a_submitter_that_died_before_it_sent_costs_nothing_and_is_simply_repeated(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    await reserve(world, "novita", begins=False)
    task = await world.submitter.submit(order_1(world, "novita"))
    assert (await task.result(timeout=20)).status is TaskStatus.SUCCEED
    assert created(world)["novita"] == 1


async def test_a_submitter_that_died_while_it_sent_leaves_what_a_person_must_settle(world: World) -> None:
    world.stand_in("novita")
    await world.start(receiver=False)
    await reserve(world, "novita", begins=True)
    with pytest.raises(SubmissionUnknown, match="cannot be asked for a task by your id"):
        await world.submitter.submit(order_1(world, "novita"))
    with pytest.raises(SubmissionUnknown):
        await world.submitter.retry("order-1")
    assert created(world)["novita"] == 0
    task = await world.submitter.retry("order-1", surely_absent=True)
    assert task.task.status is TaskStatus.SUBMITTED
    assert created(world)["novita"] == 1
    with pytest.raises(InvalidRequest, match="nothing is to be adopted"):
        await world.submitter.adopt("order-1", "another")


async def test_a_callback_settles_what_nobody_knew(world: World) -> None:
    novita = world.stand_in("novita")
    await world.start()
    world.faults(create_5xx=1)
    with pytest.raises(SubmissionUnknown, match="tasks adopt order-1 TASK_ID"):
        await world.submitter.submit(order_1(world, "novita"))
    done = await (await world.submitter.task("order-1")).result(timeout=20)
    assert (done.status, done.task_id) == (TaskStatus.SUCCEED, next(iter(novita.jobs)))
    await world.inbox.until(2)
    assert [event["type"] for event in world.inbox.events] == ["task.submission_unknown", "task.succeed"]


async def test_a_task_that_was_never_sent_is_no_false_alarm_about_money(world: World) -> None:
    world.stand_in("novita")
    await world.start()
    await reserve(world, "novita", begins=False)
    task = await world.submitter.task("order-1")
    await world.inbox.until(1)
    assert world.inbox.events[0]["type"] == "task.submission_unknown"
    assert "before it was sent" in world.inbox.events[0]["data"]["status_message"]
    again = await world.submitter.retry("order-1")
    assert (await again.result(timeout=20)).external_task_id == task.external_task_id


# -- being told -----------------------------------------------------------------------------------


def success(*, told: bool, asked_to: bool = True) -> Task:
    patience = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
    return Task("a", "novita", TaskStatus.SUCCEED, 0, 0, patience, is_told=asked_to, was_told=told)


def test_a_vendor_calls_back_until_results_were_found_by_polls_alone() -> None:
    assert calls_back([])
    assert calls_back([success(told=False, asked_to=False)])  # --no-callback is no witness
    assert not calls_back([success(told=False)])
    assert calls_back([success(told=False), success(told=True)])


async def test_a_vendor_that_does_not_call_back_is_asked_sooner_until_it_does(world: World) -> None:
    world.stand_in("novita")
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.3"
    world.hooks += '[vendor.novita]\ncallbacks = "auto"\n'
    await world.start()
    world.faults(drop=1)
    first = await world.submitter.submit(world.request(vendor="novita"))
    usual = world.settings.common.vendors["novita"].patience
    assert first.task.patience == usual
    assert (await first.result(timeout=20)).status is TaskStatus.SUCCEED
    world.faults()
    second = await world.submitter.submit(world.request(vendor="novita"))
    assert second.task.patience.silence == usual.asking
    assert (await second.result(timeout=20)).was_told
    third = await world.submitter.submit(world.request(vendor="novita"))
    assert third.task.patience == usual


async def test_callbacks_false_sends_no_url_and_polls(world: World) -> None:
    novita = world.stand_in("novita")
    world.hooks += "[vendor.novita]\ncallbacks = false\n"
    del world.environ["KLING_RELAY_MEDIA_STORE"]
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.1"
    await world.start()
    request = world.request(vendor="novita", video=f"{world.hook_url}/files/dance.mp4")
    done = await (await world.submitter.submit(request)).result(timeout=20)
    assert done.status is TaskStatus.SUCCEED
    assert next(iter(novita.jobs.values())).asked.callback_url is None


async def test_an_end_without_its_result_is_asked_about_again_and_is_no_failure(world: World) -> None:
    aihubmax = world.stand_in("aihubmax")
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.1"
    await world.start()
    world.faults(no_url=1)
    task = await world.submitter.submit(world.request(vendor="aihubmax"))
    async with asyncio.timeout(20):
        while aihubmax.counts["queries"] < 2:
            await asyncio.sleep(0.01)
    ledger = world.open_ledger()
    assert (await ledger.get(task.external_task_id)).status is TaskStatus.SUBMITTED
    assert await ledger.quarantined(9) == []
    next(iter(aihubmax.jobs.values())).has_url = True
    done = await task.result(timeout=20)
    assert done.status is TaskStatus.SUCCEED
    assert [(charge.kind, charge.amount) for charge in done.cost] == [("credit", "40.0")]
    await ledger.close()


async def test_a_local_image_for_a_vendor_that_fetches_is_published(world: World) -> None:
    aihubmax = world.stand_in("aihubmax")
    await world.start()
    await world.submitter.submit(world.request(vendor="aihubmax"))
    asked = next(iter(aihubmax.jobs.values())).asked
    assert asked.image.startswith(f"{world.receiver_url}/media/")
    del world.environ["KLING_RELAY_MEDIA_STORE"]
    async with submitter(world) as without:
        with pytest.raises(InvalidRequest, match="Or use kling or novita or highway"):
            await without.prepare(world.request(vendor="aihubmax", video=f"{world.hook_url}/files/dance.mp4"))


# -- Oxen.ai's stream -----------------------------------------------------------------------------


async def oxen_world(world: World) -> OxenSandbox:
    oxen = world.stand_in("oxen")
    assert isinstance(oxen, OxenSandbox)
    await world.start()
    async with asyncio.timeout(10):
        while oxen.counts["streams"] == 0:
            await asyncio.sleep(0.01)
    return oxen


async def test_oxens_tasks_end_by_the_stream_without_a_query(world: World) -> None:
    oxen = await oxen_world(world)
    tasks = [await world.submitter.submit(world.request(vendor="oxen")) for _ in range(3)]
    assert {(await task.result(timeout=20)).status for task in tasks} == {TaskStatus.SUCCEED}
    assert (oxen.counts["queries"], oxen.counts["streams"]) == (0, 1)


async def test_an_event_that_overtakes_the_answer_to_create_is_held(world: World) -> None:
    oxen = await oxen_world(world)
    world.faults(create_late=1, late_s=0.5)
    task = await world.submitter.submit(world.request(vendor="oxen"))
    assert (await task.result(timeout=20)).status is TaskStatus.SUCCEED
    assert oxen.counts["queries"] == 0


async def test_a_stream_that_broke_is_opened_again_and_what_it_missed_is_asked_about(world: World) -> None:
    oxen = await oxen_world(world)
    oxen.pace_s = 0.3
    task = await world.submitter.submit(world.request(vendor="oxen"))
    for queue in oxen.listening:
        queue.put_nowait(None)
    world.faults(drop=1)
    done = await task.result(timeout=20)
    assert (done.status, done.was_told) == (TaskStatus.SUCCEED, False)
    assert oxen.counts["streams"] == 2


async def test_an_older_deployment_that_forgets_what_ended_is_heard_by_its_stream(world: World) -> None:
    oxen = await oxen_world(world)
    world.faults(forget=1)
    done = await (await world.submitter.submit(world.request(vendor="oxen"))).result(timeout=20)
    assert (done.status, oxen.counts["queries"]) == (TaskStatus.SUCCEED, 0)


async def test_what_was_forgotten_and_not_heard_is_abandoned_and_says_so(world: World) -> None:
    world.environ |= {"KLING_RELAY_POLL_AFTER_S": "0.2", "KLING_RELAY_ABANDON_AFTER_S": "1.5"}
    await oxen_world(world)
    world.faults(forget=1, drop=1)
    done = await (await world.submitter.submit(world.request(vendor="oxen"))).result(timeout=20)
    assert done.status is TaskStatus.ABANDONED
    assert "oxen does not know it" in done.status_message


async def test_what_is_cancelled_is_told_by_nobody_and_found_by_a_poll(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    oxen = await oxen_world(world)
    oxen.pace_s = 5
    task = await world.submitter.submit(world.request(vendor="oxen"))
    next(iter(oxen.jobs.values())).status = "cancelled"
    done = await task.result(timeout=20)
    assert (done.status, done.status_message) == (TaskStatus.FAILED, "cancelled")


async def test_an_event_that_cannot_be_understood_is_kept(world: World) -> None:
    world.environ["KLING_RELAY_POLL_AFTER_S"] = "0.2"
    oxen = await oxen_world(world)
    world.faults(no_url=1)
    task = await world.submitter.submit(world.request(vendor="oxen"))
    ledger = world.open_ledger()
    async with asyncio.timeout(20):
        while not (kept := [one for one in await ledger.quarantined(9) if "media_generation_completed" in one.reason]):
            await ledger.changed(ledger.mark(), 0.1)
    assert kept[0].vendor == "oxen"
    next(iter(oxen.jobs.values())).has_url = True
    assert (await task.result(timeout=20)).status is TaskStatus.SUCCEED
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


def test_a_vendor_that_calls_nobody_back_cannot_be_told_to(world: World) -> None:
    (world.folder / "relay.toml").write_text('[vendor.oxen]\ncallbacks = true\n[vendor.novita]\ncallbacks = "maybe"\n')
    with pytest.raises(InvalidSettings, match="oxen calls nobody back") as wrong:
        _ = world.settings
    assert "'maybe' (one of true, false, auto)" in str(wrong.value)
