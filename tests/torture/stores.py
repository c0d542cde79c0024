"""Part `stores`: faults of SQLite, PostgreSQL and DynamoDB while callbacks arrive at a steady rate.

Whatever is answered 2xx must be in the store at the end; what cannot be stored is answered 503 with Retry-After; the
receiver says that it is not ready meanwhile, and is ready again without a person where the fault ends by itself.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import patch

from tests.conformance.aws_stand_ins import AWS, MINISTACK, run_ministack
from tests.conformance.dynamodb_faults import faulty_proxy
from tests.torture.damaged_file import damage_trial
from tests.torture.dynamodb_store import DynamoStore
from tests.torture.own_postgres import OwnPostgres
from tests.torture.parts import Missing, Round
from tests.torture.postgres_store import PostgresStore
from tests.torture.proxy import FaultyProxy
from tests.torture.sqlite_store import SqliteStore, small_disk
from tests.torture.store_trial import Trial

Names = Callable[[str], bool]
"""Whether a fault of this name is made."""


def run(seed: int, folder: Path) -> Round:
    """Run a trial of each store that this machine has, all at once: most of a trial is waiting."""
    return asyncio.run(_all(seed, folder))


async def _all(seed: int, folder: Path) -> Round:
    done = Round()
    trials: dict[str, Callable[[int, Path], Awaitable[Round]]] = {
        "sqlite": sqlite_trial,
        "postgres": postgres_trial,
        "dynamodb": dynamodb_trial,
        "damage": damage_trial,
    }
    for name in trials:
        (folder / name).mkdir()
    ended = await asyncio.gather(
        *(trial(seed, folder / name) for name, trial in trials.items()), return_exceptions=True
    )
    for name, one in zip(trials, ended, strict=True):
        if isinstance(one, Missing):
            done.counts[f"left out: {name}"] += 1
        elif isinstance(one, BaseException):
            raise one
        else:
            done.findings += [f"{name}: {finding}" for finding in one.findings]
            done.add(Round(one.counts))
    return done


async def sqlite_trial(seed: int, folder: Path, names: Names = bool, sabotage: str = "") -> Round:
    """Break a SQLite file in every way that `names` accepts. On even seeds it is on a small disk, as root."""

    async def trial(*, disk_is_small: bool) -> Round:
        store = SqliteStore(folder, seed)
        made = Trial(folder, store, sabotage)
        faults = store.faults(made.receiver, made.load, disk_is_small=disk_is_small)
        return await made.run([fault for fault in faults if names(fault.name)])

    if seed % 2:
        return await trial(disk_is_small=False)
    with small_disk(folder) as disk_is_small:
        return await trial(disk_is_small=disk_is_small)


async def postgres_trial(seed: int, folder: Path, names: Names = bool, sabotage: str = "") -> Round:
    """Break a PostgreSQL server and its connections; raise Missing where there is none."""
    with OwnPostgres() as server:
        await server.start()
        async with FaultyProxy() as proxy:
            proxy.target = server.port
            store = PostgresStore(server, proxy, seed)
            faults = [fault for fault in store.faults() if names(fault.name)]
            return await Trial(folder, store, sabotage).run(faults)


async def dynamodb_trial(seed: int, folder: Path, names: Names = bool, sabotage: str = "") -> Round:
    """Throttle a stand-in of DynamoDB, and lose its answers; raise Missing where there is none."""
    if not MINISTACK.exists():
        raise Missing("ministack is not installed (make install)")
    with run_ministack(folder) as stand_in, patch.dict(os.environ, {**AWS, "AWS_ENDPOINT_URL": stand_in}):
        async with faulty_proxy(stand_in) as proxy:
            store = DynamoStore(stand_in, proxy, seed)
            faults = [fault for fault in store.faults() if names(fault.name)]
            return await Trial(folder, store, sabotage, tasks=500, rate=10).run(faults)
