"""The parts that tests are built from: real servers on loopback, real files, a clock that is set by hand."""

import asyncio
import base64
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import jsonschema
import msgspec
import pytest
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from receiver.app import ASYNCAPI
from receiver.service import build_app
from receiver.settings import ReceiverSettings, load_receiver_settings
from submitter.clock import Clock
from submitter.event import CONTENT_TYPE
from submitter.installed import vendors
from submitter.ledger import Ledger, open_ledger
from submitter.ledger.sqlite import SqliteLedger
from submitter.request import MotionControl
from submitter.sandbox.app import create_sandbox, sandbox_class
from submitter.sandbox.base import Sandbox
from submitter.sandbox.faults import Faults
from submitter.sandbox.kling_wire import ACCESS_KEY, SECRET_KEY
from submitter.sandbox.media import make_image, make_video
from submitter.sandbox.server import free_socket, listening
from submitter.submit import Submitter
from submitter.task import TaskStatus
from submitter.watch import SubmittedTask
from tests.conformance.aws_stand_ins import MINISTACK, run_ministack, run_moto
from tests.conformance.brokers import is_listening

# Shared machines are slow now and then: a property is about values, not about time.
hypothesis.settings.register_profile("relay", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("relay")

KEY = base64.b64encode(b"k" * 32).decode()
WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"w" * 32).decode()
HOOK_SECRET = "whsec_" + base64.b64encode(b"h" * 32).decode()


class HandClock(Clock):
    """A clock that stands still until it is moved. Ids and keys are still drawn."""

    def __init__(self, now_ms: int = 1_781_080_800_000) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms

    def now_s(self) -> float:
        return self.ms / 1000

    def chance(self) -> float:
        return 0.5

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


def needs(what: str, *, is_there: bool) -> None:
    """Skip with a reason where something is not there; fail where it must be (CI=true)."""
    if not is_there:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing, and CI must have it")
        pytest.skip(f"{what} is not on this machine")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with girl.png and dance.mp4 (4 s, with sound)."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "girl.png").write_bytes(make_image(400, 600))
    (folder / "dance.mp4").write_bytes(make_video(4, 480, 360))
    return folder


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SqliteLedger]:
    opened = SqliteLedger(tmp_path / "relay.db")
    yield opened
    await opened.close()


_described = yaml.safe_load(ASYNCAPI.read_text())
DESCRIBED = jsonschema.Draft7Validator(
    {"$ref": "#/components/schemas/event", "components": _described["components"]},
    format_checker=jsonschema.Draft7Validator.FORMAT_CHECKER,
)
"""Finds what is wrong with an event, by receiver/asyncapi.yaml."""


class Inbox:
    """A hook's endpoint: what it got, and what it answers. Also publishes a folder, at /files."""

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

    async def until(self, count: int, timeout_s: float = 20) -> None:
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
    """The vendors' sandboxes, a receiver and a hook on loopback, and the settings that join them."""

    def __init__(self, folder: Path, media: Path) -> None:
        self.folder = folder
        self.media = media
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
        await enter(listening(self.inbox.app(), self.hook_socket))
        await enter(listening(sandbox, sandbox_socket))
        if receiver:
            await enter(listening(build_app(self.settings), receiver_socket))
        else:
            receiver_socket.close()
        self.submitter = await enter(
            Submitter(
                self.settings.common,
                self.open_ledger(),
                look_for_s=(0.0, 0.05, 0.1),
                sending_lease_s=1.0,
            )
        )

    @property
    def settings(self) -> ReceiverSettings:
        return load_receiver_settings(self.environ)

    def stand_in(self, vendor: str) -> Sandbox:
        """Have a vendor's sandbox in this world, and return it."""
        if vendor not in self.sandboxes:
            made = sandbox_class(vendor)(pace_s=0.02, slots=1000, secret=WEBHOOK_SECRET)
            self.sandboxes[vendor] = made
        return self.sandboxes[vendor]

    def use_v1(self) -> None:
        """Use a key pair, and so the older API."""
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

    def open_ledger(self) -> Ledger:
        return open_ledger(self.environ["KLING_RELAY_LEDGER"])


