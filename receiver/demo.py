"""`kling-relay demo`: the whole road in one process, offline, on the embedded defaults."""

import asyncio
import base64
import sys
import time
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver import log
from receiver.service import build_app
from receiver.settings import load_receiver_settings
from receiver.signature import read_secret, verify
from submitter.callback_url import KEY_BYTES
from submitter.clock import Clock
from submitter.errors import SignatureInvalid
from submitter.event import task_data
from submitter.media import download
from submitter.request import MotionControl
from submitter.sandbox.app import create_sandbox, sandbox_class
from submitter.sandbox.media import make_image, make_video
from submitter.sandbox.server import free_socket, listening
from submitter.submit import Submitter
from submitter.task import TaskStatus

TIMEOUT_S = 60


class _Story:
    """Prints what happens as it happens: a structlog processor that tells instead of logging."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.counts = {"callback": 0, "stream event": 0, "poll": 0, "delivery": 0}

    def say(self, who: str, what: str) -> None:
        """Print one line."""
        click.echo(f"{time.monotonic() - self._begun:6.2f} s  {click.style(f'{who:<10}', bold=True)}{what}")

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        match event.get("event"):
            case "sandbox.task":
                tells = ": it tells us" if event["tells"] else ""
                self.say(event["vendor"], f"task {event['task_id']} is {event['status']}{tells}")
            case "task.changed" if event.get("source") == "callback":
                self.counts["callback"] += 1
                self.say("receiver", f"callback verified and stored: {event['status']}")
            case "callback.unchanged":
                self.counts["callback"] += 1
                self.say("receiver", f"callback verified: {event['status']}, which is known already")
            case "callback.doubted":
                self.counts["callback"] += 1
                self.say("receiver", f"callback verified: {event['status']}; unsigned, so the vendor is asked")
            case "stream.opened":
                self.say("receiver", f"listens to the event stream of {event['vendor']}")
            case "task.changed" if event.get("source") == "stream":
                self.counts["stream event"] += 1
                self.say("receiver", f"told by the event stream, and stored: {event['status']}")
            case "task.changed" if event.get("source") == "poll":
                self.counts["poll"] += 1
                self.say("receiver", f"asked the vendor, and stored: {event['status']}")
            case "task.changed":
                self.say("submitter", f"stored: {event['status']}, task_id {event['task_id']}")
            case "delivery.attempted":
                self.counts["delivery"] += event["result"] == "done"
                seconds = event["seconds"]
                self.say("receiver", f"told the hook {event['hook']} in {seconds * 1000:.0f} ms: {event['answer']}")
            case _ if method in ("warning", "error"):
                self.say("receiver", f"{event.get('event')}: {event.get('reason', '')}")
        raise structlog.DropEvent


async def run_demo(directory: Path, vendor: str) -> int:
    """Run the demo with a vendor's stand-in and return its exit status; all that it makes is in `directory`."""
    stand_in = sandbox_class(vendor)
    story = _Story()
    log.tell(story)
    directory.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    image, video, result = (directory / name for name in ("girl.png", "dance.mp4", "result.mp4"))
    await asyncio.to_thread(lambda: (image.write_bytes(make_image()), video.write_bytes(make_video())))
    story.say("demo", f"made {image} and {video}")

    sandbox_socket, sandbox_url = free_socket()
    receiver_socket, receiver_url = free_socket()
    hook_socket, hook_url = free_socket()
    vendor_secret, hook_secret, key = (base64.b64encode(clock.new_key(KEY_BYTES)).decode() for _ in range(3))
    config = directory / "relay.toml"
    sandbox = stand_in(pace_s=1.0, secret=f"whsec_{vendor_secret}")
    made = create_sandbox([sandbox], base_url=sandbox_url)
    config.write_text(f'[[hook]]\nname = "demo"\nurl = "{hook_url}/events"\nsecret = "env:DEMO_HOOK_SECRET"\n')
    settings = load_receiver_settings(
        {
            "KLING_RELAY_CONFIG": str(config),
            "KLING_RELAY_PUBLIC_URL": receiver_url,
            "KLING_RELAY_LEDGER": f"sqlite:///{directory / 'relay.db'}",
            "KLING_RELAY_KEYS": f"demo:{key}",
            "KLING_RELAY_MEDIA_STORE": str(directory / "media"),
            "KLING_RELAY_ALLOW_HOSTS": "127.0.0.1",
            "DEMO_HOOK_SECRET": f"whsec_{hook_secret}",
            **sandbox.environ(),
        }
    )
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(listening(_hook_app(f"whsec_{hook_secret}", told, story, clock), hook_socket))
        await enter(listening(made, sandbox_socket))
        await enter(listening(build_app(settings), receiver_socket))
        story.say("demo", f"sandbox {sandbox_url}, receiver {receiver_url}, hook {hook_url}")
        submitter = await enter(Submitter.from_settings(settings.common))
        request = MotionControl(
            image=image,
            video=video,
            character_orientation="video",
            prompt="on a beach",
            metadata={"order": "42"},
            vendor=vendor,
        )
        task = await submitter.submit(request)
        done = await task.result(timeout=TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            while (await told.get())["type"] != f"task.{done.status.value}":
                pass
        if done.status is TaskStatus.SUCCEED:
            await download(done.videos[0].url, result, settings.common.allow_hosts)
    if done.status is not TaskStatus.SUCCEED:
        click.echo(f"the demo's task ended as {done.status.value}: {done.status_message}", err=True)
        return 1
    click.echo()
    click.echo(msgspec.json.format(msgspec.json.encode(task_data(done)), indent=2).decode())
    click.echo()
    counts = story.counts
    summary = ", ".join(f"{what}: {count}" for what, count in counts.items())
    click.echo(f"{summary}. The result is {result}.")
    click.echo(f"Kept in {directory}/: relay.db (the ledger), relay.toml (the hook), media/ (the uploads).")
    ledger = f"KLING_RELAY_LEDGER=sqlite:///{directory / 'relay.db'}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "kling-relay" else "kling-relay"
    click.echo(f"Try next: {ledger} {command} tasks show {done.external_task_id}")
    click.echo(f"Then, with a key of {vendor}, the README's quickstart.")
    return 0


def _hook_app(secret: str, told: "asyncio.Queue[dict[str, Any]]", story: _Story, clock: Clock) -> Starlette:
    """A hook as its user would write it: verify, then believe."""
    secrets = [read_secret("demo", secret)]

    async def receive(request: Request) -> Response:
        body = await request.body()
        headers = dict(request.headers.raw)
        try:
            verify(secrets, headers, body, clock.now_s())
        except SignatureInvalid as error:
            return Response(str(error), 401)
        event = msgspec.json.decode(body)
        story.say("hook", f"signature verified: {event['type']} ({event['id']})")
        told.put_nowait(event)
        return Response(status_code=204)

    return Starlette(routes=[Route("/events", receive, methods=["POST"])])
