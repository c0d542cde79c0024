"""Inline delivery (`deliver = "inline"`): hooks are notified within the callback's request; nothing runs after it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from receiver.service import build_app, open_service
from submitter.sandbox.server import free_socket, listening
from tests.bench import servers
from tests.road.fan_out import complete_task
from tests.road.many_processes import fill
from tests.world import KEY, World

TOKEN = "t" * 16


@asynccontextmanager
async def inline(world: World, **environ: str) -> AsyncIterator[str]:
    """Serve a receiver with inline delivery and no background loops; yield its URL."""
    world.environ |= {
        "KLING_RELAY_DELIVER": "inline",
        "KLING_RELAY_TICK_TOKEN": TOKEN,
        "KLING_RELAY_KEYS": f"bench:{KEY}",
        **environ,
    }
    await world.start(receiver=False)
    bound, url = free_socket()
    async with listening(build_app(world.settings), bound):
        yield url


async def call(client: httpx.AsyncClient, url: str, request: bytes) -> httpx.Response:
    """Send one of the benchmark's callbacks, which are complete HTTP requests."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines if not one.startswith(("host", "content-length")))
    return await client.post(url + line.split(" ")[1], content=body, headers=headers)


async def tick(client: httpx.AsyncClient, url: str) -> dict[str, int]:
    answer = await client.post(f"{url}/tick", headers={"authorization": f"Bearer {TOKEN}"})
    counts: dict[str, int] = answer.json()
    return counts


async def test_a_healthy_hook_is_notified_before_the_callback_is_answered(
    world: World, client: httpx.AsyncClient
) -> None:
    async with inline(world) as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 20)
        for answered, request in enumerate(servers.callbacks("b", 20)[20:], start=1):
            answer = await call(client, url, request)
            assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "applied")
            assert len(world.inbox.requests) == answered
        assert (await ledger.counts())["delivery.due"] == 0  # nothing is left for the tick
        assert (await tick(client, url))["delivered"] == 0
        await ledger.close()


def hold(world: World) -> tuple[asyncio.Event, asyncio.Event]:
    """Block the hook's answers; return an event that is set once it was called, and one that releases it."""
    called, released = asyncio.Event(), asyncio.Event()
    quick = world.inbox.receive

    async def slow(request: Request) -> Response:
        called.set()
        await released.wait()
        return await quick(request)

    world.inbox.receive = slow  # type: ignore[method-assign]
    return called, released


async def test_a_slow_hook_uses_the_whole_budget_and_is_notified_by_the_next_tick(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.dispatcher.LEASE_MARGIN_S", -14.9)  # a lease of 0.1 s
    _, released = hold(world)
    async with inline(world, KLING_RELAY_DELIVER_BUDGET_S="0.3") as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 1)
        (_, request) = servers.callbacks("b", 1)
        started_s = asyncio.get_running_loop().time()
        answer = await call(client, url, request)
        assert answer.status_code == 200  # the change is durable: a slow hook does not fail the callback
        assert asyncio.get_running_loop().time() - started_s >= 0.3
        assert (await ledger.counts())["delivery.due"] == 1
        released.set()
        async with asyncio.timeout(60):
            while not (await tick(client, url))["delivered"]:
                await asyncio.sleep(0.05)
        assert (await ledger.counts())["delivery.due"] == 0
        await ledger.close()


async def test_a_budget_that_runs_out_cancels_only_its_own_attempts(world: World) -> None:
    """Concurrent requests share the dispatcher; each waits for its own attempts, and cancels only those."""
    called, released = hold(world)
    await world.start(receiver=False)
    service = open_service(world.settings)
    try:
        await complete_task(service.ledger, "order-1")
        first = asyncio.create_task(service.worker.deliver_within(0.3))
        await called.wait()
        await complete_task(service.ledger, "order-2")
        second = asyncio.create_task(service.worker.deliver_within(30))
        await first  # its budget runs out
        assert not second.done()
        released.set()
        async with asyncio.timeout(60):
            await second
        deliveries = await service.ledger.deliveries(hook=None, state=None, limit=9)
        states = {(one.event.external_task_id, one.state) for one in deliveries}
        assert states == {("order-1", "due"), ("order-2", "done")}
    finally:
        await service.close()
