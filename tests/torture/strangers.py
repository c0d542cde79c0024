"""The part `strangers`: hostile traffic against a running receiver, while its vendor sends authentic callbacks.

No request may be answered 5xx or wait for more than 15 s, no row of the ledger may change without proof, the memory
and the end of the process are bounded, its log shows no secret, and every authentic callback is accepted in time.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from submitter.ledger.base import QUARANTINED_MAX
from tests.torture.forged import Hostile, Strangers, Targets
from tests.torture.hostile_sockets import HostileSockets
from tests.torture.parts import Round
from tests.torture.raw_http import Crowd, Judge, shown
from tests.torture.served import PROGRAM, Rows, Served, allow_open_files, fill_ledger, memory_mib, read_rows, serving
from tests.torture.vendor import Vendor

AUTHENTIC_EVERY_S = 0.05
AUTHENTIC_MAX_S = 5.0
UNPROVEN = ("tasks", "events", "deliveries", "quarantine", "routed", "sqlite_sequence")
"""The tables in which proven callbacks change rows. No row of another table may change."""


class Size(msgspec.Struct, frozen=True):
    """How much of everything a round does."""

    requests: int = 125_000
    live: int = 3000
    kept: int = 24
    alone: int = 400
    silent: int = 1100
    unread: int = 50
    slow: int = 20
    waits: bool = True
    """Whether to wait for every connection that the receiver has to close, about 11 s after its start."""


def run(seed: int, folder: Path) -> Round:
    """Run one round."""
    return attack(seed, folder, Size())


def attack(seed: int, folder: Path, size: Size, *, program: Sequence[str] = PROGRAM) -> Round:
    """Run a round of this size against `python {program} serve`."""
    allow_open_files(4096)
    targets = Targets(now_s=time.time())
    tasks = {"open": targets.open, "done": targets.done, "odd": targets.odd, "live": size.live}
    fill_ledger(folder, tasks, ended=("done",))
    style = random.Random(seed).choice(("json", "console"))
    with serving(folder, log=style, program=program) as served:
        before = read_rows(served.ledger)
        judge, vendor = Judge(), Vendor(served.port, "live", size.live)
        requests = Strangers(seed, targets).make(size.requests)
        begun_s = time.monotonic()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_attack(served, judge, vendor, requests, size))
        seconds = time.monotonic() - begun_s
        memory = memory_mib(served.process.pid)
        findings = served.findings_at_end()
    findings += judge.findings
    findings += changes_without_proof(before, read_rows(served.ledger), vendor.accepted)
    counts = Counter(judge.counts)
    counts["max MiB"] = memory.get("VmHWM", 0)
    counts["max requests a second"] = round(judge.counts["requests"] / seconds)
    return Round(counts, findings)


async def _attack(served: Served, judge: Judge, vendor: Vendor, requests: Sequence[Hostile], size: Size) -> None:
    """Send everything at once; then replay the authentic callbacks, and ask the receiver how it is."""
    crowd, sockets = Crowd(served.port, judge), HostileSockets(served.port, judge, time.time())
    framed = deque(request for request in requests if request.is_framed)
    others = [request for request in requests if not request.is_framed]
    done = asyncio.Event()
    async with asyncio.TaskGroup() as around:
        steady = around.create_task(vendor.send_steadily(AUTHENTIC_EVERY_S, AUTHENTIC_MAX_S, done))
        sweeping = around.create_task(crowd.sweep())
        async with asyncio.TaskGroup() as group:
            flood = [
                group.create_task(crowd.keep(framed, (1, 2, 3, 4, 5, 6, 7, 8), size.kept)),
                group.create_task(crowd.send_alone(others, size.alone)),
            ]
            if size.waits:
                attacks = [sockets.silent(size.silent), sockets.never_read(size.unread)]
                attacks += [one() for _ in range(size.slow) for one in (sockets.slow_body, sockets.slow_chunks)]
                for attack_ in attacks:
                    group.create_task(attack_)
                group.create_task(sockets.pipelined())
            for _ in range(4):
                group.create_task(sockets.endless_headers())
            if not size.waits:
                await flood[0]
                crowd.close()
        done.set()
        took, refused = await steady
        sweeping.cancel()
    for sentence in refused:
        judge.find("an authentic callback was not accepted", sentence)
    judge.counts["authentic"] = len(took)
    judge.counts["max authentic ms"] = round(max(took, default=0) * 1000)
    await _replay(crowd, judge, vendor)
    await _ask(served, judge)


async def _replay(crowd: Crowd, judge: Judge, vendor: Vendor) -> None:
    """Send the accepted callbacks again: they change nothing."""
    again = deque(Hostile("replayed at the end", data, frozenset({200})) for data in vendor.bytes_sent)
    judge.counts["replayed at the end"] = len(again)
    await crowd.keep(again, (8,), 4)


async def _ask(served: Served, judge: Judge) -> None:
    """Check that the receiver is ready, and that its metrics count what it refused for lack of room."""
    _, ready = await get(served.port, "/readyz")
    if b" 200 " not in ready[:20]:
        judge.find("not ready at the end", shown(ready))
    counted, _ = await get(served.port, "/metrics")
    shed = judge.counts["answers 503"]
    if shed != counted["Overloaded"] + counted["LedgerUnavailable"]:
        judge.find("503 is not counted", f"{shed} answers, and in the metrics: {dict(counted)}")
    if judge.counts["closed though framed"] > counted["closed"]:
        judge.find("closed connections are not counted", f"{dict(judge.counts)}, and in the metrics: {dict(counted)}")
    judge.counts["closed by a bound"] = counted["closed"]


async def get(port: int, path: str) -> tuple[Counter[str], bytes]:
    """Return an answer of the receiver; of metrics the sums by result of callbacks, and the closed connections."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: relay\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read(-1)
    writer.close()
    counted: Counter[str] = Counter()
    for line in answer.decode().splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("kling_relay_callbacks_total{"):
            counted[name.partition('result="')[2].partition('"')[0]] += int(float(value))
        elif name.startswith("kling_relay_connections_closed_total{"):
            counted["closed"] += int(float(value))
    return counted, answer


