"""Callbacks that `serve --workers N` accepts, on SQLite and PostgreSQL, and the processor time of each.

Run it alone with `python -m tests.bench.workers ROUNDS`.
"""

import asyncio
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack

import msgspec
import uvloop

from tests.bench import servers
from tests.bench.ledgers import TASKS, prepare, schema
from tests.bench.load import flood
from tests.bench.processes import cpu_s, folder, serving
from tests.conformance.brokers import free_port

WORKERS = (1, 2, 4)


class Accepted(msgspec.Struct, frozen=True):
    """Callbacks a second, the 99th percentile of their latency in ms, and microseconds of processor time for each.

    The processor time is that of the server processes; that of PostgreSQL is not in it.
    """

    per_s: float
    p99_ms: float
    cpu_us: float


def accept(engine: str, workers: int) -> Accepted:
    """Flood `serve --workers N` with signed callbacks of distinct tasks, from 64 connections."""
    with folder() as directory, ExitStack() as stack:
        url = f"sqlite:///{directory / 'relay.db'}" if engine == "SQLite" else stack.enter_context(schema())
        asyncio.run(prepare(url, 0))
        settings = servers.environment(directory) | {"KLING_RELAY_LEDGER": url, "KLING_RELAY_LOG": "json"}
        requests = servers.callbacks("b", TASKS)
        port = free_port()
        with serving(["--port", str(port)], workers, directory / "serve.log", settings) as process:
            before_s = cpu_s(process.pid)
            load = uvloop.run(flood("127.0.0.1", port, requests))
            used_s = cpu_s(process.pid) - before_s
        assert load.bad == 0, load
        return Accepted(load.per_s, load.p99_ms, used_s / len(requests) * 1e6)


def show_workers(rounds: int) -> None:
    """Print the callbacks a second with each number of processes, in interleaved rounds."""
    print(f"\n{'accepted callbacks, serve --workers N':<44}{'per s':>8}{'ratio':>8}{'p99 ms':>9}{'CPU us':>9}")
    found: dict[tuple[str, int], list[Accepted]] = defaultdict(list)
    for _ in range(rounds):
        for engine in ("SQLite", "PostgreSQL"):
            for workers in WORKERS:
                found[engine, workers].append(accept(engine, workers))
    for (engine, workers), rates in found.items():
        per_s, p99_ms, cpu_us = (
            statistics.median(getattr(one, field) for one in rates) for field in ("per_s", "p99_ms", "cpu_us")
        )
        ratio = statistics.median(one.per_s / base.per_s for one, base in zip(rates, found[engine, 1], strict=True))
        name = f"{engine}, {workers} process" + ("es" if workers > 1 else "")
        print(f"{name:<44}{per_s:>8.0f}{ratio:>8.2f}{p99_ms:>9.1f}{cpu_us:>9.0f}")


if __name__ == "__main__":
    show_workers(int(sys.argv[1]))
