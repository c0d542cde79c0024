"""Part `network`: faults between every two parts of the running system, through a proxy at each of its connections.

A receiver and a user's program run as processes; Kling's stand-in (with its result videos) and two hooks run in this
one. While the faults last the program submits tasks; then they stop, and everything must end by itself, without a
restart: every task as the vendor ended it and paid once, every event at every hook, every result complete.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from submitter.sandbox.app import create_sandbox
from submitter.sandbox.base import Job
from submitter.sandbox.faults import Faults
from submitter.sandbox.kling import KlingSandbox
from submitter.sandbox.media import make_image, make_video
from submitter.sandbox.server import all_listening, free_socket
from submitter.sandbox.studio import MediaRules, RenderRequest, Studio
from tests.bench.servers import KEY, WEBHOOK
from tests.conformance.brokers import free_port, is_listening
from tests.torture.check import check
from tests.torture.children import start_process, start_receiver
from tests.torture.engines import POSTGRES, PostgresStore, has_postgres
from tests.torture.network_client import Work, prepare, work
from tests.torture.network_weather import FILM, Network, open_network
from tests.torture.parts import Missing, Round
from tests.torture.served import MEMORY_MAX_MIB, findings_in_log, memory_mib
from tests.torture.store import Stored, read_store
from tests.torture.witness import Witness, read_results

TASKS = 100
STORM_S = 10.0
SETTLE_S = 60.0
STOP_S = 30
ENOUGH = 0.8
"""The share of the tasks that the vendor must have before the faults may stop."""

HOOKS = ("first", "second")
SCHEDULE = f"schedule = [0{', 0.2' * 300}]\ntimeout_s = 2\n"


def result_of(id: str) -> bytes:
    """Return the result video of a task: another one, of another length, for each."""
    digest = hashlib.sha256(id.encode()).digest()
    return FILM + digest * (1000 + digest[0])


class QuickStudio(Studio):
    """Accepts all media, and renders at once."""

    async def check(self, request: RenderRequest, rules: MediaRules) -> tuple[bytes, bytes]:
        return b"", b""

    async def render(self, request: RenderRequest, image: bytes, video: bytes) -> tuple[bytes, float]:
        return result_of(str(request.external_id)), 4.0


class CarelessVendor(KlingSandbox):
    """Creates a second task for an id that it has, so that sending twice is paying twice; repeats callbacks."""

    retry_after_s = (2, 4, 8)

    async def create(
        self, request: RenderRequest, rules: MediaRules, *, api_version: int = 1, checks_late: bool = False
    ) -> Job:
        self.by_external_id.pop(str(request.external_id), None)
        return await super().create(request, rules, api_version=api_version, checks_late=checks_late)


class Installation:
    """The vendor and the hooks, the network between all parts, and the processes."""

    def __init__(self, seed: int, folder: Path, network: Network, sabotage: Callable[[], None] | None) -> None:
        self.seed, self.folder, self.network = seed, folder, network
        self.prepare = partial(prepare, sabotage)
        self.vendor = CarelessVendor(pace_s=0.2, slots=100_000, secret=f"whsec_{WEBHOOK}")
        self.vendor.set_faults(Faults(drop=0.1, repeat=0.1, fail=0.1, seed=seed))
        self.vendor._studio = QuickStudio()
        self.vendor._client = httpx.AsyncClient(timeout=0.8, trust_env=False, headers={"connection": "close"})
        self.witness = Witness(self.vendor)
        self.schema = PostgresStore()
        self.port = free_port()
        self.receiver_log, self.client_log = folder / "receiver.log", folder / "client.log"
        self.archive, self.saved = folder / "archive", folder / "saved"
        for one in (self.archive, self.saved):
            one.mkdir()

    async def open(self, stack: AsyncExitStack) -> None:
        """Start the vendor and the hooks, and lead every link to its other side."""
        media = {"girl.png": make_image(400, 600), "dance.mp4": make_video(4, 480, 360)}

        async def serve_media(request: Request) -> Response:
            return Response(media[request.path_params["name"]])

        async def receive(request: Request) -> Response:
            answer = await self.witness.receive(request)
            if request.path_params["hook"] == "second":
                answer.headers["connection"] = "close"  # so that each of its events may meet a fault of a connection
            return answer

        routes = [
            Mount("/media", routes=[Route("/{name}", serve_media)]),
            Route("/{hook}", receive, methods=["POST"]),
        ]
        (hooks_socket, self.media_url), (vendor_socket, vendor_url) = free_socket(), free_socket()
        sandbox = create_sandbox([self.vendor], base_url=self.network["media host"].url)
        await stack.enter_async_context(
            all_listening((Starlette(routes=routes), hooks_socket), (sandbox, vendor_socket))
        )
        vendor_port, hooks_port = urlsplit(vendor_url).port or 0, urlsplit(self.media_url).port or 0
        for name in ("submitter to vendor", "poller to vendor", "media host"):
            self.network[name].target = vendor_port
        for hook in HOOKS:
            self.network[f"receiver to {hook} hook"].target = hooks_port
        self.network["vendor to receiver"].target = self.port
        for name in ("submitter to ledger", "receiver to ledger"):
            server = urlsplit(POSTGRES)
            self.network[name].host, self.network[name].target = server.hostname or "", server.port or 5432
        stack.push_async_callback(self.schema.drop)

    def environ(self, part: str) -> dict[str, str]:
        """Return the settings of the `receiver` or the `submitter`, which reach everything through their links."""
        tables = [
            f'[[hook]]\nname = "{hook}"\nurl = "{self.network[f"receiver to {hook} hook"].url}/{hook}"\n{SCHEDULE}'
            for hook in HOOKS
        ]
        tables.append(f'[[hook]]\nname = "archive"\nurl = "archive:{self.archive}"\n{SCHEDULE}')
        config = self.folder / "relay.toml"
        config.write_text("\n".join(tables))
        ledger = urlsplit(self.schema.url)
        user, at, _ = ledger.netloc.rpartition("@")
        through = f"{user}{at}127.0.0.1:{self.network[f'{part} to ledger'].port}"
        vendor = self.network["submitter to vendor" if part == "submitter" else "poller to vendor"].url
        return self.vendor.environ() | {
            "KLING_BASE_URL": f"{vendor}/kling",
            "KLING_RELAY_LEDGER": ledger._replace(netloc=through).geturl(),
            "KLING_RELAY_PUBLIC_URL": self.network["vendor to receiver"].url,
            "KLING_RELAY_CONFIG": str(config),
            "KLING_RELAY_KEYS": f"bench:{KEY}",
            "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
            "KLING_RELAY_POLL_AFTER_S": "1",
            "KLING_RELAY_LOG": "json",
        }

    async def start_receiver(self) -> ForkServerProcess:
        """Start the receiver, and wait until it listens."""
        self.receiver_log.touch()
        process = start_receiver(
            self.environ("receiver"), self.port, self.receiver_log, kill=None, offset_ms=0, sabotage=self.prepare
        )
        async with asyncio.timeout(30):
            while not is_listening(self.port):
                if not process.is_alive():
                    raise RuntimeError(self.receiver_log.read_text()[-2000:])
                await asyncio.sleep(0.02)
        return process

    def start_client(self, tasks: int, storm_s: float) -> ForkServerProcess:
        """Start the user's program."""
        requests = [
            {
                "image": f"{self.media_url}/media/girl.png",
                "video": f"{self.media_url}/media/dance.mp4",
                "character_orientation": "video",
                "external_task_id": f"n-{number}",
            }
            for number in range(tasks)
        ]
        given = Work(requests, storm_s, self.saved, self.seed)
        return start_process(work, self.environ("submitter"), self.client_log, given, sabotage=self.prepare)

    async def settled(self, client: ForkServerProcess, settle_s: float) -> tuple[Stored, list[str]]:
        """Wait until the program has ended and the ledger is settled; return the ledger, and what is not."""
        end_s = asyncio.get_running_loop().time() + settle_s
        while True:
            stored = await read_store(self.schema.url)
            has_ended = client.exitcode is not None
            if (has_ended and stored.is_settled) or asyncio.get_running_loop().time() > end_s:
                break
            await asyncio.sleep(0.2)
        found = [] if stored.is_settled else [f"the ledger is not settled {settle_s:g} s after the last fault"]
        if not has_ended:
            found.append(f"the program still waits {settle_s:g} s after the last fault: {self._end(self.client_log)}")
        elif client.exitcode:
            found.append(f"the program ended with {client.exitcode}: {self._end(self.client_log)}")
        return stored, found

    def _end(self, log: Path) -> str:
        return log.read_text()[-1500:]

    def judge_results(self, stored: Stored) -> Iterator[str]:
        """Compare every copy of a result with the media host's."""
        archive = {name.removesuffix("/0.mp4"): content for name, content in read_results(self.archive).items()}
        saved = {name.removesuffix(".mp4"): content for name, content in read_results(self.saved).items()}
        succeeded = {id for id, task in stored.tasks.items() if task.status == "succeed"}
        for what, copies in (("archived", archive), ("downloaded", saved)):
            yield from (f"the result of {id} was not {what}" for id in sorted(succeeded - copies.keys()))
            for id, content in copies.items():
                if content != result_of(id):
                    yield (
                        f"the {what} result of {id} is not the media host's: {len(content)} bytes, not"
                        f" {len(result_of(id))}, beginning with {content[:40]!r}"
                    )


