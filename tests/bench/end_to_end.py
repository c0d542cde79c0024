"""End to end: callbacks in, events out to HTTP hooks; events a second, CPU time an event, latency, memory.

The floor is aiohttp that posts the same bodies to the same server without a ledger, in the same run.
"""

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import aiohttp
import msgspec
import uvloop

from submitter.event import event_id
from submitter.ledger import open_ledger
from tests.bench import servers
from tests.bench.hook_peer import HookPeer
from tests.bench.ledgers import schema
from tests.bench.load import drip, flood
from tests.bench.processes import cpu_s, folder, memory_kib, serving
from tests.conformance.brokers import free_port
from tests.road.many_processes import fill as fill_ledger

TIMEOUT_S = 300.0
STEADY_PER_S = 300.0


class Case(msgspec.Struct, frozen=True):
    """What is measured: the number of hooks, each hook's `concurrency` (None: the default), ledger, processes."""

    hooks: int = 1
    concurrency: int | None = None
    ledger: str = "sqlite"
    workers: int = 1

    @property
    def name(self) -> str:
        """Its name in the table."""
        hooks = f"{self.hooks} hook" + "s" * (self.hooks > 1)
        concurrency = "" if self.concurrency is None else f", concurrency {self.concurrency}"
        return f"{self.ledger}, {hooks}{concurrency}" + (f", {self.workers} processes" if self.workers > 1 else "")


class Measured(msgspec.Struct, frozen=True):
    """One run. Rates are a second; `cpu_us` is all processes' CPU time for an event; latencies are ms."""

    accepted: float
    events: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    memory_mib: float


def toml(case: Case, port: int) -> str:
    """Return the relay.toml of a case, whose hooks all lead to one port."""
    concurrency = "" if case.concurrency is None else f"concurrency = {case.concurrency}\n"
    return "".join(
        f'[[hook]]\nname = "bench-{n}"\nurl = "http://127.0.0.1:{port}/hook/{n}"\n'
        f'secret = "env:HOOK_SECRET"\n{concurrency}\n'
        for n in range(case.hooks)
    )


@contextmanager
def serving_case(
    case: Case, directory: Path, hook_port: int, ledger: str
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run `kling-relay serve` for a case; yield its port and process."""
    (directory / "relay.toml").write_text(toml(case, hook_port))
    settings = servers.environment(directory) | {"KLING_RELAY_LEDGER": ledger, "KLING_RELAY_LOG": "json"}
    port = free_port()
    with serving(["--port", str(port)], case.workers, directory / "serve.log", settings) as process:
        yield port, process


def measure(case: Case, tasks: int) -> Measured:
    """Run one case with a flood of callbacks, then with a steady rate of them."""
    with folder() as directory, ExitStack() as stack:
        if case.ledger == "sqlite":
            url = f"sqlite:///{directory / 'relay.db'}"
            servers.fill(directory / "relay.db", "b", tasks)
        else:
            url = stack.enter_context(schema())
            asyncio.run(_fill(url, tasks))
        return uvloop.run(_measure(case, tasks, directory, url))


async def _fill(url: str, tasks: int) -> None:
    ledger = open_ledger(url)
    await fill_ledger(ledger, "b", tasks)
    await ledger.close()


async def _measure(case: Case, tasks: int, directory: Path, url: str) -> Measured:
    peer = HookPeer()
    hook_port = free_port()
    server = await asyncio.get_running_loop().create_server(peer.protocol, "127.0.0.1", hook_port, backlog=1000)
    steady = min(int(STEADY_PER_S * 3 / 2), tasks // 4)
    requests = servers.callbacks("b", tasks - steady)
    async with server:
        with serving_case(case, directory, hook_port, url) as (port, process):
            before_s, begun_s = cpu_s(process.pid), time.perf_counter()
            load = await flood("127.0.0.1", port, requests)
            assert load.bad == 0, load
            await peer.wait_for(len(requests) * case.hooks, TIMEOUT_S)
            events = len(requests) * case.hooks
            seconds, cpu = peer.last_s - begun_s, cpu_s(process.pid) - before_s
            waits_ms = await _steady(case, peer, port, steady, tasks - steady)
            cuts = statistics.quantiles(waits_ms, n=100)
            return Measured(
                accepted=load.per_s,
                events=events / seconds,
                cpu_us=cpu / events * 1e6,
                p50_ms=cuts[49],
                p99_ms=cuts[98],
                memory_mib=memory_kib(process.pid) / 1024,
            )


async def _steady(case: Case, peer: HookPeer, port: int, tasks: int, first: int) -> list[float]:
    """Send callbacks at a steady rate; return the time of each event, in ms, from its callback to a hook's request."""
    sent_s: list[float] = []
    total = peer.requests + 2 * tasks * case.hooks
    await drip("127.0.0.1", port, servers.callbacks("b", tasks, first), STEADY_PER_S, sent_s)
    await peer.wait_for(total, TIMEOUT_S)
    ids = [event_id("kling", f"b-{n}", sequence).encode() for sequence in (2, 3) for n in range(first, first + tasks)]
    return [(peer.seen[id] - sent) * 1000 for id, sent in zip(ids, sent_s, strict=True)]


async def floor(concurrency: int, posts: int, body: bytes) -> float:
    """Return the posts a second of aiohttp alone, with this many at once, in another process than the server."""
    peer, port = HookPeer(), free_port()
    server = await asyncio.get_running_loop().create_server(peer.protocol, "127.0.0.1", port, backlog=1000)
    arguments = ["-m", "tests.bench.end_to_end", str(port), str(concurrency), str(posts)]
    async with server:
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=asyncio.subprocess.PIPE)
        begun = asyncio.create_task(peer.wait_for(1, TIMEOUT_S))
        await process.communicate(body)
        await begun
        return posts / (peer.last_s - peer.first_s)


