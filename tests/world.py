"""A whole installation on loopback: the vendors' sandboxes, a receiver, a hook, and a submitter."""

import asyncio
import base64
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from receiver.app import ASYNCAPI
from receiver.service import build_app
from receiver.settings import ReceiverSettings, load_receiver_settings
from submitter.event import CONTENT_TYPE
from submitter.http import VendorHttp
from submitter.ledger import Ledger, open_ledger
from submitter.request import MotionControl
from submitter.sandbox.app import create_sandbox, sandbox_class
from submitter.sandbox.base import Sandbox
from submitter.sandbox.faults import Faults
from submitter.sandbox.kling_wire import ACCESS_KEY, SECRET_KEY
from submitter.sandbox.server import all_listening, free_socket
from submitter.submit import Submitter
from submitter.submitted_task import SubmittedTask
from submitter.task import Task, TaskStatus
from tests.clock import SkippingClock

KEY = base64.b64encode(b"k" * 32).decode()
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"w" * 32).decode()
HOOK_SECRET = "whsec_" + base64.b64encode(b"h" * 32).decode()


_described = yaml.safe_load(ASYNCAPI.read_text())
DESCRIBED = jsonschema.Draft7Validator(
    {"$ref": "#/components/schemas/event", "components": _described["components"]},
    format_checker=jsonschema.Draft7Validator.FORMAT_CHECKER,
)
"""Validates events by the schema in receiver/asyncapi.yaml."""


class Inbox:
    """A hook's endpoint: keeps requests, answers as set. Also publishes a folder at /files."""

    def __init__(self, files: Path) -> None:
        self.files = files
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[Response] = []
        self.undescribed: list[str] = []
        self._got = asyncio.Condition()

    async def receive(self, request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-type") == CONTENT_TYPE:
            self.undescribed.extend(error.message for error in DESCRIBED.iter_errors(msgspec.json.decode(body)))
        async with self._got:
            self.requests.append((dict(request.headers), body))
            self._got.notify_all()
        return self.answers.pop(0) if self.answers else Response(status_code=204)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(body) for _, body in self.requests]

    async def until(self, count: int, timeout_s: float = 60) -> None:
        async with asyncio.timeout(timeout_s), self._got:
            await self._got.wait_for(lambda: len(self.requests) >= count)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Mount("/files", StaticFiles(directory=self.files)),
                Route("/{path:path}", self.receive, methods=["POST", "HEAD"]),
            ]
        )


