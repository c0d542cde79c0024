"""`deliver = "inline"`: hooks are told within the callback's own request, and nothing runs after the answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.responses import Response

from receiver.service import build_app
from submitter.sandbox.server import free_socket, listening
from submitter.task import Task
from tests.bench import servers
from tests.conftest import KEY, World
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


async def test_a_slow_hook_costs_the_budget_and_is_told_by_the_tick(
    world: World, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.delivery.LEASE_MARGIN_S", -14.9)  # what is cut off is due again after 0.1 s
    release = asyncio.Event()
    quick = world.inbox.receive

    async def slow(request: object) -> Response:
        await release.wait()
        return await quick(request)  # type: ignore[arg-type]

    world.inbox.receive = slow  # type: ignore[method-assign]
    async with inline(world, KLING_RELAY_DELIVER_BUDGET_S="0.3") as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 1)
        (_, request) = servers.callbacks("b", 1)
        begun_s = asyncio.get_running_loop().time()
        answer = await call(client, url, request)
        assert answer.status_code == 200  # the change is durable: a slow hook is not the vendor's concern
        assert asyncio.get_running_loop().time() - begun_s >= 0.3
        assert (await ledger.counts())["delivery.due"] == 1
        release.set()
        async with asyncio.timeout(10):
            while not (await tick(client, url))["delivered"]:
                await asyncio.sleep(0.05)
        assert (await ledger.counts())["delivery.due"] == 0
        await ledger.close()


async def test_one_that_is_cut_off_takes_no_other_with_it(world: World, client: httpx.AsyncClient) -> None:
    """Requests of one process share its hooks; each waits for its own attempts alone."""
    first = asyncio.Event()
    release = asyncio.Event()
    quick = world.inbox.receive

    async def slow(request: object) -> Response:
        first.set()
        await release.wait()
        return await quick(request)  # type: ignore[arg-type]

    world.inbox.receive = slow  # type: ignore[method-assign]
    async with inline(world, KLING_RELAY_DELIVER_BUDGET_S="1") as url:
        ledger = world.open_ledger()
        await fill(ledger, "b", 2)
        one, other = servers.callbacks("b", 2)[2:]
        cut_off = asyncio.create_task(call(client, url, one))
        await first.wait()
        await asyncio.sleep(0.8)  # so that the second's attempt is under way when the first's budget ends
        late = asyncio.create_task(call(client, url, other))
        assert (await cut_off).status_code == 200
        assert not late.done()
        release.set()
        assert (await late).status_code == 200
        assert "b-1" in {event["subject"] for event in world.inbox.events}
        states: list[Task] = await ledger.get_many(["b-0", "b-1"])
        assert {task.status.value for task in states} == {"succeed"}
        await ledger.close()