async def post_alone(port: int, concurrency: int, posts: int, body: bytes) -> None:
    """Post a body again and again with aiohttp."""
    left = iter(range(posts))
    headers = {"webhook-id": "floor", "content-type": "application/cloudevents+json"}

    async def sender(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"http://127.0.0.1:{port}/hook/0", data=body, headers=headers) as response:
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
        await asyncio.gather(*(sender(session) for _ in range(concurrency)))


CASES = (
    Case(),
    Case(concurrency=50),
    Case(hooks=10, concurrency=50),
    Case(hooks=100, concurrency=50),
    Case(ledger="postgres"),
    Case(ledger="postgres", concurrency=50),
    Case(concurrency=50, workers=2),
    Case(ledger="postgres", concurrency=50, workers=2),
)
EVENTS = 8000
"""Requests to hooks in each case."""


def show_end_to_end(rounds: int) -> None:
    """Print the table of all cases beside the floor. `ratio` is the events a second in relation to the floor."""
    body = servers.callback_body("b", 0, "succeeded", time.time()) * 2  # as long as an event
    floors: list[float] = []
    found: dict[Case, list[Measured]] = {case: [] for case in CASES}
    for _ in range(rounds):
        floors.append(uvloop.run(floor(50, EVENTS, body)))
        for case, runs in found.items():
            runs.append(measure(case, max(100, EVENTS // 2 // case.hooks)))
    least = statistics.median(floors)
    print(f"\n{'end to end, 64 connections in, HTTP hooks out':<52}{'events/s':>9}{'ratio':>7}", end="")
    print(f"{'CPU us':>8}{'p50 ms':>8}{'p99 ms':>8}{'accepted/s':>12}{'MiB':>6}")
    print(f"{'aiohttp alone, 50 at once':<52}{least:>9.0f}{1:>7.2f}")
    for case, runs in found.items():
        events, cpu, p50, p99, accepted, mib = (
            statistics.median(getattr(run, field) for run in runs)
            for field in ("events", "cpu_us", "p50_ms", "p99_ms", "accepted", "memory_mib")
        )
        line = f"{case.name:<52}{events:>9.0f}{events / least:>7.2f}{cpu:>8.0f}{p50:>8.1f}{p99:>8.1f}"
        print(f"{line}{accepted:>12.0f}{mib:>6.0f}")


if __name__ == "__main__":
    uvloop.run(post_alone(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer.read()))
