"""`make bench-peers`: callbacks in, durable, events out to an HTTP hook: kling-relay beside peers, in one run.

The floor is aiohttp that posts the same bodies without a store, as in tests.bench.end_to_end. Rounds are interleaved.
Peers do less: they verify a callback, store it, know a repeated one and forward it, but have no tasks with states.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time

import msgspec
import uvloop

from tests.bench import servers
from tests.bench.end_to_end import floor
from tests.bench.hook_peer import HookPeer
from tests.bench.load import flood
from tests.bench.peers.programs import CONCURRENCY, PROGRAMS, Program, Running
from tests.bench.processes import cpu_s, folder
from tests.conformance.brokers import free_port

TIMEOUT_S = 120.0


class Measured(msgspec.Struct, frozen=True):
    """One run: callbacks accepted and events at the hook, a second; CPU time for an event of all processes, in us."""

    accepted: float
    events: float
    cpu_us: float


def requests_for(program: Program, tasks: int, first: int = 0) -> list[bytes]:
    """Return two signed callbacks for each task, at the path where the program takes them."""
    requests = servers.callbacks("b", tasks, first)
    if program.path is None:
        return requests
    line = f"POST {program.path} HTTP/1.1".encode()
    return [line + b"\r\n" + request.partition(b"\r\n")[2] for request in requests]


def measure(program: Program, tasks: int) -> Measured:
    """Flood one program with callbacks, and wait until each has arrived at the hook."""
    hook_port = free_port()
    with folder() as directory, program.start(directory, hook_port, tasks + 1) as running:
        peer = HookPeer()
        try:
            return uvloop.run(_measure(program, tasks, peer, hook_port, running))
        except TimeoutError:
            logs = "\n".join(log.read_text()[-2000:] for log in directory.glob("*.log"))
            raise RuntimeError(f"{program.name}: {peer.requests} requests at the hook\n{logs}") from None


async def _measure(program: Program, tasks: int, peer: HookPeer, hook_port: int, running: Running) -> Measured:
    server = await asyncio.get_running_loop().create_server(peer.protocol, "127.0.0.1", hook_port, backlog=1000)
    async with server:
        # The first task's callbacks arrive once all processes have started.
        await flood("127.0.0.1", running.port, requests_for(program, 1, tasks), connections=1)
        await peer.wait_for(2, TIMEOUT_S)
        requests = requests_for(program, tasks)
        before_s, begun_s = _cpu_s(running), time.perf_counter()
        load = await flood("127.0.0.1", running.port, requests, program.connections)
        assert load.bad == 0, load
        await peer.wait_for(2 + len(requests), TIMEOUT_S)
        seconds, cpu = peer.last_s - begun_s, _cpu_s(running) - before_s
        assert len(peer.seen) == 2 + len(requests), "an event was sent twice"
        return Measured(load.per_s, len(requests) / seconds, cpu / len(requests) * 1e6)


def _cpu_s(running: Running) -> float:
    return sum(map(cpu_s, running.pids))


def show(found: dict[str, list[Measured]], floors: list[float]) -> None:
    """Print the medians. The ratio is the median of each round's ratio to its floor."""
    print(f"{'callbacks in, one HTTP hook out':<40}{'accepted/s':>12}{'events/s':>10}{'of floor':>10}{'CPU us':>8}")
    name = f"floor: aiohttp posts alone, {CONCURRENCY} at once"
    print(f"{name:<40}{'':>12}{statistics.median(floors):>10.0f}{1:>10.2f}")
    for name, runs in found.items():
        accepted, events, cpu_us = (
            statistics.median(getattr(one, field) for one in runs) for field in Measured.__struct_fields__
        )
        ratio = statistics.median(one.events / base for one, base in zip(runs, floors, strict=True))
        print(f"{PROGRAMS[name].name:<40}{accepted:>12.0f}{events:>10.0f}{ratio:>10.2f}{cpu_us:>8.0f}")


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(prog="make bench-peers")
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS), metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=1500, help="tasks in a run, with two callbacks each")
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, medians of {options.rounds} rounds", end="")
    print(f"; {2 * options.tasks} callbacks; load average {os.getloadavg()[0]:.1f}")
    print("CPU time an event is that of all processes of a program, with its Redis\n")

    body = servers.callback_body("b", 0, "succeeded", 0.0)
    found: dict[str, list[Measured]] = {name: [] for name in options.programs}
    floors = []
    for _ in range(options.rounds):
        floors.append(uvloop.run(floor(CONCURRENCY, 2 * options.tasks, body)))
        for name, runs in found.items():
            runs.append(measure(PROGRAMS[name], options.tasks))
    show(found, floors)


if __name__ == "__main__":
    main()
