"""`make bench`: all benchmarks behind the README's figures, in one run. Medians over interleaved rounds."""

import argparse
import asyncio
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import uvloop

from submitter.sandbox.media import make_image, make_video
from submitter.task import TaskStatus
from submitter.vendors import BUILT_IN
from tests.bench import servers
from tests.bench.buses import show_buses
from tests.bench.cold_start import show_cold_start
from tests.bench.end_to_end import show_end_to_end
from tests.bench.ledgers import show_postgres, show_sizes
from tests.bench.load import Load, drip, flood
from tests.bench.processes import folder, listening_process, memory_kib
from tests.bench.workers import show_workers
from tests.conformance.brokers import free_port

ROUNDS = 5
TASKS = 4000


@contextmanager
def served(name: str, directory: Path) -> Iterator[tuple[int, int]]:
    """Run a server of tests.bench.servers in its own process; yield its port and process id."""
    port = free_port()
    arguments = ["-m", "tests.bench.servers", name, str(port), str(directory)]
    with listening_process(arguments, port, directory / f"{name}.log") as process:
        yield port, process.pid


def accept(name: str, *, ended: int = 0) -> tuple[Load, int]:
    """Flood a server with signed callbacks of distinct tasks; return the load and the server's memory in KiB.

    `ended` is the number of ended tasks in the ledger before.
    """
    with folder() as directory:
        if name in ("receiver", "unbounded"):
            if ended:
                servers.fill(directory / "relay.db", "ended", ended, TaskStatus.SUCCEED)
            servers.fill(directory / "relay.db", "b", TASKS)
        requests = servers.callbacks("b", TASKS)
        with served(name, directory) as (port, pid):
            load = uvloop.run(flood("127.0.0.1", port, requests))
            return load, memory_kib(pid)


def steady(per_s: float, seconds: int = 6) -> Load:
    """Send callbacks to the receiver at a steady rate."""
    count = int(per_s * seconds / 2)
    with folder() as directory:
        servers.fill(directory / "relay.db", "b", count)
        requests = servers.callbacks("b", count)
        with served("receiver", directory) as (port, _):
            return uvloop.run(drip("127.0.0.1", port, requests, per_s))


def reach_hook(count: int = 100) -> list[float]:
    """Return the latency of each callback, in ms: from its first byte sent until its event reaches an idle hook."""
    arrived: dict[str, float] = {}

    async def run(directory: Path) -> list[float]:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route

        from submitter.sandbox.server import free_socket, listening

        got = asyncio.Event()

        async def hook(request: Request) -> Response:
            arrived[str(len(arrived))] = time.perf_counter()
            await request.body()
            got.set()
            return Response(status_code=204)

        bound, url = free_socket()
        (directory / "relay.toml").write_text(
            f'[[hook]]\nname = "bench"\nurl = "{url}/events"\nsecret = "env:HOOK_SECRET"\n'
        )
        times = []
        async with listening(Starlette(routes=[Route("/events", hook, methods=["POST"])]), bound):
            with served("receiver", directory) as (port, _):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for request in servers.callbacks("b", count)[:count]:
                    got.clear()
                    begun = time.perf_counter()
                    writer.write(request)
                    await reader.readuntil(b"\r\n\r\n")
                    await got.wait()
                    times.append((arrived[str(len(arrived) - 1)] - begun) * 1000)
                    await asyncio.sleep(0.05)  # so that the hook is idle again
                    while len(reader._buffer):  # type: ignore[attr-defined]
                        await reader.read(1024)
                writer.close()
        return times

    with folder() as directory:
        servers.fill(directory / "relay.db", "b", count)
        return asyncio.run(run(directory))


def import_ms(code: str) -> float:
    """Return the median time of ten interpreter starts that run `code`, in ms."""
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times)


async def faults(count: int, vendor: str = "kling") -> dict[str, int]:
    """Run `count` tasks through a sandbox that drops, repeats and reorders reports; check every guarantee."""
    from tests.world import World, run_many

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with folder() as directory:
        (directory / "girl.png").write_bytes(make_image(400, 600))
        (directory / "dance.mp4").write_bytes(make_video(4, 480, 360))
        (directory / "world").mkdir()
        world = World(directory / "world", directory)
        async with world.stack:
            return await run_many(world, count, vendor)


