"""Fans many tasks' events out to one bus, kills and restarts it, and counts lost, repeated and reordered events."""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from receiver.service import Service, open_service
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.ledger.base import Ledger
from submitter.ledger.observe import observe
from submitter.ledger.sqlite.ledger import SqliteLedger
from submitter.observation import Report
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus
from tests.conformance.own_servers import OwnBus

POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
STATUSES = (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED)
DELIVERIES = "kling_relay_delivery_seconds_count"
QUICK = "schedule = [" + ", ".join(["0", *["0.1"] * 500]) + "]\n"


class FanOutResult(msgspec.Struct, frozen=True):
    """Events sent, events per second, lost events, repeated events, and tasks whose events are out of order."""

    events: int
    per_s: float
    lost: int
    repeated: int
    out_of_order: int


def hook(name: str, url: str, more: str = "") -> str:
    return f'[[hook]]\nname = "{name}"\nurl = "{url}"\n{more}'


@asynccontextmanager
async def serving(folder: Path, environ: Mapping[str, str], hooks: str) -> AsyncIterator[Service]:
    """Run the loops behind a receiver with these hooks."""
    (folder / "relay.toml").write_text(hooks)
    service = open_service(load_receiver_settings(environ))
    service.worker.start()
    try:
        yield service
    finally:
        await service.close()


async def complete_task(ledger: Ledger, id: str, **fields: Any) -> None:
    """Take a task from reservation to success, in three events. It is new: an overdue one would be polled meanwhile."""
    now_ms = Clock().now_ms()
    await ledger.reserve(Task(id, "kling", TaskStatus.CREATED, now_ms, now_ms, POLL_POLICY, **fields))
    for status in STATUSES:
        await observe(ledger, id, Report("callback", status, "893"), now_ms, source="callback")


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


def failures(service: Service) -> float:
    """Return how many attempts have failed, by the metrics."""
    assert service.metrics is not None
    families = text_string_to_metric_families(service.metrics.render({}).decode())
    samples = [sample for family in families for sample in family.samples]
    return sum(one.value for one in samples if one.name == DELIVERIES and one.labels["result"] != "done")


async def measure_fan_out(
    bus: OwnBus, folder: Path, environ: Mapping[str, str], tasks: int, *, kills: int = 0
) -> FanOutResult:
    """Deliver the events of `tasks` tasks, three each, to a bus.

    The bus is killed `kills` times with deliveries in flight, and restarted once a delivery has failed.
    """
    names = [f"order-{n}" for n in range(tasks)]
    waves = [names[wave :: kills + 1] for wave in range(kills + 1)]

    async def complete_wave(wave: int) -> None:
        ledger = SqliteLedger(folder / "relay.db")
        await asyncio.gather(*(complete_task(ledger, name) for name in waves[wave]))
        await ledger.close()

    await complete_wave(0)
    total = tasks * len(STATUSES)
    with closing(sqlite3.connect(folder / "relay.db")) as db:

        def count(condition: str) -> int:
            return int(db.execute(f"SELECT count(*) FROM deliveries WHERE {condition}").fetchone()[0])

        async def done(least: int) -> None:
            async def reached() -> bool:
                return count("state = 'done'") >= least

            await until(reached, timeout_s=300)

        started_s = time.perf_counter()
        hooks = hook("bus", bus.url, QUICK + "timeout_s = 5\n" + bus.hook_more)
        async with serving(folder, environ, hooks) as service:
            expected_done = 0
            for wave in range(kills):
                await done(expected_done + len(waves[wave]) * len(STATUSES) // 3)
                failed = failures(service)
                await bus.kill()
                expected_done += len(waves[wave]) * len(STATUSES)
                await complete_wave(wave + 1)  # these fail for certain, however fast the others were

                async def has_failed(failed: float = failed) -> bool:
                    return failures(service) > failed

                await until(has_failed)
                await bus.restart()
            await done(total)
            seconds = time.perf_counter() - started_s
    ledger = SqliteLedger(folder / "relay.db")
    expected = [[event.id for event in await ledger.events(name)] for name in names]
    await ledger.close()
    arrived = await bus.arrived()
    seen = Counter(arrived)
    positions = {id: position for position, id in enumerate(dict.fromkeys(arrived))}
    orders = [[positions[id] for id in ids if id in positions] for ids in expected]
    lost = sum(id not in seen for ids in expected for id in ids)
    out_of_order = sum(order != sorted(order) for order in orders)
    return FanOutResult(total, total / seconds, lost, len(arrived) - len(positions), out_of_order)


async def measure_own_bus(kind: type[OwnBus], folder: Path, tasks: int, *, kills: int = 0) -> FanOutResult:
    """Start a bus, measure the fan-out of `tasks` tasks to it, and stop it."""
    bus = kind(folder)
    environ = {
        "KLING_RELAY_LEDGER": f"sqlite:///{folder / 'relay.db'}",
        "KLING_RELAY_CONFIG": str(folder / "relay.toml"),
        "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
    }
    try:
        await bus.start()
        return await measure_fan_out(bus, folder, environ, tasks, kills=kills)
    finally:
        await bus.stop()
