"""Callback throughput by number of receivers on PostgreSQL, and the cost of a large ledger."""

import asyncio
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import uvloop

from submitter.ledger import open_ledger
from submitter.task import Task, TaskStatus
from submitter.vendors.kling.protocol import POLL_POLICY
from tests.bench import servers
from tests.bench.load import Load, flood
from tests.bench.processes import folder, listening_process
from tests.conformance.brokers import free_port
from tests.road.many_processes import fill, flood_many

SERVER = "postgresql://postgres@127.0.0.1:5432/test"
TASKS = 4000


@contextmanager
def schema() -> Iterator[str]:
    """Yield the URL of a ledger in a new PostgreSQL schema, which is dropped afterwards."""
    import asyncpg

    name = f"relay_bench_{uuid.uuid4().hex[:8]}"

    async def drop() -> None:
        db = await asyncpg.connect(SERVER)
        await db.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')
        await db.close()

    try:
        yield f"{SERVER}?schema={name}"
    finally:
        asyncio.run(drop())


async def prepare(url: str, ended: int) -> None:
    """Create the tasks of the callbacks, and `ended` tasks that have ended, in a PostgreSQL ledger."""
    import asyncpg

    ledger = open_ledger(url)
    await fill(ledger, "b", TASKS)
    await ledger.close()
    if not ended:
        return
    now_ms = time.time_ns() // 1_000_000
    task = Task("ended-0", "kling", TaskStatus.SUCCEED, now_ms, now_ms, POLL_POLICY, task_id="0", sequence=3)
    doc = msgspec.json.encode(task).decode()
    name = url.rpartition("=")[2]
    db = await asyncpg.connect(SERVER)
    await db.execute(
        f'INSERT INTO "{name}".tasks (external_task_id, vendor, task_id, status, is_open, created_at_ms, doc)'
        " SELECT 'ended-' || n, 'kling', n::text, 'succeed', false, $1::bigint + n,"
        " replace($2, 'ended-0', 'ended-' || n)"
        " FROM generate_series(1, $3::int) AS n",
        now_ms - 10_000_000,
        doc,
        ended,
        timeout=300,
    )
    await db.execute(f'VACUUM ANALYZE "{name}".tasks', timeout=300)
    await db.close()


def accept(processes: int, *, ended: int = 0) -> float:
    """Return the callbacks per second that `processes` receivers on one PostgreSQL accept together."""

    async def flood_all(ports: list[int], requests: list[bytes]) -> list[Load]:
        shares = [requests[n::processes] for n in range(processes)]
        connections = 64 // processes
        return await asyncio.gather(
            *(flood("127.0.0.1", port, share, connections) for port, share in zip(ports, shares, strict=True))
        )

    with folder() as directory, schema() as url, ExitStack() as stack:
        asyncio.run(prepare(url, ended))
        os.environ["BENCH_LEDGER"] = url
        ports = [free_port() for _ in range(processes)]
        for port in ports:
            arguments = ["-m", "tests.bench.servers", "receiver", str(port), str(directory)]
            stack.enter_context(listening_process(arguments, port, directory / f"{port}.log"))
        requests = servers.callbacks("b", TASKS)
        begun_s = time.perf_counter()
        loads = uvloop.run(flood_all(ports, requests))
        seconds = time.perf_counter() - begun_s
        del os.environ["BENCH_LEDGER"]
        assert sum(load.bad for load in loads) == 0, loads
        return len(requests) / seconds


def show_sizes(engine: str, per_s: Callable[[int], float], rounds: int) -> None:
    """Print the relative cost of a callback in a ledger with 1,000, 100,000 and 1,000,000 ended tasks.

    `per_s` measures the callbacks per second with a number of ended tasks.
    """
    sizes: dict[int, list[float]] = {1000: [], 100_000: [], 1_000_000: []}
    for _ in range(rounds):
        for ended, rates in sizes.items():
            rates.append(per_s(ended))
    least = statistics.median(sizes[1000])
    for ended, rates in sizes.items():
        cost = least / statistics.median(rates)
        print(f"{f'a callback {engine}, {ended:,} ended tasks':<44}{cost:>8.2f} times as much")


def show_postgres(rounds: int, tasks: int) -> None:
    """Print throughput with 1, 2 and 4 receivers, the cost of ended tasks, and the outcome of killing receivers."""
    print(f"\n{'accepted callbacks on PostgreSQL':<44}{'per s':>8}")
    found: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(rounds):
        for processes, rates in found.items():
            rates.append(accept(processes))
    for processes, rates in found.items():
        print(f"{f'{processes} receiver' + ('s' if processes > 1 else ''):<44}{statistics.median(rates):>8.0f}")
    show_sizes("on PostgreSQL", lambda ended: accept(1, ended=ended), rounds)
    with folder() as directory, schema() as url:
        print("  ", asyncio.run(flood_many(directory, url, tasks, processes=8, kills=2)))