def changes_without_proof(before: Rows, after: Rows, accepted: set[tuple[str, str]]) -> list[str]:
    """Return what changed in the ledger without an authentic callback, and what an accepted one did not change."""
    findings = [
        f"rows of {table} changed: {sorted(map(repr, before[table] ^ after[table]))[:2]}"
        for table in before
        if table not in UNPROVEN and before[table] != after[table]
    ]
    allowed = {id for id, _ in accepted}
    for row in sorted(before["tasks"] ^ after["tasks"]):
        id = str(row[0])
        if id not in allowed and not id.startswith("odd-"):
            findings.append(f"task {id} changed without an authentic callback: {row}")
    findings += [
        f"a body that is no callback changed the status of a task: {row}"
        for row in after["tasks"]
        if str(row[0]).startswith("odd-") and row[2] != "submitted"
    ]
    words = {"processing": "task.processing", "succeeded": "task.succeed"}
    proven = {(id, words[status]) for id, status in accepted}
    stored = Counter((str(row[1]), str(row[4])) for row in after["events"] - before["events"])
    findings += [f"event {event} without an authentic callback" for event in sorted(stored.keys() - proven)]
    findings += [f"accepted, and not in the ledger: {event}" for event in sorted(proven - stored.keys())]
    findings += [f"{count} events {event}" for event, count in stored.items() if count > 1]
    kept = Counter(str(row[0]) for row in after["quarantine"])
    findings += [f"{n} bodies of {id} in quarantine" for id, n in kept.items() if n > QUARANTINED_MAX]
    findings += [f"quarantine of {id} without a signature" for id in sorted(kept) if not id.startswith("odd-")]
    known = {row[0] for row in after["events"]}
    findings += [f"a delivery of no event: {row}" for row in after["deliveries"] if row[1] not in known]
    return findings[:20]
