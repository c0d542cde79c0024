"""Part `kills`: SIGKILL of submitters and receivers at named steps and random instants, under load.

The vendor's stand-in and the hook live in this process and survive. A receiver's process contains the endpoint, the
worker, the poller and the archiver. By the seed's turn: SQLite, PostgreSQL, and two receivers on one ledger; every
fourth round also jumps the clock of each new receiver by an hour, and of each submitter by less than a minute.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from submitter.sandbox.app import create_sandbox
from submitter.sandbox.faults import Faults
from submitter.sandbox.kling import KlingSandbox
from submitter.sandbox.media import make_image, make_video
from submitter.sandbox.server import all_listening, free_socket
from submitter.sandbox.studio import MediaRules, RenderRequest, Studio
from tests.conformance.brokers import free_port, is_listening
from tests.torture.check import Acknowledged, check
from tests.torture.children import Kill, start_receiver, start_submitter
from tests.torture.engines import PostgresStore, has_postgres
from tests.torture.parts import Round
from tests.torture.steps import RECEIVER, SUBMITTER, Step
from tests.torture.store import Stored, read_store
from tests.torture.witness import Witness
from tests.world import KEY, WEBHOOK_SECRET

Engine = Literal["sqlite", "postgres", "two receivers"]
ENGINES: tuple[Engine, ...] = ("sqlite", "postgres", "two receivers")
BATCH = 5
HOUR_MS = 3_600_000
SKEW_MS = 40_000  # whose task the vendor has is decided by time, within a minute (ADOPTION_SKEW_MS)
HOOKS = ("first", "second")
RESULT = b"a result that is not rendered, because rendering takes the processor from what is tested"


class QuickStudio(Studio):
    """Accepts all media, and has the same result for all."""

    async def check(self, request: RenderRequest, rules: MediaRules) -> tuple[bytes, bytes]:
        return b"", b""

    async def render(self, request: RenderRequest, image: bytes, video: bytes) -> tuple[bytes, float]:
        return RESULT, 4.0


class Storm:
    """A vendor and hooks that survive, and the processes that do not."""

    def __init__(
        self, seed: int, folder: Path, engine: Engine, kills: int, *, jumps: bool, sabotage: Callable[[], None] | None
    ) -> None:
        self.random = random.Random(seed)
        self.folder, self.engine, self.jumps, self.sabotage = folder, engine, jumps, sabotage
        self.kills_left = kills
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.submitted: list[Mapping[str, Any]] = []
        self.sandbox = KlingSandbox(pace_s=0.05, slots=100_000, secret=WEBHOOK_SECRET)
        self.sandbox._studio = QuickStudio()
        self.witness = Witness(self.sandbox)
        self.ports = [free_port() for _ in range(2 if engine == "two receivers" else 1)]
        self.ledger_url = f"sqlite:///{folder / 'relay.db'}"
        if engine == "postgres":
            self._schema = PostgresStore()
            self.ledger_url = self._schema.url
        (folder / "archive").mkdir()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        media = {"girl.png": make_image(400, 600), "dance.mp4": make_video(4, 480, 360)}

        async def serve_media(request: Request) -> Response:
            return Response(media[request.path_params["name"]])

        hook_socket, self.hook_url = free_socket()
        sandbox_socket, sandbox_url = free_socket()
        routes = [
            Mount("/media", routes=[Route("/{name}", serve_media)]),
            Route("/{hook}", self.witness.receive, methods=["POST"]),
        ]
        schedule = f"schedule = [0{', 0.2' * 300}]\ntimeout_s = 2\n"
        tables = [f'[[hook]]\nname = "{hook}"\nurl = "{self.hook_url}/{hook}"\n{schedule}' for hook in HOOKS]
        archive = f'[[hook]]\nname = "archive"\nurl = "archive:{self.folder / "archive"}"\n{schedule}'
        (self.folder / "relay.toml").write_text("\n".join([*tables, archive]))
        sandbox = create_sandbox([self.sandbox], base_url=sandbox_url)
        async with all_listening((Starlette(routes=routes), hook_socket), (sandbox, sandbox_socket)):
            self.environ = self.sandbox.environ() | {
                "KLING_RELAY_LEDGER": self.ledger_url,
                "KLING_RELAY_CONFIG": str(self.folder / "relay.toml"),
                "KLING_RELAY_KEYS": f"test:{KEY}",
                "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
                "KLING_RELAY_POLL_AFTER_S": "3",
            }
            try:
                yield
            finally:
                if self.engine == "postgres":
                    await self._schema.drop()

    # -- the processes that are killed --------------------------------------------------------

    def _kill_of(self, steps: Mapping[str, tuple[Step, ...]]) -> Kill | None:
        """Return a named step to be killed at, or (half of the time) None: at a random instant."""
        if self.random.random() < 0.5:
            return None
        name = self.random.choice(list(steps))
        return Kill(name, steps[name], self.random.choice((1, 1, 2, 3, 5, 8)))

    def _jump_ms(self, most_ms: int) -> int:
        return self.random.choice((0, most_ms, -most_ms)) if self.jumps else 0

    async def _until_killed(self, process: ForkServerProcess, kill: Kill | None, alive_s: float) -> bool:
        """Wait until the process ends or its time has come; return whether it was killed."""
        ended = asyncio.create_task(asyncio.to_thread(process.join))
        done, _ = await asyncio.wait({ended}, timeout=4 if kill else alive_s)
        if not done:
            process.kill()
            await ended
        was_killed = process.exitcode in (-9, 255)  # 255: killed before its fork could report its id
        if was_killed:
            self.kills_left -= 1
            self.counts["kills"] += 1
            where = kill.name if kill and done else "at a random instant"
            self.counts[f"killed {where}"] += 1
        return was_killed

    async def receiver(self, port: int) -> None:
        """Run a receiver, and kill it, until there were enough kills."""
        log = self.folder / f"receiver-{port}.log"
        log.touch()
        while self.kills_left > 0:
            kill = self._kill_of(RECEIVER)
            offset_ms = self._jump_ms(HOUR_MS)
            process = start_receiver(self.environ, port, log, kill=kill, offset_ms=offset_ms, sabotage=self.sabotage)
            alive_s = self.random.uniform(0, 1.5)
            if self.random.random() < 0.8:  # else: perhaps killed while it starts
                await self._until_listening(port, process)
            if not await self._until_killed(process, kill, alive_s):
                self.findings.append(f"a receiver ended by itself: {log.read_text()[-2000:]}")
                return

    async def _until_listening(self, port: int, process: ForkServerProcess) -> None:
        async with asyncio.timeout(30):
            while process.is_alive() and not is_listening(port):
                await asyncio.sleep(0.02)

    async def submitter(self, number: int, receiver_port: int) -> None:
        """Submit batches of requests, repeating each batch until it is accepted; kill the processes that do it."""
        log = self.folder / f"submitter-{number}.log"
        environ = self.environ | {"KLING_RELAY_PUBLIC_URL": f"http://127.0.0.1:{receiver_port}"}
        batch = 0
        while self.kills_left > 0:
            requests = [self._request(f"s{number}-{batch}-{n}") for n in range(BATCH)]
            self.submitted += requests
            batch += 1
            while self.kills_left > 0:
                kill = self._kill_of(SUBMITTER)
                process = start_submitter(environ, requests, log, kill=kill, offset_ms=self._jump_ms(SKEW_MS))
                alive_s = self.random.uniform(0.05, 0.6)
                if not await self._until_killed(process, kill, alive_s) and process.exitcode == 0:
                    break

    def _request(self, id: str) -> dict[str, Any]:
        media = f"{self.hook_url}/media"
        return {
            "image": f"{media}/girl.png",
            "video": f"{media}/dance.mp4",
            "character_orientation": "video",
            "external_task_id": id,
        }

    # -- recovery -----------------------------------------------------------------------------

    async def recover(self) -> Stored:
        """Submit everything once more, then run receivers whose clock is later and later, until all is settled."""
        log = self.folder / "recovery.log"
        log.touch()
        environ = self.environ | {"KLING_RELAY_PUBLIC_URL": f"http://127.0.0.1:{self.ports[0]}"}
        self.sandbox.set_faults(Faults())
        submitting = start_submitter(environ, self.submitted, log, kill=None, offset_ms=0)
        await asyncio.to_thread(submitting.join)
        if submitting.exitcode != 0:
            self.findings.append(f"the same requests are not accepted again: {log.read_text()[-3000:]}")
        for later in range(1, 40):
            offset_ms = later * 600_000
            process = start_receiver(environ, self.ports[0], log, kill=None, offset_ms=offset_ms)
            try:
                await self._until_listening(self.ports[0], process)
                for _ in range(20):
                    stored = await read_store(self.ledger_url)
                    if stored.is_settled:
                        return stored
                    await asyncio.sleep(0.1)
            finally:
                process.kill()
                await asyncio.to_thread(process.join)
        self.findings.append("the ledger is not settled six hours later")
        return stored


async def storm(
    seed: int,
    folder: Path,
    engine: Engine,
    kills: int,
    *,
    jumps: bool = False,
    sabotage: Callable[[], None] | None = None,
) -> Round:
    """Run one storm with about this many kills, recover, and check. `sabotage` breaks each receiver."""
    made = Storm(seed, folder, engine, kills, jumps=jumps, sabotage=sabotage)
    made.sandbox.set_faults(
        Faults(drop=0.1, repeat=0.1, reorder=0.1, forge=0.05, create_late=0.1, late_s=0.3, fail=0.1, seed=seed)
    )
    async with made.running():
        await asyncio.gather(
            *(made.receiver(port) for port in made.ports),
            *(made.submitter(number, made.ports[number % len(made.ports)]) for number in range(2)),
        )
        stored = await made.recover()
        # With a clock that jumps, the time of an event proves nothing.
        proven: list[Acknowledged] | None = [] if jumps else None
        made.findings += check(stored, made.witness.seen(HOOKS, folder / "archive", acknowledged=proven))
    made.counts |= {
        "tasks": len(stored.tasks),
        "events": len(stored.events),
        "callbacks acknowledged": len(made.witness.acknowledged),
        "hook requests": len(made.witness.received),
        f"rounds on {engine}{' with clock jumps' if jumps else ''}": 1,
    }
    return Round(made.counts, made.findings)


def run(seed: int, folder: Path) -> Round:
    """Run one round: an engine of those on this machine by turns, 250 kills."""
    engines = ENGINES if has_postgres() else tuple(engine for engine in ENGINES if engine != "postgres")
    engine = engines[seed % len(engines)]
    return asyncio.run(storm(seed, folder, engine, 250, jumps=seed % 4 == 0))