class World:
    """The vendors' sandboxes, a receiver and a hook on loopback, and the settings that connect them."""

    def __init__(self, folder: Path, media: Path) -> None:
        self.folder = folder
        self.media = media
        self.clock = SkippingClock()
        self.inbox = Inbox(media)
        self.sandboxes: dict[str, Sandbox] = {}
        self.kling = self.stand_in("kling")
        self.stack = AsyncExitStack()
        self.environ = {
            "KLING_RELAY_LEDGER": f"sqlite:///{folder / 'relay.db'}",
            "KLING_RELAY_KEYS": f"test:{KEY}",
            "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
            "KLING_RELAY_MEDIA_STORE": str(folder / "published"),
            "KLING_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "HOOK_SECRET": HOOK_SECRET,
            "KLING_RELAY_CONFIG": str(folder / "relay.toml"),
        }
        self.hook_socket, self.hook_url = free_socket()
        self.stack.callback(self.hook_socket.close)
        self.hooks = f'[[hook]]\nname = "inbox"\nurl = "{self.hook_url}/events"\nsecret = "env:HOOK_SECRET"\n'

    async def start(self, *, receiver: bool = True) -> None:
        sandbox_socket, self.sandbox_url = free_socket()
        receiver_socket, self.receiver_url = free_socket()
        sandbox = create_sandbox(self.sandboxes.values(), base_url=self.sandbox_url)
        for one in self.sandboxes.values():
            self.environ = one.environ() | self.environ
        if "KLING_ACCESS_KEY" in self.environ:
            del self.environ["KLING_API_KEY"]
        self.environ.setdefault("KLING_RELAY_PUBLIC_URL", self.receiver_url)
        (self.folder / "relay.toml").write_text(self.hooks)
        enter = self.stack.enter_async_context
        apps = [(self.inbox.app(), self.hook_socket), (sandbox, sandbox_socket)]
        if receiver:
            apps.append((build_app(self.settings, clock=self.clock), receiver_socket))
        else:
            receiver_socket.close()
        await enter(all_listening(*apps))
        self.submitter = await enter(
            Submitter(
                self.settings.common,
                self.open_ledger(),
                look_for_s=(0.0, 0.05, 0.1),
                sending_lease_s=1.0,
                clock=self.clock,
            )
        )

    @property
    def settings(self) -> ReceiverSettings:
        return load_receiver_settings(self.environ)

    def stand_in(self, vendor: str) -> Sandbox:
        """Return a vendor's sandbox; create it at the first call."""
        if vendor not in self.sandboxes:
            made = sandbox_class(vendor)(pace_s=0.02, slots=1000, secret=WEBHOOK_SECRET, clock=self.clock)
            self.sandboxes[vendor] = made
        return self.sandboxes[vendor]

    def use_v1(self) -> None:
        """Use a key pair, which selects Kling's older API."""
        self.environ |= {"KLING_ACCESS_KEY": ACCESS_KEY, "KLING_SECRET_KEY": SECRET_KEY}

    def request(self, **changes: Any) -> MotionControl:
        fields: dict[str, Any] = {
            "image": self.media / "girl.png",
            "video": self.media / "dance.mp4",
            "character_orientation": "video",
            "prompt": "on a beach",
        }
        return MotionControl(**fields | changes)

    def faults(self, **faults: Any) -> None:
        for sandbox in self.sandboxes.values():
            sandbox.set_faults(Faults(**faults))

    def create_with(self, http: VendorHttp) -> None:
        """Send creates through another client, which is closed at the end."""
        self.submitter.creator.http = http
        self.stack.push_async_callback(http.close)

    async def skip_to_end(self, task: SubmittedTask) -> Task:
        """Skip time, in steps that leave the loops time to poll, until the task is settled; return it."""
        settled = asyncio.create_task(task.result())
        await self.clock.skip_until(settled.done, step_s=60)
        return await settled

    def open_ledger(self) -> Ledger:
        return open_ledger(self.environ["KLING_RELAY_LEDGER"])


async def run_many(world: World, count: int, vendor: str = "kling") -> dict[str, int]:
    """Submit `count` tasks while reports are lost, repeated, reordered and forged; check the results, return counts."""
    sandbox = world.stand_in(vendor)
    # Where no report needs confirming, only tasks without a callback may be polled, however slow this machine is.
    world.environ["KLING_RELAY_POLL_AFTER_S"] = str(max(10 if vendor == "kling" else 5, count // 40))
    sandbox.pace_s = 0.05
    sandbox.slots = 10_000
    await world.start()
    request = world.request(vendor=vendor)
    first = await world.submitter.submit(request)  # the sandbox renders the result once, before the load
    await first.result(timeout=60)
    world.faults(drop=0.1, repeat=0.1, reorder=0.1, forge=0.1, hang_up=0.01, seed=7)
    a_few = asyncio.Semaphore(20)  # reports are delayed by the faults, not by the load

    async def submit() -> SubmittedTask:
        async with a_few:
            return await world.submitter.submit(request)

    tasks = [first, *await asyncio.gather(*(submit() for _ in range(count - 1)))]
    done = await asyncio.gather(*(task.result(timeout=240) for task in tasks))
    assert {task.status for task in done} == {TaskStatus.SUCCEED}
    assert sandbox.counts["created"] == count
    ledger = world.open_ledger()
    expected: Counter[str] = Counter()
    for task in done:
        expected.update(event.id for event in await ledger.events(task.external_task_id))
    assert set(expected.values()) == {1}
    async with asyncio.timeout(60):
        while len({event["id"] for event in world.inbox.events}) < len(expected):
            await world.inbox.until(len(world.inbox.requests) + 1)
    assert {event["id"] for event in world.inbox.events} == set(expected)
    overdue = [job for job in sandbox.jobs.values() if "succeeded:200" not in job.callbacks]
    polled = [job for job in sandbox.jobs.values() if job.queries]
    if world.settings.confirm[vendor] == "never" and sandbox.counts["streams"] == 0:  # no other task is polled
        assert {job.id: job.callbacks for job in polled} == {job.id: job.callbacks for job in overdue}
    await ledger.close()
    return {
        "tasks": count,
        "overdue": len(overdue),
        "polled": len(polled),
        "queries": sandbox.counts["queries"],
        "events": len(expected),
        "deliveries": len(world.inbox.requests),
    }
