"""`deliver = "inline"`: hooks are told within the callback's own request, and nothing runs after the answer."""

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
from tests.conftest import KEY, World
from tests.road.fan_out import live
from tests.road.many_processes import fill

TOKEN = "t" * 16


@asynccontextmanager
async def inline(world: World, **environ: str) -> AsyncIterator[str]:
    """Serve a receiver without loops; yield its URL."""
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
    """Send one of the benchmark's callbacks, which are whole requests."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = dict(one.split(": ", 1) for one in lines if not one.startswith(("host", "content-length")))
    return await client.post(url + line.split(" ")[1], content=body, headers=headers)


async def tick(client: httpx.AsyncClient, url: str) -> dict[str, int]:
    answer = await client.post(f"{url}/tick", headers={"authorization": f"Bearer {TOKEN}"})
    done: dict[str, int] = answer.json()
    return done


async def test_a_healthy_hook_is_told_before_the_answer(world: World, client: httpx.AsyncClient) -> None:
    async with inline(world) as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 20)
        for answered, request in enumerate(servers.callbacks("b", 20)[20:], start=1):
            answer = await call(client, url, request)
            assert (answer.status_code, answer.headers["kling-relay-result"]) == (200, "applied")
            assert len(world.inbox.requests) == answered  # it is there already
        assert (await ledger.counts())["delivery.due"] == 0  # nothing waits for the cron
        assert (await tick(client, url))["delivered"] == 0
        await ledger.close()


def hold(world: World) -> tuple[asyncio.Event, asyncio.Event]:
    """Have the hook answer nobody until it is released; return what tells that it was called, and what releases it."""
    called, released = asyncio.Event(), asyncio.Event()
    quick = world.inbox.receive

    async def slow(request: Request) -> Response:
        called.set()
        await released.wait()
        return await quick(request)

    world.inbox.receive = slow  # type: ignore[method-assign]
    return called, released


async def test_a_slow_hook_costs_the_budget_and_is_told_by_the_tick(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.delivery.LEASE_MARGIN_S", -14.9)  # what is cut off is due again after 0.1 s
    _, released = hold(world)
    async with inline(world, KLING_RELAY_DELIVER_BUDGET_S="0.3") as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 1)
        (_, request) = servers.callbacks("b", 1)
        begun_s = asyncio.get_running_loop().time()
        answer = await call(client, url, request)
        assert answer.status_code == 200  # the change is durable: a slow hook is not the vendor's concern
        assert asyncio.get_running_loop().time() - begun_s >= 0.3
        assert (await ledger.counts())["delivery.due"] == 1
        released.set()
        async with asyncio.timeout(10):
            while not (await tick(client, url))["delivered"]:
                await asyncio.sleep(0.05)
        assert (await ledger.counts())["delivery.due"] == 0
        await ledger.close()


async def test_one_that_is_cut_off_takes_no_other_with_it(world: World) -> None:
    """Requests of one process share its hooks; each waits for its own attempts, and ends those alone."""
    called, released = hold(world)
    await world.start(receiver=False)
    service = open_service(world.settings)
    try:
        await live(service.ledger, "order-1")
        first = asyncio.create_task(service.worker.deliver_within(0.3))
        await called.wait()
        await live(service.ledger, "order-2")
        second = asyncio.create_task(service.worker.deliver_within(30))
        await first  # it is cut off
        assert not second.done()
        released.set()
        async with asyncio.timeout(20):
            await second
        told = await service.ledger.deliveries(hook=None, state=None, limit=9)
        states = {(one.event.external_task_id, one.state) for one in told}
        assert states == {("order-1", "due"), ("order-2", "done")}
    finally:
        await service.close()