@pytest.fixture
def ledger_url(tmp_path: Path) -> str:
    """Where a world keeps its ledger; a module may have several."""
    return f"sqlite:///{tmp_path / 'relay.db'}"


@pytest.fixture
async def world(tmp_path: Path, media: Path, ledger_url: str) -> AsyncIterator[World]:
    """A world that is not started yet, so that a test can set it up."""
    made = World(tmp_path, media)
    made.environ["KLING_RELAY_LEDGER"] = ledger_url
    async with made.stack:
        yield made
    assert made.inbox.undescribed == []  # every event is as asyncapi.yaml says


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10, trust_env=False) as made:
        yield made


async def postgres_schema() -> AsyncIterator[str]:
    """Give a ledger's URL on a real PostgreSQL, with a schema of its own."""
    import asyncpg

    server = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")
    needs("PostgreSQL", is_there="TEST_POSTGRES_URL" in os.environ or is_listening(5432))
    schema = f"relay_{uuid.uuid4().hex[:12]}"
    yield f"{server}?schema={schema}"
    db = await asyncpg.connect(server)
    await db.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
    await db.close()


postgres_url = pytest.fixture(postgres_schema, name="postgres_url")
another_postgres_url = pytest.fixture(postgres_schema, name="another_postgres_url")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """AWS's stand-in, by its URL."""
    with run_moto() as url:
        yield url


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another stand-in for AWS, by its URL."""
    needs("ministack (make install)", is_there=MINISTACK.exists())
    with run_ministack(tmp_path_factory.mktemp("ministack")) as url:
        yield url


@pytest.fixture
def dynamodb_url(ministack: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A ledger's URL on a stand-in for DynamoDB, with a table of its own."""
    use_aws(ministack, monkeypatch)
    return f"dynamodb://relay-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def aws(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The settings by which AWS's clients find its stand-in, whose URL this is."""
    return use_aws(moto, monkeypatch)


def use_aws(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let AWS's clients find the stand-in at this URL, and return it."""
    values = {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return url


@pytest.fixture(autouse=True)
def no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests see no settings but their own."""
    for name in os.environ:
        if name.startswith(tuple(f"{prefix.upper()}_" for prefix in vendors())):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


async def run_many(world: World, count: int, vendor: str = "kling") -> dict[str, int]:
    """Submit `count` tasks with lost, repeated and reordered reports; check every promise; return counts."""
    sandbox = world.stand_in(vendor)
    # Where no end needs confirming, only the silent are asked about: reports may be late by the load alone.
    world.environ["KLING_RELAY_POLL_AFTER_S"] = str(max(10 if vendor == "kling" else 5, count // 40))
    sandbox.pace_s = 0.05
    sandbox.slots = 10_000
    await world.start()
    request = world.request(vendor=vendor)
    first = await world.submitter.submit(request)  # the result is rendered once, before the rush
    await first.result(timeout=60)
    world.faults(drop=0.1, repeat=0.1, reorder=0.1, forge=0.1, hang_up=0.01, seed=7)
    a_few = asyncio.Semaphore(20)  # so that a task's reports are late by the faults, and not by the load

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
    silent = [job for job in sandbox.jobs.values() if "succeeded:200" not in job.callbacks]
    asked = [job for job in sandbox.jobs.values() if job.queries]
    if world.settings.confirm[vendor] == "never" and sandbox.counts["streams"] == 0:  # nobody else is asked about
        assert {job.id: job.callbacks for job in asked} == {job.id: job.callbacks for job in silent}
    await ledger.close()
    return {
        "tasks": count,
        "silent": len(silent),
        "polled": len(asked),
        "queries": sandbox.counts["queries"],
        "events": len(expected),
        "deliveries": len(world.inbox.requests),
    }
