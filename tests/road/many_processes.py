"""Load test: many receivers on one ledger, some of them killed while callbacks arrive."""

import asyncio
import os
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen

import msgspec

from submitter.ledger import open_ledger
from submitter.ledger.base import Ledger
from submitter.task import Task, TaskStatus
from submitter.vendors.kling.protocol import POLL_POLICY
from tests.bench import servers
from tests.bench.processes import listening_process
from tests.conformance.brokers import free_port
from tests.road.fan_out import hook, until

CONNECTIONS = 8
"""Client connections to each receiver."""


class Flooded(msgspec.Struct, frozen=True):
    """The results: callbacks per second, callbacks resent after a kill, and counts of events and deliveries."""

    callbacks: int
    per_s: float
    sent_again: int
    unfinished: int
    events: int
    undelivered: int
    delivered_again: int
    events_with_two_ids: int


class _Flood:
    """Sends each callback until it is answered with 200, as a vendor does through a load balancer."""

    def __init__(self, requests: list[bytes], ports: list[int]) -> None:
        self.left = requests[::-1]
        self.ports = ports
        self.answered = 0
        self.resent = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._send(port) for port in self.ports for _ in range(CONNECTIONS)))

    async def _send(self, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        is_alive = True
        while self.left and is_alive:
            request = self.left.pop()
            is_accepted = False
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                is_accepted = head.startswith(b"HTTP/1.1 200")
            except (OSError, asyncio.IncompleteReadError):
                is_alive = False  # the receiver was killed: other connections send the remaining callbacks
            if is_accepted:
                self.answered += 1
            else:
                self.left.insert(0, request)
                self.resent += 1
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def fill(ledger: Ledger, prefix: str, count: int, first: int = 0) -> None:
    """Store the submitted tasks that `servers.callbacks` refers to."""
    now_ms = time.time_ns() // 1_000_000
    for start in range(first, first + count, 500):
        await asyncio.gather(
            *(
                ledger.reserve(
                    Task(
                        f"{prefix}-{n}",
                        "kling",
                        TaskStatus.SUBMITTED,
                        now_ms,
                        now_ms,
                        POLL_POLICY,
                        task_id=str(servers.FIRST_ID + n),
                        sequence=1,
                        poll_at_ms=now_ms + 900_000,
                        metadata={"order": str(n)},
                    )
                )
                for n in range(start, min(start + 500, first + count))
            )
        )


async def flood_many(folder: Path, ledger_url: str, tasks: int, *, processes: int, kills: int) -> Flooded:
    """Send two callbacks for each task to `processes` receivers, and kill `kills` of them meanwhile."""
    ledger = open_ledger(ledger_url)
    await fill(ledger, "b", tasks)
    sink = free_port()
    (folder / "relay.toml").write_text(
        hook("sink", f"http://127.0.0.1:{sink}/events", "timeout_s = 1\nconcurrency = 20\n")
    )
    os.environ["BENCH_LEDGER"] = ledger_url
    ports = [free_port() for _ in range(processes)]
    with ExitStack() as stack:

        def run(name: str, port: int) -> Popen[bytes]:
            arguments = ["-m", "tests.bench.servers", name, str(port), str(folder)]
            return stack.enter_context(listening_process(arguments, port, folder / f"{name}-{port}.log"))

        run("sink", sink)
        receivers = [run("receiver", port) for port in ports]
        requests = servers.callbacks("b", tasks)
        flood = _Flood(requests, ports)
        begun_s = time.perf_counter()
        running = asyncio.create_task(flood.run())
        for kill in range(kills):

            async def far_enough(kill: int = kill) -> bool:
                return flood.answered >= len(requests) * (kill + 1) // (kills + 2) or running.done()

            await until(far_enough, 300)
            receivers[kill].kill()
        await running
        seconds = time.perf_counter() - begun_s

        expected = [event.id for n in range(tasks) for event in await ledger.events(f"b-{n}")]

        async def all_delivered() -> bool:  # a killed receiver's claims are claimed again when their leases expire
            await asyncio.sleep(0.2)
            delivered = {event["id"] for event in read(folder)}
            return delivered.issuperset(expected) and (await ledger.counts())["delivery.due"] == 0

        await until(all_delivered, 120)
    ids: dict[tuple[str, str], set[str]] = defaultdict(set)
    lines = read(folder)
    for event in lines:
        ids[(event["subject"], event["sequence"])].add(event["id"])
    seen = Counter(event["id"] for event in lines)
    ended = await ledger.get_many([f"b-{n}" for n in range(tasks)])
    await ledger.close()
    return Flooded(
        callbacks=len(requests),
        per_s=len(requests) / seconds,
        sent_again=flood.resent,
        unfinished=tasks - sum(task.status is TaskStatus.SUCCEED for task in ended),
        events=len(expected),
        undelivered=sum(id not in seen for id in expected),
        delivered_again=len(lines) - len(seen),
        events_with_two_ids=sum(len(found) > 1 for found in ids.values()),
    )


def read(folder: Path) -> list[dict[str, str]]:
    """Return the events that the hook received."""
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


if __name__ == "__main__":
    print(asyncio.run(flood_many(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), processes=8, kills=2)))
