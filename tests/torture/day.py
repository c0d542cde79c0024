"""`day`: the whole system through a simulated day with faults by seed, in one process and in virtual time.

Vendors' stand-ins, a receiver with its worker, two submitters, hooks and a SQLite ledger run as simulated processes
that lose messages, stop and start again. The same seed repeats the same day: the digest of its trace is the same.
"""

import asyncio
import gc
import hashlib
import random
import re
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import MutableMapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import structlog

from receiver.settings import load_receiver_settings
from submitter import log
from submitter.errors import LedgerUnavailable, SubmissionUnknown, VendorRefused
from submitter.request import MotionControl
from submitter.sandbox.faults import Faults
from submitter.sandbox.media import make_image, make_video
from tests.torture import day_check
from tests.torture.day_hooks import HOOKS, Endpoints
from tests.torture.day_ledger import Disk, woken_by_commits
from tests.torture.day_network import Exchange, Network, Server
from tests.torture.day_plan import DAY_S, END_S, HOUR_S, RATES, SUBMITTERS, Order, Plan, draw
from tests.torture.day_system import Machine, Receiver, SubmitterMachine, media_server, open_vendors
from tests.torture.parts import Round
from tests.torture.virtual_time import Process, SimulatedClock, VirtualLoop
from tests.world import HOOK_SECRET, KEY, WEBHOOK_SECRET

TASKS = 10_000
FAULTS = Faults(
    drop=0.03,
    repeat=0.05,
    reorder=0.05,
    forge=0.03,
    create_late=0.01,
    late_s=20,
    create_5xx=0.01,
    create_never=0.005,
    create_failed=0.005,
    fail=0.05,
)
ENDED = {"succeeded": "succeed", "failed": "failed"}
RANK = {"created": 0, "submission_unknown": 1, "submitted": 2, "processing": 3, "abandoned": 4, "refused": 4}
_OF_TASK = re.compile(rb"callbacks/([a-z]+)/([a-z0-9-]+)/")


@cache
def make_media() -> dict[str, bytes]:
    """Return the image and the video of all requests."""
    return {"girl.png": make_image(400, 600), "dance.mp4": make_video(4, 480, 360)}


class Creates(msgspec.Struct):
    """The creates of one order: how many were sent, and how many of them were answered 2xx."""

    sent: int = 0
    accepted: int = 0


