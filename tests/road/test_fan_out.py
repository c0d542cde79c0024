"""One event to many hooks: who is away delays nobody, and gets everything when it is back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from receiver.service import Service, open_service
from receiver.settings import load_receiver_settings
from submitter.ledger.base import Ledger
from submitter.observe import observe
from submitter.schedule import Backoff, Patience
from submitter.task import Report, Task, TaskStatus
from tests.conformance.test_buses import AmqpBroker, Broker, MqttBroker, NatsBroker, RedisBroker
from tests.conftest import World

PATIENCE = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
NOW_MS = 1_781_080_800_000
QUICK = "schedule = [" + ", ".join(["0", *["0.1"] * 200]) + "]\n"


def hook(name: str, url: str, more: str = "") -> str:
    return f'[[hook]]\nname = "{name}"\nurl = "{url}"\n{more}'


@asynccontextmanager
async def serving(world: World, hooks: str) -> AsyncIterator[Service]:
    """Run the loops behind a receiver with these hooks."""
    (world.folder / "relay.toml").write_text(hooks)
    service = open_service(load_receiver_settings(world.environ))
    service.worker.start()
    try:
        yield service
    finally:
        await service.close()


async def live(ledger: Ledger, id: str, **fields: Any) -> None:
    """Have a task live from reservation to success."""
    task = Task(id, "kling", TaskStatus.CREATED, NOW_MS, NOW_MS, PATIENCE, **fields)
    await ledger.reserve(task)
    for status in (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED):
        await observe(ledger, id, Report("callback", status, "893"), NOW_MS, source="callback")


async def until(condition: Any, timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(*brokers: Broker) -> AsyncIterator[None]:
    started: list[Broker] = []
    try:
        for broker in brokers:
            await broker.start()
            started.append(broker)
        yield
    finally:
        for broker in started:
            await broker.stop()


async def test_with_one_bus_down_the_others_are_on_time_and_it_gets_all_when_it_is_back(world: World) -> None:
    redis, nats, amqp = RedisBroker(), NatsBroker(), AmqpBroker()
    await world.start(receiver=False)
    async with running(redis, nats, amqp):
        await redis.away()
        hooks = hook("web", f"{world.hook_url}/events", QUICK)
        for name, broker in (("redis", redis), ("nats", nats), ("amqp", amqp)):
            hooks += hook(name, broker.url, QUICK)
        async with serving(world, hooks) as service:
            await live(service.ledger, "order-1")
            expected = [event.id for event in await service.ledger.events("order-1")]
            await world.inbox.until(3)

            async def others_have_it() -> bool:
                return len(await nats.arrived()) == 3

            await until(others_have_it)
            assert await nats.arrived() == expected
            assert await redis.client.exists(redis.name) == 0
            await redis.back()

            async def redis_has_it() -> bool:
                return len(await redis.entries()) == 3

            await until(redis_has_it)
            assert await redis.arrived() == expected  # in order
            assert await amqp.arrived() == expected


@pytest.mark.parametrize("kind", [RedisBroker, NatsBroker, AmqpBroker, MqttBroker])
async def test_a_bus_that_is_cut_twice_loses_nothing_and_keeps_each_tasks_order(
    world: World, kind: type[RedisBroker | NatsBroker | AmqpBroker | MqttBroker]
) -> None:
    broker = kind()
    await world.start(receiver=False)
    async with running(broker), serving(world, hook("bus", broker.url, QUICK + "timeout_s = 2\n")) as service:
        ledger = service.ledger
        got: list[str] = []

        async def more(count: int) -> bool:
            arrived = await broker.arrived()
            got[:] = [*got, *arrived] if kind is AmqpBroker else arrived  # a queue is emptied by reading
            return len(set(got)) >= count

        for half in range(2):
            await asyncio.gather(*(live(ledger, f"order-{half}-{n}") for n in range(50)))
            await until(lambda half=half: more(150 * half + 20))
            await broker.away()
            await asyncio.gather(*(live(ledger, f"order-{half}-{n}") for n in range(50, 60)))
            await asyncio.sleep(0.2)
            await broker.back()
            await until(lambda half=half: more(180 * (half + 1)))
        for half in range(2):
            for n in range(60):
                expected = [event.id for event in await ledger.events(f"order-{half}-{n}")]
                first_seen = [id for id in dict.fromkeys(got) if id in set(expected)]
                assert first_seen == expected


async def test_when_and_latest_only_send_what_is_wanted(world: World) -> None:
    await world.start(receiver=False)
    live_only = "when = \"data.metadata.env == 'live'\"\n"
    hooks = hook("live", f"{world.hook_url}/live", live_only) + hook(
        "latest", f"{world.hook_url}/latest", "latest_only = true\n"
    )
    ledger = world.open_ledger()
    await live(ledger, "order-1", metadata={"env": "test"})
    await live(ledger, "order-2", metadata={"env": "live"})
    await ledger.close()
    async with serving(world, hooks) as service:
        await world.inbox.until(5)
        await service.worker.deliver()
        seen = sorted((event["subject"], event["type"]) for event in world.inbox.events)
        assert seen == [
            ("order-1", "task.succeed"),
            ("order-2", "task.processing"),
            ("order-2", "task.submitted"),
            ("order-2", "task.succeed"),
            ("order-2", "task.succeed"),
        ]
        assert (await service.ledger.counts())["delivery.due"] == 0


async def test_an_event_that_when_cannot_judge_is_sent(world: World) -> None:
    await world.start(receiver=False)
    by_null = "when = \"contains(data.metadata.env, 'live')\"\n"  # a task without metadata has no env
    async with serving(world, hook("web", f"{world.hook_url}/events", by_null)) as service:
        await live(service.ledger, "order-1")
        await world.inbox.until(3)
        assert {event["subject"] for event in world.inbox.events} == {"order-1"}


async def test_a_hook_that_fails_and_fails_is_paused_seen_and_resumed(world: World) -> None:
    from starlette.responses import Response

    await world.start(receiver=False)
    world.inbox.answers = [Response("broken", 500)] * 10_000
    short = "schedule = [" + ", ".join(["0"] * 100) + "]\n"
    async with serving(world, hook("web", f"{world.hook_url}/events", short)) as service:
        for n in range(4):
            await live(service.ledger, f"order-{n}")
        routes = [one.route(0) for one in service.settings.hooks]

        async def is_paused() -> bool:
            return (await service.ledger.hook_states(routes))[0].paused is not None

        await until(is_paused)
        (state,) = await service.ledger.hook_states(routes)
        assert "HTTP 500 broken" in str(state.paused)
        assert b'kling_relay_hook_paused{hook="web"} 1.0' in service.metrics.render({})

        world.inbox.answers = []

        async def is_resumed() -> bool:
            counts = await service.ledger.counts()
            return (counts["delivery.due"], counts["delivery.dead"]) == (0, 0) and not await is_paused()

        await until(is_resumed)
        assert len({msgspec.json.decode(body)["id"] for _, body in world.inbox.requests}) == 12
