"""Events a second by destination, and what becomes of them when the bus is killed twice meanwhile."""

import asyncio
import logging
import sys
from pathlib import Path

import msgspec
import structlog

from receiver.log import silence_clients
from tests.bench.processes import folder
from tests.conformance.own_servers import OWN_BUSES, OwnBus, OwnServer
from tests.road.fan_out import ENDS, Told, tell_own


class HttpSink(OwnServer):
    """A process with one route, which keeps every body as a line."""

    name, binary = "https", "python3"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.bench.servers", "sink", str(self.port), str(self.folder)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    async def arrived(self) -> list[str]:
        return read_lines(self.folder / "events.jsonl")


class Unkilled(OwnBus):
    """A destination that is no server."""

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
    """Be a user's function."""
    PythonSink.got.append(event["id"])


def read_lines(path: Path) -> list[str]:
    """Return the ids of the events in a file of lines."""
    return [msgspec.json.decode(line)["id"] for line in path.read_bytes().splitlines()]


async def run(kind: type[OwnBus], events: int, kills: int) -> Told:
    """Tell one bus of `events` events."""
    with folder() as directory:
        return await tell_own(kind, directory, -(-events // len(ENDS)), kills=kills)


def show_buses(events: int) -> None:
    """Print the table."""
    silence_clients()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(f"\n{f'{events} events to':<32}{'per s':>8}   killed twice: {'lost':>6}{'again':>7}{'out of order':>14}")
    kinds: list[type[OwnBus]] = [*OWN_BUSES.values(), HttpSink, FileSink, PythonSink]
    for kind in kinds:
        told = asyncio.run(run(kind, events, 0))
        assert (told.lost, told.again) == (0, 0), told
        line = f"{kind.name:<32}{told.per_s:>8.0f}"
        if not issubclass(kind, Unkilled):
            told = asyncio.run(run(kind, events, 2))
            order = "not promised" if kind is HttpSink else told.disordered
            line += f"{told.lost:>23}{told.again:>7}{order:>14}"
        print(line, flush=True)
