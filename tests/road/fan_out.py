"""Many tasks' events to one bus, which is killed and restarted meanwhile: what is lost, repeated, and out of order."""

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec

from receiver.service import Service, open_service
from receiver.settings import load_receiver_settings
from submitter.ledger.base import Ledger
from submitter.ledger.sqlite import SqliteLedger
from submitter.observe import observe
from submitter.schedule import Backoff, Patience
from submitter.task import Report, Task, TaskStatus
from tests.conformance.own_servers import OwnBus

PATIENCE = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
NOW_MS = 1_781_080_800_000
ENDS = (TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED)
QUICK = "schedule = [" + ", ".join(["0", *["0.1"] * 500]) + "]\n"


class Told(msgspec.Struct, frozen=True):
    """How it went: events a second, those that never arrived, repetitions, and tasks whose order was lost."""

    events: int
    per_s: float
    lost: int
    again: int
    disordered: int


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


async def live(ledger: Ledger, id: str, **fields: Any) -> None:
    """Have a task live from reservation to success."""
    await ledger.reserve(Task(id, "kling", TaskStatus.CREATED, NOW_MS, NOW_MS, PATIENCE, **fields))
    for status in ENDS:
        await observe(ledger, id, Report("callback", status, "893"), NOW_MS, source="callback")


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)


async def tell(bus: OwnBus, folder: Path, environ: Mapping[str, str], tasks: int, *, kills: int = 0) -> Told:
    """Tell a bus of `tasks` tasks, three events each.

    It is killed `kills` times, each time with events on their way, and restarted once it was missed.
    """
    names = [f"order-{n}" for n in range(tasks)]
    waves = [names[wave :: kills + 1] for wave in range(kills + 1)]

    async def live_all(wave: int) -> None:
        ledger = SqliteLedger(folder / "relay.db")
        await asyncio.gather(*(live(ledger, name) for name in waves[wave]))
        await ledger.close()

    await live_all(0)
    total = tasks * len(ENDS)
    with closing(sqlite3.connect(folder / "relay.db")) as db:

        def count(condition: str) -> int:
            return int(db.execute(f"SELECT count(*) FROM deliveries WHERE {condition}").fetchone()[0])

        async def done(least: int) -> None:
            async def reached() -> bool:
                return count("state = 'done'") >= least

            await until(reached, timeout_s=300)

        begun_s = time.perf_counter()
        async with serving(folder, environ, hook("bus", bus.url, QUICK + "timeout_s = 5\n" + bus.hook_more)):
            told = 0
            for wave in range(kills):
                await done(told + len(waves[wave]) * len(ENDS) // 3)
                await bus.kill()
                told += len(waves[wave]) * len(ENDS)
                failed = count("last_error <> ''")
                await live_all(wave + 1)  # these find nobody there, however fast the others were

                async def missed(failed: int = failed) -> bool:
                    return count("last_error <> ''") > failed

                await until(missed)
                await bus.restart()
            await done(total)
            seconds = time.perf_counter() - begun_s
    ledger = SqliteLedger(folder / "relay.db")
    expected = [[event.id for event in await ledger.events(name)] for name in names]
    await ledger.close()
    arrived = await bus.arrived()
    seen = Counter(arrived)
    positions = {id: position for position, id in enumerate(dict.fromkeys(arrived))}
    orders = [[positions[id] for id in ids if id in positions] for ids in expected]
    lost = sum(id not in seen for ids in expected for id in ids)
    disordered = sum(order != sorted(order) for order in orders)
    return Told(total, total / seconds, lost, len(arrived) - len(positions), disordered)


async def tell_own(kind: type[OwnBus], folder: Path, tasks: int, *, kills: int = 0) -> Told:
    """Start a bus, tell it of `tasks` tasks, and stop it."""
    bus = kind(folder)
    environ = {
        "KLING_RELAY_LEDGER": f"sqlite:///{folder / 'relay.db'}",
        "KLING_RELAY_CONFIG": str(folder / "relay.toml"),
        "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
    }
    try:
        await bus.start()
        return await tell(bus, folder, environ, tasks, kills=kills)
    finally:
        await bus.stop()
