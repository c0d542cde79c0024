"""The part `overload`: a flood of many times what the receiver can accept, while a vendor sends authentic callbacks.

Every authentic callback is accepted when the vendor repeats it, none that was accepted is lost, all that was refused
is counted, memory and log are bounded, and the first callback after the flood is accepted at once.
"""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import uvloop

from tests.bench import load as bench
from tests.torture.bodies import callback
from tests.torture.flood import KINDS, TARGETS, Seen, flood
from tests.torture.load import Load, exchange, judge
from tests.torture.parts import Round
from tests.torture.served import PROGRAM, Served, allow_open_files, fill_ledger, memory_mib, serving
from tests.torture.sqlite_store import read_file
from tests.torture.strangers import get

RATE = 20.0
"""Authentic callbacks a second."""

ACCEPTED_MAX_S = 30.0
"""An authentic callback that is repeated each second is accepted within this time. Vendors repeat for longer."""

RECOVERED_MAX_S = 1.0
QUIET_LOG_BYTES, QUIET_LOG_BYTES_PER_S = 20 * 1024, 3 * 1024
"""The most bytes of log lines that say of no authentic callback that it changed a task."""

GENERATORS = 2


class Size(msgspec.Struct, frozen=True):
    """How much of everything a round does."""

    seconds: float = 30.0
    share: float = 1.0
    """Of the flood's connections."""

    measured: int = 3000
    """Callbacks that are sent before the flood to measure how many can be accepted; 0: none."""


def run(seed: int, folder: Path) -> Round:
    """Run one round."""
    return attack(seed, folder, Size())


def attack(seed: int, folder: Path, size: Size, *, program: Sequence[str] = PROGRAM) -> Round:
    """Run a round of this size against `python {program} serve`."""
    allow_open_files(4096)
    done, live = Round(), round(size.seconds * RATE) + 200
    tasks = {"open": TARGETS, "done": TARGETS, "b": live, "m": size.measured}
    fill_ledger(folder, tasks, ended=("done",))
    with serving(folder, log="json", program=program) as served:
        load = Load(served.port, RATE, lambda number, status: callback("b", number, status, time.time()))
        load.may_be_unanswered = True  # the bound of connections may close any of them: a vendor repeats
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_attack(seed, served, load, size, done))
        done.counts["max MiB"] = memory_mib(served.process.pid).get("VmHWM", 0)
        done.findings += served.findings_at_end()
        done.findings += _log_findings(served.log.read_bytes(), size.seconds, done)
    arrived = [json.loads(line) for line in served.hooked.read_bytes().splitlines()] if served.hooked.exists() else []
    stored = read_file(served.ledger)
    stored.events = [event for event in stored.events if event[1].startswith("b-")]
    judge(done, load, stored, [event for event in arrived if str(event["subject"]).startswith("b-")])
    return done


async def _attack(seed: int, served: Served, load: Load, size: Size, done: Round) -> None:
    """Flood the receiver during the load; then send one callback, and compare the answers with the metrics."""
    per_s = 0.0
    if size.measured:
        requests = [callback("m", number, "processing", time.time()) for number in range(size.measured)]
        per_s = (await bench.flood("127.0.0.1", served.port, requests)).per_s
    sending = asyncio.create_task(load.run())
    seen, loop = Seen(), asyncio.get_running_loop()
    with ProcessPoolExecutor(GENERATORS, multiprocessing.get_context("forkserver")) as pool:
        share = size.share / GENERATORS
        generators = [
            loop.run_in_executor(pool, flood, served.port, seed + n, size.seconds, share) for n in range(GENERATORS)
        ]
        for generated in await asyncio.gather(*generators):
            seen.add(generated)
    await _expect_recovery(served.port, done)
    await load.pause()
    sending.cancel()
    _judge_latency(load, done)
    counted, _ = await get(served.port, "/metrics")
    _judge_counts(seen, counted, load, done)
    offered = sum(seen.sent.values())
    done.counts["flood requests"] = offered
    done.counts["flood connections"] = seen.connections
    done.counts["max offered a second"] = round(offered / size.seconds)
    if per_s:
        done.counts["max accepted a second before"] = round(per_s)
        done.counts["max tenths of what can be accepted"] = round(10 * offered / size.seconds / per_s)


async def _expect_recovery(port: int, done: Round) -> None:
    """Send the first callback once the generators have ended: of a task that has ended, so that it changes nothing."""
    begun_s = time.monotonic()
    answer = await exchange(port, callback("done", 0, "succeeded", time.time()))
    took_s = time.monotonic() - begun_s
    done.counts["max recovery ms"] = round(took_s * 1000)
    if not answer.is_accepted or took_s > RECOVERED_MAX_S:
        done.findings.append(f"the first callback after the flood was answered {answer.status} after {took_s:.1f} s")


def _judge_latency(load: Load, done: Round) -> None:
    took_ms = sorted(round(one * 1000) for one in load.took_s)
    if not took_ms:
        done.findings.append("no authentic callback was accepted")
        return
    done.counts["max p99 ms"] = took_ms[len(took_ms) * 99 // 100]
    done.counts["max ms"] = took_ms[-1]
    if took_ms[-1] > ACCEPTED_MAX_S * 1000:
        done.findings.append(f"an authentic callback was accepted only after {took_ms[-1] / 1000:.1f} s")


def _judge_counts(seen: Seen, counted: dict[str, int], load: Load, done: Round) -> None:
    """Compare what the generators saw with the metrics: these may count more, by what was cut off unanswered."""
    for kind, statuses in seen.answers.items():
        wrong = {status: count for status, count in statuses.items() if status not in KINDS[kind].answers | {503}}
        if wrong:
            done.findings.append(f"requests of the kind {kind!r} were answered {wrong}")
    if seen.without_retry_after:
        done.findings.append(f"{seen.without_retry_after} answers 503 have no Retry-After")
    forged = ("forged", "forged, without an end")
    shed = seen.answered(503) + sum(count for (_, status), count in load.answers.items() if status == 503)
    expected = {
        "UrlUnknown": (seen.answered(404, *forged), forged),
        "SignatureInvalid": (seen.answered(401, "wrongly signed"), ("wrongly signed",)),
        "unchanged": (seen.answered(200, "replayed"), ("replayed", "authentic")),
        "Overloaded": (shed - counted["LedgerUnavailable"], (*forged, "wrongly signed", "replayed")),
    }
    cut = seen.cut | {"authentic": 1 + sum(n for (_, status), n in load.answers.items() if status != 503)}
    for result, (answers, kinds) in expected.items():
        done.counts[result] = counted[result]
        if not answers <= counted[result] <= answers + sum(cut.get(kind, 0) for kind in kinds):
            done.findings.append(f"{result}: {answers} answers, and the metrics count {counted[result]}; cut: {cut}")


def _log_findings(log: bytes, seconds: float, done: Round) -> list[str]:
    """Return whether the log is too long, without the lines of what changed."""
    quiet = [
        line for line in log.splitlines(keepends=True) if b'"task.changed"' not in line and b"delivery" not in line
    ]
    length, bound = sum(map(len, quiet)), round(QUIET_LOG_BYTES + seconds * QUIET_LOG_BYTES_PER_S)
    done.counts["max bytes of other log lines"] = length
    return [f"the log has {length} bytes beside what changed, more than {bound}"] if length > bound else []