def unclear_reasons(log: bytes) -> list[str]:
    """Return the lines of a JSON log that report a failure without its reason."""
    found = []
    for line in log.splitlines():
        if not line.startswith(b"{"):  # `serve` says in plain words where it listens
            continue
        event = msgspec.json.decode(line, type=dict[str, object])
        reasons = [event[name] for name in ("reason", "answer") if name in event]
        if any(not str(reason).strip() or str(reason).rstrip().endswith(":") for reason in reasons):
            found.append(f"a failure is logged without a reason: {line[:300]!r}")
    return found[:3]


async def weather(
    seed: int,
    folder: Path,
    *,
    tasks: int = TASKS,
    storm_s: float = STORM_S,
    settle_s: float = SETTLE_S,
    sabotage: Callable[[], None] | None = None,
) -> Round:
    """Run one round, and check it. `sabotage` breaks the product in both processes."""
    done = Round()
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network(seed))
        made = Installation(seed, folder, network, sabotage)
        await made.open(stack)
        receiver = await made.start_receiver()
        stack.callback(receiver.kill)
        client = made.start_client(tasks, storm_s)
        stack.callback(client.kill)
        await network.storm(storm_s, lambda: made.vendor.counts["created"] >= ENOUGH * tasks)
        stored, found = await made.settled(client, settle_s)
        done.findings += found
        done.findings += check(stored, made.witness.seen(HOOKS, made.archive))
        done.findings += made.judge_results(stored)
        done.findings += await _end_of(receiver, done.counts)
        done.counts["creates without a clear answer"] = made.client_log.read_bytes().count(b"create.ambiguous")
    for log in (made.receiver_log.read_bytes(), made.client_log.read_bytes()):
        done.findings += findings_in_log(log) + unclear_reasons(log)
    done.counts.update(network.counts())
    done.counts.update(
        {
            "tasks": len(stored.tasks),
            "events": len(stored.events),
            "callbacks acknowledged": len(made.witness.acknowledged),
            "hook requests": len(made.witness.received),
            "repeats by the program": made.client_log.read_bytes().count(b"client.repeats"),
            "queries": made.vendor.counts["queries"],
        }
    )
    return done


async def _end_of(receiver: ForkServerProcess, counts: Counter[str]) -> list[str]:
    """Stop the receiver; return what is wrong with its memory and its end."""
    if not receiver.is_alive() or receiver.pid is None:
        return [f"the receiver ended by itself with {receiver.exitcode}"]
    most = memory_mib(receiver.pid)["VmHWM"]
    counts["max MiB"] = most
    found = [f"the receiver had {most} MiB, more than {MEMORY_MAX_MIB}"] if most > MEMORY_MAX_MIB else []
    receiver.terminate()
    await asyncio.to_thread(receiver.join, STOP_S)
    if receiver.exitcode not in (0, -15):
        found.append(f"the receiver ended with {receiver.exitcode} after SIGTERM")
    return found


def run(seed: int, folder: Path) -> Round:
    """Run one round: 100 tasks in 10 s of faults. Raises Missing where there is no PostgreSQL."""
    if not has_postgres():
        raise Missing("there is no PostgreSQL server")
    return asyncio.run(weather(seed, folder))
