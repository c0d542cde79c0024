"""The parts of a simulated day: vendors, the receiver and submitters as processes that stop and start again."""

import asyncio
import itertools
import random
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import httpx

from receiver.destinations.http import HttpDestination
from receiver.destinations.http_client import Answer, NoAnswer
from receiver.service import Service, create_service_app
from receiver.settings import ReceiverSettings
from submitter.http import VendorHttp
from submitter.request import MotionControl
from submitter.sandbox.app import create_sandbox
from submitter.sandbox.base import Sandbox
from submitter.sandbox.kling import KlingSandbox
from submitter.sandbox.novita import NovitaSandbox
from submitter.sandbox.studio import MediaRules, RenderRequest, Studio
from submitter.submit import Submitter
from submitter.submitted_task import SubmittedTask
from tests.torture.day_ledger import DayLedger, Disk
from tests.torture.day_network import Network, Server
from tests.torture.virtual_time import Process, SimulatedClock
from tests.world import WEBHOOK_SECRET


class EmptyStudio(Studio):
    """Accepts all media, and renders at once."""

    def __init__(self) -> None:
        """Open no connections."""

    async def check(self, request: RenderRequest, rules: MediaRules) -> tuple[bytes, bytes]:
        return b"image", b"video"

    async def render(self, request: RenderRequest, image: bytes, video: bytes) -> tuple[bytes, float]:
        return b"result", 5.0


class DayNovita(NovitaSandbox):
    """Novita's stand-in with ids by seed."""

    random = random.Random()

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128)))


def open_vendors(network: Network, clock: SimulatedClock, seed: int) -> dict[str, Sandbox]:
    """Open the vendors' stand-ins, each at a host."""
    sandboxes: dict[str, Sandbox] = {}
    for kind in (KlingSandbox, DayNovita):
        process = Process(kind.name)
        sandbox = kind(slots=150, secret=WEBHOOK_SECRET if kind is KlingSandbox else None, clock=clock)
        sandbox._studio = EmptyStudio()
        sandbox._client = network.client(process, timeout_s=15)
        host = f"{kind.name}.vendor.test"
        network.servers[host] = Server(create_sandbox([sandbox], base_url=f"http://{host}"), process)
        sandbox.base_url = f"http://{host}/{kind.name}"
        sandboxes[kind.name] = sandbox
    DayNovita.random = random.Random(f"novita-{seed}")
    return sandboxes


class Machine(ABC):
    """Runs one process of the system, which stops and starts again with the ledger file that it finds."""

    def __init__(self, name: str, network: Network, disk: Disk, settings: ReceiverSettings, clock: SimulatedClock):
        self.name = name
        self.clock = clock
        self._network = network
        self._disk = disk
        self._settings = settings
        self._numbers = itertools.count(1)
        self._started = asyncio.Event()
        self.process: Process | None = None

    def open(self) -> None:
        """Start the process."""
        process = Process(f"{self.name}-{next(self._numbers)}")
        ledger = self._disk.open()
        process.at_kill(ledger.kill)
        self._ledger = ledger
        self.process = process
        self._open(process, ledger)
        self._started.set()

    async def stop(self, *, is_killed: bool) -> None:
        """Stop the process; unless it is killed, in order."""
        process = self.process
        assert process is not None
        self.process = None
        self._started.clear()
        if not is_killed:
            await self._close(process)
        await process.kill()
        if is_killed:
            self._ledger.close_connections()

    async def up(self) -> Process:
        """Wait until the process runs; return it."""
        while self.process is None:
            await self._started.wait()
        return self.process

    @abstractmethod
    def _open(self, process: Process, ledger: DayLedger) -> None:
        """Build what runs in the process."""

    @abstractmethod
    async def _close(self, process: Process) -> None:
        """Stop it in order."""


class SimulatedHttp:
    """The hooks' HTTP client, in the in-process network."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], body_timeout_s: float) -> Answer:
        try:
            response = await self._client.post(url, content=body, headers=dict(headers))
        except httpx.HTTPError as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        return Answer(response.status_code, response.headers.get("retry-after"), response.content)

    async def close(self) -> None:
        await self._client.aclose()


class Receiver(Machine):
    """The receiver: its endpoints, and the worker with dispatcher and poller."""

    def _open(self, process: Process, ledger: DayLedger) -> None:
        settings = self._settings
        destinations = {
            hook.name: HttpDestination(hook, SimulatedHttp(self._network.client(process, hook.timeout_s)), frozenset())
            for hook in settings.hooks
        }
        self._service = Service(settings, ledger, self.clock, None, destinations)
        self._service.http = VendorHttp(transport=self._network.transport(process))
        app = create_service_app(self._service, clock=self.clock)
        self._network.servers["relay.test"] = Server(app, process)

        async def work() -> None:
            self._service.worker.start()

        process.start(work())

    async def _close(self, process: Process) -> None:
        del self._network.servers["relay.test"]
        await process.start(self._service.close())


class SubmitterMachine(Machine):
    """An application that submits."""

    def _open(self, process: Process, ledger: DayLedger) -> None:
        self._submitter = Submitter(
            self._settings.common,
            ledger,
            clock=self.clock,
            http=VendorHttp(transport=self._network.transport(process)),
        )
        self._submitter._media = self._network.client(process, timeout_s=15)

    def submit(self, process: Process, request: MotionControl) -> "asyncio.Task[SubmittedTask]":
        """Submit a request in the process."""
        return process.start(self._submitter.submit(request))

    async def _close(self, process: Process) -> None:
        await process.start(self._submitter.close())


def media_server(files: Mapping[str, bytes]) -> Any:
    """Return an ASGI app that serves files, with range requests."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        data = files[scope["path"].strip("/")]
        wanted = dict(scope["headers"])[b"range"].decode().removeprefix("bytes=")
        first, last = (int(number) for number in wanted.split("-"))
        part = data[first : last + 1]
        content_range = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        headers = [(b"content-range", content_range.encode()), (b"content-length", str(len(part)).encode())]
        await send({"type": "http.response.start", "status": 206, "headers": headers})
        await send({"type": "http.response.body", "body": part})

    return serve
