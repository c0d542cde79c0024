"""Delivery throughput per destination, and losses and repetitions when the bus is killed twice meanwhile."""

import asyncio
import logging
import sys
from pathlib import Path

import msgspec
import structlog

from submitter.log import silence_clients
from tests.bench.processes import folder
from tests.conformance.own_servers import OWN_BUSES, OwnBus, OwnServer
from tests.road.fan_out import STATUSES, FanOutResult, measure_own_bus


class HttpSink(OwnServer):
    """An HTTP server process that appends every body to a file as a line."""

    name, binary = "https", "python3"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.bench.servers", "sink", str(self.port), str(self.folder)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    async def arrived(self) -> list[str]:
        return read_lines(self.folder / "events.jsonl")


class Unkilled(OwnBus):
    """A destination without a server: nothing to start or kill."""

    async def start(self) -> None:
        return None

    async def kill(self) -> None:
        return None

    async def restart(self) -> None:
        return None


class FileSink(Unkilled):
    name = "file"

    @property
    def url(self) -> str:
        return f"file://{self.folder / 'events.jsonl'}"

    async def arrived(self) -> list[str]:
        return read_lines(self.folder / "events.jsonl")


class PythonSink(Unkilled):
    name = "python"
    got: list[str] = []

    @property
    def url(self) -> str:
        PythonSink.got.clear()
        return "python:tests.bench.buses:take"

    async def arrived(self) -> list[str]:
        return list(self.got)


async def take(event: dict[str, str]) -> None:
    """Receive an event, as a user's function at `python:` does."""
    PythonSink.got.append(event["id"])


def read_lines(path: Path) -> list[str]:
    """Return the ids of the events in a JSON Lines file."""
    return [msgspec.json.decode(line)["id"] for line in path.read_bytes().splitlines()]


async def run(kind: type[OwnBus], events: int, kills: int) -> FanOutResult:
    """Deliver `events` events to a bus that is killed `kills` times."""
    with folder() as directory:
        return await measure_own_bus(kind, directory, -(-events // len(STATUSES)), kills=kills)


def show_buses(events: int) -> None:
    """Print throughput per destination and, for servers, the outcome with two kills."""
    silence_clients()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(f"\n{f'{events} events to':<32}{'per s':>8}   killed twice: {'lost':>6}{'again':>7}{'out of order':>14}")
    kinds: list[type[OwnBus]] = [*OWN_BUSES.values(), HttpSink, FileSink, PythonSink]
    for kind in kinds:
        outcome = asyncio.run(run(kind, events, 0))
        assert (outcome.lost, outcome.repeated) == (0, 0), outcome
        line = f"{kind.name:<32}{outcome.per_s:>8.0f}"
        if not issubclass(kind, Unkilled):
            outcome = asyncio.run(run(kind, events, 2))
            order = "not promised" if kind is HttpSink else outcome.out_of_order
            line += f"{outcome.lost:>23}{outcome.repeated:>7}{order:>14}"
        print(line, flush=True)
