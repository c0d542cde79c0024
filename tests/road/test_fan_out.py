"""Fan-out to many hooks: a hook that is down delays no other, and gets every event once it is back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import msgspec
import pytest

from tests.conformance.live_brokers import AmqpBroker, Broker, NatsBroker, RedisBroker
from tests.conformance.own_servers import OWN_BUSES
from tests.conformance.test_aws_destinations import Bus
from tests.road.fan_out import QUICK, complete_task, hook, measure_own_bus, serving, until
from tests.world import World


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


@asynccontextmanager
async def event_bus() -> AsyncIterator[Bus]:
    bus = Bus()
    with closing(bus):
        yield bus


async def test_a_bus_that_is_down_delays_no_other_and_gets_every_event_once_it_is_back(world: World, aws: str) -> None:
    redis, nats, amqp = RedisBroker(), NatsBroker(), AmqpBroker()
    await world.start(receiver=False)
    async with running(redis, nats, amqp), event_bus() as bridge:
        await redis.away()
        hooks = hook("web", f"{world.hook_url}/events", QUICK) + hook("bridge", bridge.url, QUICK)
        for name, broker in (("redis", redis), ("nats", nats), ("amqp", amqp)):
            hooks += hook(name, broker.url, QUICK)
        async with serving(world.folder, world.environ, hooks) as service:
            await complete_task(service.ledger, "order-1")
            expected = [event.id for event in await service.ledger.events("order-1")]
            await world.inbox.until(3)

            bridged: set[str] = set()

            async def others_have_all() -> bool:
                bridged.update(await bridge.arrived())
                return len(await nats.arrived()) == len(bridged) == 3

            await until(others_have_all)
            assert await nats.arrived() == expected
            assert bridged == set(expected)
            assert await redis.client.exists(redis.name) == 0
            await redis.back()

            async def redis_has_all() -> bool:
                return len(await redis.entries()) == 3

            await until(redis_has_all)
            assert await redis.arrived() == expected  # in order
            assert await amqp.arrived() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_BUSES)
async def test_a_bus_that_is_killed_twice_loses_no_event_and_keeps_each_tasks_order(name: str, tmp_path: Path) -> None:
    result = await measure_own_bus(OWN_BUSES[name], tmp_path, 200, kills=2)
    assert (result.lost, result.out_of_order) == (0, 0), result


async def test_when_and_latest_only_filter_events(world: World) -> None:
    await world.start(receiver=False)
    live_only = "when = \"data.metadata.env == 'live'\"\n"
    hooks = hook("live", f"{world.hook_url}/live", live_only) + hook(
        "latest", f"{world.hook_url}/latest", "latest_only = true\n"
    )
    ledger = world.open_ledger()
    await complete_task(ledger, "order-1", metadata={"env": "test"})
    await complete_task(ledger, "order-2", metadata={"env": "live"})
    await ledger.close()
    async with serving(world.folder, world.environ, hooks) as service:
        await world.inbox.until(5)

        async def all_are_settled() -> bool:
            return (await service.ledger.counts())["delivery.due"] == 0

        await until(all_are_settled)
        seen = sorted((event["subject"], event["type"]) for event in world.inbox.events)
        assert seen == [
            ("order-1", "task.succeed"),
            ("order-2", "task.processing"),
            ("order-2", "task.submitted"),
            ("order-2", "task.succeed"),
            ("order-2", "task.succeed"),
        ]


async def test_an_event_is_sent_when_the_evaluation_of_when_fails(world: World) -> None:
    await world.start(receiver=False)
    by_null = "when = \"contains(data.metadata.env, 'live')\"\n"  # a task without metadata has no env
    async with serving(world.folder, world.environ, hook("web", f"{world.hook_url}/events", by_null)) as service:
        await complete_task(service.ledger, "order-1")
        await world.inbox.until(3)
        assert {event["subject"] for event in world.inbox.events} == {"order-1"}


async def test_a_hook_that_keeps_failing_is_paused_visibly_and_resumed(world: World) -> None:
    from starlette.responses import Response

    await world.start(receiver=False)
    world.inbox.answers = [Response("broken", 500)] * 10_000
    short = "schedule = [" + ", ".join(["0"] * 100) + "]\n"
    async with serving(world.folder, world.environ, hook("web", f"{world.hook_url}/events", short)) as service:
        for n in range(4):
            await complete_task(service.ledger, f"order-{n}")
        subscriptions = [one.subscription(0) for one in service.settings.hooks]

        async def is_paused() -> bool:
            return (await service.ledger.hook_states(subscriptions))[0].paused is not None

        await until(is_paused)
        (state,) = await service.ledger.hook_states(subscriptions)
        assert "HTTP 500 broken" in str(state.paused)
        assert service.metrics is not None
        assert b'kling_relay_hook_paused{hook="web"} 1.0' in service.metrics.render({})

        world.inbox.answers = []

        async def is_resumed() -> bool:
            counts = await service.ledger.counts()
            return (counts["delivery.due"], counts["delivery.dead"]) == (0, 0) and not await is_paused()

        await until(is_resumed)
        assert len({msgspec.json.decode(body)["id"] for _, body in world.inbox.requests}) == 12
