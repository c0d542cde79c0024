"""Callbacks that `serve --workers N` accepts, on SQLite and PostgreSQL, and the processor time of each.

Run it alone with `python -m tests.bench.workers ROUNDS`.
"""

import asyncio
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import uvloop

from tests.bench import servers
from tests.bench.ledgers import TASKS, prepare, schema
from tests.bench.load import flood
from tests.bench.processes import folder, listening_process
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
        with serving(directory, settings, workers) as (port, pids):
            before_s = sum(map(cpu_s, pids))
            load = uvloop.run(flood("127.0.0.1", port, requests))
            used_s = sum(map(cpu_s, pids)) - before_s
        assert load.bad == 0, load
        return Accepted(load.per_s, load.p99_ms, used_s / len(requests) * 1e6)


@contextmanager
def serving(directory: Path, settings: dict[str, str], workers: int) -> Iterator[tuple[int, list[int]]]:
    """Run `serve`; yield its port and the ids of its server processes once all of them serve."""
    port, log = free_port(), directory / "serve.log"
    arguments = ["-m", "receiver", "serve", "--port", str(port), "--workers", str(workers)]
    with listening_process(arguments, port, log, settings=settings) as process:
        deadline = time.monotonic() + 60
        while log.read_text().count("service.started") < workers:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.02)
        pid = process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        yield port, [int(child) for child in children] or [pid]


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
