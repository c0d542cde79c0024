"""A request that certainly created no task: the state `refused`, its event, its metric, and what it costs to repeat."""

import asyncio
from typing import Any

import httpx
import pytest
from cloudevents.core.bindings.http import to_structured_event

from submitter.errors import VendorRefused
from submitter.task import TaskStatus
from tests.road.test_adoption import types
from tests.road.test_events import BEARER, TOKEN, event
from tests.road.test_processes import cli, submit_arguments
from tests.world import World


@pytest.fixture
async def url(world: World) -> str:
    world.environ["KLING_RELAY_EVENTS_TOKEN"] = TOKEN
    await world.start()
    return f"{world.receiver_url}/events"


async def post(world: World, url: str, client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    message = to_structured_event(event(world, "order-1", **changes))
    return await client.post(url, content=message.body, headers=message.headers | BEARER)


async def test_a_refused_task_has_a_state_an_event_and_an_exit_status(world: World) -> None:
    await world.start()
    world.faults(refuse="balance")
    arguments = submit_arguments(world, "--external-task-id", "order-1")
    refused = await cli(world.environ, *arguments)
    assert (refused.status, "Buy another one" in refused.err) == (1, True), refused.err
    await world.inbox.until(1)
    data = world.inbox.events[0]["data"]
    assert (data["status"], "Buy another one" in data["status_message"]) == ("refused", True)
    listed = await cli(world.environ, "tasks", "list", "--status", "refused")
    assert "order-1" in listed.out
    waited = await cli(world.environ, "tasks", "wait", "order-1")
    assert (waited.status, "refused:" in waited.err) == (1, True)
    world.faults()
    again = await cli(world.environ, *arguments, "--wait", "--json")  # the same id and request starts again
    assert again.status == 0, again.err
    await world.inbox.until(4)
    assert types(world) == ["task.refused", "task.submitted", "task.processing", "task.succeed"]
    sequences = [event["sequence"] for event in world.inbox.events]
    assert sequences == sorted(sequences)
    assert world.kling.counts["created"] == 1


async def test_a_refused_task_holds_no_slot_and_is_pruned(world: World) -> None:
    await world.start()
    world.faults(refuse="permission")
    with pytest.raises(VendorRefused):
        await world.submitter.submit(world.request(external_task_id="order-1"))
    ledger = world.open_ledger()
    assert await ledger.open_tasks("kling") == 0
    assert not any(name.startswith("task.") for name in await ledger.counts())
    await world.inbox.until(1)
    while not await ledger.prune(world.clock.now_ms() + 1, 10):
        await ledger.wait_for_change(ledger.version(), 1)
    await ledger.close()


@pytest.mark.parametrize("kind", ["balance", "permission"])
async def test_a_permanent_refusal_of_an_event_is_422(
    world: World, url: str, client: httpx.AsyncClient, kind: Any
) -> None:
    world.faults(refuse=kind)
    answer = await post(world, url, client)
    assert (answer.status_code, answer.json()["title"]) == (422, "refused by the vendor")
    assert "kling refused" in answer.json()["detail"]
    metrics = (await client.get(f"{world.receiver_url}/metrics")).text
    assert 'kling_relay_refused_total{retryable="false",vendor="kling"} 1.0' in metrics


async def test_a_temporary_refusal_of_an_event_is_503_with_retry_after(world: World, client: httpx.AsyncClient) -> None:
    world.environ |= {"KLING_RELAY_EVENTS_TOKEN": TOKEN, "KLING_BASE_URL": "http://127.0.0.1:9"}
    await world.start()
    message = to_structured_event(event(world, "order-1"))
    waiting = client.post(f"{world.receiver_url}/events", content=message.body, headers=message.headers | BEARER)
    posting = asyncio.create_task(waiting)
    await world.clock.skip_until(posting.done)  # the backoff of five attempts to connect
    answer = await posting
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    ledger = world.open_ledger()
    assert (await ledger.get("order-1")).status is TaskStatus.REFUSED
    await ledger.close()
    metrics = (await client.get(f"{world.receiver_url}/metrics")).text
    assert 'kling_relay_refused_total{retryable="true",vendor="kling"} 1.0' in metrics


async def test_an_id_conflict_of_an_event_is_409(world: World, url: str, client: httpx.AsyncClient) -> None:
    assert (await post(world, url, client)).status_code == 202
    answer = await post(world, url, client, mode="pro")
    assert (answer.status_code, answer.json()["title"]) == (409, "id conflict")


async def test_every_problem_of_an_event_is_reported_at_once(world: World, url: str, client: httpx.AsyncClient) -> None:
    wrong = event(world, "order-1", character_orientation="sideways", mode="ultra", promt="x")
    data = dict(wrong.get_data())  # type: ignore[arg-type]
    del data["image"], data["video"]
    answer = await client.post(
        url,
        json={"specversion": "1.0", "type": "task.requested", "source": "/shop", "id": "order-1", "data": data},
        headers=BEARER | {"content-type": "application/cloudevents+json"},
    )
    assert answer.status_code == 400
    wrongs = ["data.image: missing", "data.video: missing", "data.character_orientation: 'sideways'", "data.mode"]
    for field in (*wrongs, "'prompt'"):
        assert field in answer.json()["detail"], field


async def test_a_create_that_fails_at_once_is_failed_without_a_poll(world: World) -> None:
    for vendor in ("novita", "aihubmax", "oxen"):
        world.stand_in(vendor)
    await world.start()
    world.faults(create_failed=1, fail_reason="Image pixel is invalid")
    for vendor in ("kling", "aihubmax", "oxen"):
        task = (await world.submitter.submit(world.request(vendor=vendor))).task
        assert (task.status, task.status_message) == (TaskStatus.FAILED, "Image pixel is invalid"), vendor
        assert task.cost == ()
    refused = await cli(world.environ, *submit_arguments(world))
    assert (refused.status, "Image pixel is invalid" in refused.err) == (1, True)
    assert (world.kling.counts["query_v2"], world.stand_in("oxen").counts["queries"]) == (0, 0)