def show_accept(loads: dict[str, list[Load]], names: dict[str, str]) -> None:
    """Print callback throughput and latency of each server."""
    bare = statistics.median(load.per_s for load in loads["bare"])
    print(f"{'accepted callbacks, 64 connections':<44}{'per s':>8}{'ratio':>8}{'p50 ms':>9}{'p99 ms':>9}")
    for name, found in loads.items():
        per_s, p50, p99 = (
            statistics.median(getattr(load, field) for load in found) for field in ("per_s", "p50_ms", "p99_ms")
        )
        bad = sum(load.bad for load in found)
        line = f"{names[name]:<44}{per_s:>8.0f}{per_s / bare:>8.2f}{p50:>9.1f}{p99:>9.1f}"
        print(line + (f"  {bad} refused" if bad else ""))


def show_faults(tasks: int, vendor_tasks: int) -> None:
    """Print how many polls it takes when reports are dropped, repeated and reordered."""
    counts: dict[str, Any] = asyncio.run(faults(tasks))
    print(f"\n{tasks} tasks, callbacks dropped, repeated and reordered (10 % each): all ended correctly, none twice")
    print("  " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if vendor_tasks:
        print(f"\n{f'{vendor_tasks} tasks with the same faults':<30}{'overdue':>8}{'queries':>9}{'per task':>10}")
        for vendor in BUILT_IN:
            counts = asyncio.run(faults(vendor_tasks, vendor))
            line = f"{vendor:<30}{counts['overdue']:>8}{counts['queries']:>9}"
            print(line + f"{counts['queries'] / vendor_tasks:>10.2f}")


def main() -> None:
    """Run the benchmarks, and print their figures."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--size-rounds", type=int, default=3, help="rounds with 1,000 to 1,000,000 ended tasks")
    parser.add_argument("--worker-rounds", type=int, default=3, help="rounds of `serve` with 1, 2 and 4 processes")
    parser.add_argument("--cold-starts", type=int, default=15, help="cold starts of each Lambda function")
    parser.add_argument("--end-to-end-rounds", type=int, default=3, help="rounds of callbacks in, hooks out")
    parser.add_argument("--tasks", type=int, default=1000, help="tasks with injected faults (Kling)")
    parser.add_argument("--vendor-tasks", type=int, default=200, help="tasks with injected faults, per vendor")
    parser.add_argument(
        "--bus-events", type=int, default=10_000, help="events per bus, which is killed twice meanwhile"
    )
    parser.add_argument(
        "--postgres-tasks", type=int, default=10_000, help="tasks for eight receivers on one PostgreSQL"
    )
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, medians of {options.rounds} rounds\n")

    names = {
        "bare": "bare Starlette route that reads the body",
        "transaction": "one fsynced transaction per callback",
        "unbounded": "receiver without the bounds of its HTTP front",
        "receiver": "receiver",
    }
    loads: dict[str, list[Load]] = {name: [] for name in names}
    memory = []
    for _ in range(options.rounds):
        for name in names:
            load, kib = accept(name)
            loads[name].append(load)
            if name == "receiver":
                memory.append(kib)
    show_accept(loads, names)
    kept = statistics.median(
        with_bounds.per_s / without.per_s
        for with_bounds, without in zip(loads["receiver"], loads["unbounded"], strict=True)
    )
    print(f"with the bounds of its HTTP front the receiver accepts {kept:.3f} of what it accepts without them")

    if options.end_to_end_rounds:
        show_end_to_end(options.end_to_end_rounds)

    load = steady(500)
    print(f"\nreceiver at a steady 500/s: p50 {load.p50_ms:.1f} ms, p99 {load.p99_ms:.1f} ms, {load.bad} refused")
    times = reach_hook()
    p99 = sorted(times)[int(len(times) * 0.99) - 1]
    print(f"from a callback to an idle hook: median {statistics.median(times):.1f} ms, p99 {p99:.1f} ms")
    print(f"memory of the receiver after {2 * TASKS} callbacks: {statistics.median(memory) / 1024:.1f} MiB")

    empty = import_ms("pass")
    base = import_ms("import starlette.applications, msgspec") - empty
    ours = import_ms("import receiver.app") - empty
    ratio = ours / base
    print(f"import receiver.app: {ours:.0f} ms; starlette, msgspec alone: {base:.0f} ms; ratio {ratio:.2f}")

    if options.size_rounds:
        show_sizes("on SQLite", lambda ended: accept("receiver", ended=ended)[0].per_s, options.size_rounds)
    if options.cold_starts:
        show_cold_start(options.cold_starts)
    show_faults(options.tasks, options.vendor_tasks)
    if options.postgres_tasks:
        show_postgres(options.rounds, options.postgres_tasks)
    if options.worker_rounds:
        show_workers(options.worker_rounds)
    if options.bus_events:
        show_buses(options.bus_events)


if __name__ == "__main__":
    main()