class Day:
    """One simulated day, and what was seen from outside the product."""

    def __init__(self, seed: int, folder: Path, tasks: int, loop: VirtualLoop) -> None:
        self.loop = loop
        self.plan: Plan = draw(seed, tasks)
        self.seed = seed
        self.path = folder / "relay.db"
        self.network = Network(f"network-{seed}")
        self.network.weather = self._weather
        self.network.witness = self._witness
        self.endpoints = Endpoints(self.plan, seed)
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.creates: dict[str, Creates] = defaultdict(Creates)
        self.acknowledged: dict[str, set[str]] = defaultdict(set)
        self.outcomes: dict[str, list[str]] = defaultdict(list)
        self._trace = hashlib.sha256()
        self._dice = random.Random(f"weather-{seed}")
        self._busy: dict[str, asyncio.Event] = {}
        self._users: set[asyncio.Task[None]] = set()
        self._environ = {
            "KLING_RELAY_LEDGER": f"sqlite:///{self.path}",
            "KLING_RELAY_KEYS": f"test:{KEY}",
            "KLING_RELAY_PUBLIC_URL": "http://relay.test",
            "KLING_RELAY_CONFIG": str(folder / "relay.toml"),
            "HOOK_SECRET": HOOK_SECRET,
            "KLING_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "KLING_API_KEY": "sandbox-key",
            "NOVITA_API_KEY": "sandbox-key",
            "KLING_BASE_URL": "http://kling.vendor.test/kling",
            "NOVITA_BASE_URL": "http://novita.vendor.test/novita",
        }
        (folder / "relay.toml").write_text(HOOKS)

    # -- the trace ----------------------------------------------------------------------------

    def note(self, *parts: object) -> None:
        """Add a step to the trace."""
        self._trace.update(f"{self.loop.time():.6f} {parts}\n".encode())

    def log(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        """Take a log event of the product into the trace; an error is a finding."""
        self.note(method, sorted(event.items()))
        self.counts[f"log {event['event']}"] += 1
        if method in ("error", "critical", "exception") or event.get("exc_info"):
            self.findings.append(f"an error was logged at {self.loop.time():.0f} s: {event!r}")
        raise structlog.DropEvent

    @property
    def digest(self) -> str:
        """The digest of all steps so far."""
        return self._trace.hexdigest()

    # -- the network --------------------------------------------------------------------------

    def _weather(self, exchange: Exchange) -> str | None:
        now_s, host = self.loop.time(), exchange.host
        self._notice(exchange)
        if now_s >= DAY_S:
            return None
        place = exchange.path.strip("/") if host == "hooks.test" else host
        outage = self.plan.trouble(place, now_s)
        if outage is not None and outage != "429":
            return outage
        draw = self._dice.random()
        for trouble, rate in RATES[host].items():
            if draw < rate:
                return trouble
            draw -= rate
        return None

    def _notice(self, exchange: Exchange) -> None:
        """Let a restart happen now, in the midst of work: a submitter's create, a callback, a delivery, a poll."""
        name = exchange.sender.name.rpartition("-")[0]
        if exchange.host == "relay.test":
            name = "receiver"
        if name in self._busy and exchange.host != "media.test":
            self._busy[name].set()

    def _witness(self, exchange: Exchange) -> None:
        self.note(exchange.sender.name, exchange.method, exchange.host, exchange.path, exchange.status)
        if exchange.host == "relay.test":
            self._witness_callback(exchange)
        elif exchange.host.endswith("vendor.test"):
            if exchange.method == "POST":
                self._witness_create(exchange)
            else:
                self.counts[f"queries by {exchange.sender.name.rpartition('-')[0]}"] += 1

    def _witness_create(self, exchange: Exchange) -> None:
        found = _OF_TASK.search(exchange.body)
        assert found is not None
        creates = self.creates[found[2].decode()]
        creates.sent += 1
        creates.accepted += 200 <= exchange.status < 300

    def _witness_callback(self, exchange: Exchange) -> None:
        """Check that an acknowledged callback is durable: by now, in the file."""
        self.counts["callbacks sent"] += 1
        if not 200 <= exchange.status < 300:
            return
        self.counts["callbacks acknowledged"] += 1
        found = _OF_TASK.search(exchange.path.encode())
        assert found is not None
        vendor, id = found[1].decode(), found[2].decode()
        result = dict(exchange.headers)[b"kling-relay-result"].decode()
        if result == "quarantined":
            self.findings.append(f"a callback about {id} was put into quarantine")
        row = self._db.execute("SELECT status, poll_at_ms FROM tasks WHERE external_task_id = ?", (id,)).fetchone()
        body = msgspec.json.decode(exchange.body)
        reported = ENDED.get(body["status"], body["status"]) if vendor == "kling" else "end"
        self.acknowledged[id].add(reported)
        if row is None:
            self.findings.append(f"a callback about {id} was acknowledged, and the ledger has no such task")
        elif vendor == "kling" and row[0] != reported and RANK.get(row[0], 5) <= RANK.get(reported, 4):
            self.findings.append(f"{reported!r} of {id} was acknowledged, and the ledger has {row[0]!r}")
        elif vendor != "kling" and row[0] not in ("succeed", "failed") and row[1] is None:
            self.findings.append(f"the end of {id} was acknowledged, and the ledger has {row[0]!r}, and no poll is due")

    # -- the day ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live through the day, and two more days without faults."""
        disk = Disk(self.path, f"disk-{self.seed}")
        settings = load_receiver_settings(self._environ)
        vendor_clock = SimulatedClock(self.loop, f"vendors-{self.seed}")
        self.sandboxes = open_vendors(self.network, vendor_clock, self.seed)
        for number, sandbox in enumerate(self.sandboxes.values()):
            sandbox.set_faults(msgspec.structs.replace(FAULTS, seed=self.seed * 10 + number))
        outside = Process("outside")
        self.network.servers["hooks.test"] = Server(self.endpoints, outside)
        self.network.servers["media.test"] = Server(media_server(make_media()), outside)

        def machine(kind: type[Machine], name: str) -> Machine:
            clock = SimulatedClock(self.loop, f"{name}-{self.seed}")
            made = kind(name, self.network, disk, settings, clock)
            made.open()
            return made

        receiver = machine(Receiver, "receiver")
        self.submitters = {name: machine(SubmitterMachine, name) for name in SUBMITTERS}
        self._db = sqlite3.connect(self.path)
        machines: dict[str, Machine] = {"receiver": receiver, **self.submitters}
        troubles = [
            *(asyncio.create_task(self._restart(machines[name], name)) for name in machines),
            asyncio.create_task(self._jump(receiver)),
            asyncio.create_task(self._pace()),
        ]
        await self._order()
        await self._until(DAY_S + HOUR_S)
        self.endpoints.is_calm = True
        for sandbox in self.sandboxes.values():
            sandbox.set_faults(Faults())
        await asyncio.gather(*troubles)
        await asyncio.gather(*self._users)
        await self._until(END_S)
        self.commits = disk.commits
        for one in machines.values():
            await one.stop(is_killed=False)

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.loop.time()))

    async def _restart(self, machine: Machine, name: str) -> None:
        for restart in self.plan.restarts[name]:
            await self._until(restart.at_s)
            self._busy[name] = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._busy[name].wait(), HOUR_S)
            await asyncio.sleep(restart.after_s)
            self.note("stop", name, restart.is_killed)
            self.counts["fault kill" if restart.is_killed else "fault restart"] += 1
            await machine.stop(is_killed=restart.is_killed)
            await asyncio.sleep(restart.down_s)
            self.note("open", name)
            machine.open()

    async def _jump(self, receiver: Machine) -> None:
        steps = [(start_s, offset_s) for (start_s, _), offset_s in self.plan.jumps]
        steps += [(end_s, -offset_s) for (_, end_s), offset_s in self.plan.jumps]
        for at_s, offset_s in sorted(steps):
            await self._until(at_s)
            self.note("jump", offset_s)
            self.counts["fault clock jump"] += 1
            receiver.clock.offset_s += offset_s

    async def _pace(self) -> None:
        for pace_s in self.plan.paces_s:
            for sandbox in self.sandboxes.values():
                sandbox.pace_s = pace_s
            await asyncio.sleep(HOUR_S)

    # -- users --------------------------------------------------------------------------------

    async def _order(self) -> None:
        """Submit every order at its time."""
        for order in self.plan.orders:
            await self._until(order.at_s)
            self._start_user(order, 0.0)
            if order.repeat_after_s is not None:
                self._start_user(order, order.repeat_after_s)

    def _start_user(self, order: Order, delay_s: float) -> None:
        user = asyncio.create_task(self._submit(order, delay_s))
        self._users.add(user)
        user.add_done_callback(self._users.discard)

    async def _submit(self, order: Order, delay_s: float) -> None:
        """Submit an order until it is accepted, as an application does that notes its orders."""
        dice = random.Random(f"{self.seed} {order.id} {delay_s}")
        await asyncio.sleep(delay_s)
        request = MotionControl(
            image="http://media.test/girl.png",
            video="http://media.test/dance.mp4",
            character_orientation="video",
            prompt="on a beach",
            vendor=order.vendor,
            external_task_id=order.id,
        )
        for _ in range(order.patience + 1):
            outcome = await self._submit_once(order, request, dice.choice(SUBMITTERS))
            self.outcomes[order.id].append(outcome)
            self.note("submitted", order.id, outcome)
            self.counts[f"submit {outcome}"] += 1
            if outcome == "ok":
                return
            await asyncio.sleep(dice.uniform(1, 30) if outcome == "stopped" else dice.uniform(120, 1800))

    async def _submit_once(self, order: Order, request: MotionControl, name: str) -> str:
        machine = self.submitters[name]
        assert isinstance(machine, SubmitterMachine)
        process = await machine.up()
        submitting = machine.submit(process, request)
        await asyncio.wait([submitting])
        if submitting.cancelled():
            return "stopped"
        error = submitting.exception()
        if isinstance(error, SubmissionUnknown | VendorRefused):
            return type(error).__name__
        if isinstance(error, LedgerUnavailable) and machine.process is not process:
            return "stopped"
        if error is not None:
            self.findings.append(f"submit({order.id}) raised {error!r}")
            return "error"
        if order.waits:
            waiting = process.start(submitting.result().result())
            await asyncio.wait([waiting])
            if not waiting.cancelled() and waiting.exception() is None:
                self.counts["waited"] += 1
                self.outcomes[order.id].append(f"result {waiting.result().status.value}")
        return "ok"


def run_day(seed: int, folder: Path, tasks: int = TASKS) -> tuple[Round, str]:
    """Simulate a day; return the round, and the digest of its trace."""
    begun_s = time.perf_counter()
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    log.send_to(lambda logger, method, event: day.log(logger, method, event))
    try:
        with woken_by_commits(), asyncio.Runner(loop_factory=VirtualLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, VirtualLoop)
            day = Day(seed, folder, tasks, loop)
            runner.run(day.run())
            simulated_s = time.perf_counter() - begun_s
            gc.collect()  # an exception that no code retrieved is reported when its task is collected
    finally:
        structlog.reset_defaults()
        gc.set_threshold(*thresholds)
    found = day_check.check(day)
    counts = day_check.counts(day)
    counts["seconds of simulation"] = round(simulated_s)
    return Round(counts, found), day.digest


def run(seed: int, folder: Path) -> Round:
    """Run a round: a day with 10,000 tasks."""
    done, digest = run_day(seed, folder)
    print(f"day, seed {seed}: trace {digest}", flush=True)
    return done
