"""`kling-relay demo`: the whole pipeline in one process, offline, on the embedded defaults."""

import asyncio
import base64
import os
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

from receiver.cli.console import echo, run
from receiver.service import build_app
from receiver.settings import load_receiver_settings
from receiver.signature import read_secret, verify
from submitter import log
from submitter.callback_url import KEY_BYTES
from submitter.clock import Clock
from submitter.errors import SignatureInvalid
from submitter.event import task_data
from submitter.extras import install_command
from submitter.media.download import download
from submitter.request import MotionControl
from submitter.sandbox.server import free_socket, listening
from submitter.submit import Submitter
from submitter.task import TaskStatus

TIMEOUT_S = 60


@click.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Directory for all files: inputs, ledger, settings, result.",
)
@click.option("--vendor", default="kling", show_default=True, help="Vendor whose stand-in renders the task.")
def demo(directory: Path, vendor: str) -> None:
    """Run the whole pipeline offline: sandbox, receiver, hook, one task.

    Use it to see what kling-relay does before you have an account or a public URL. In one process it
    starts a vendor's stand-in (the sandbox), the receiver and a hook, submits a task, and prints each
    step until the hook has verified the event of its end. Nothing is billed. It needs the extra `sandbox`.

    \b
      kling-relay demo
      kling-relay demo --vendor novita --directory /tmp/demo
    """
    try:
        import submitter.sandbox.app  # noqa: F401 - fails if the extra is missing
    except ImportError as error:
        raise click.ClickException(f"{error}. Install the sandbox: {install_command('sandbox')}") from error
    sys.exit(run(run_demo(directory, vendor)))


def show(text: str = "") -> None:
    """Print a line; print nothing any more once the output is closed (`kling-relay demo | head`)."""
    try:
        click.echo(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Story:
    """Prints each step as a line: a structlog processor that turns log events into sentences, and drops them."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self.counts = {"callbacks": 0, "stream events": 0, "polls": 0, "deliveries": 0}

    def line(self, component: str, text: str) -> None:
        """Print one line: seconds since the start, the component, the text."""
        show(f"{time.monotonic() - self._started_s:6.2f} s  {click.style(f'{component:<10}', bold=True)}{text}")

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        match event.get("event"):
            case "sandbox.task":
                notifies = "; notifies the receiver" if event["notifies"] else ""
                self.line(event["vendor"], f"task {event['task_id']} is {event['status']}{notifies}")
            case "task.changed" if event.get("source") == "callback":
                self.counts["callbacks"] += 1
                self.line("receiver", f"callback verified and stored: {event['status']}")
            case "callback.unchanged":
                self.counts["callbacks"] += 1
                self.line("receiver", f"callback verified: {event['status']}; no change to store")
            case "callback.unconfirmed":
                self.counts["callbacks"] += 1
                self.line("receiver", f"callback URL verified: {event['status']}; unsigned, so a poll confirms it")
            case "stream.opened":
                self.line("receiver", f"connected to the event stream of {event['vendor']}")
            case "task.changed" if event.get("source") == "stream":
                self.counts["stream events"] += 1
                self.line("receiver", f"stream event received and stored: {event['status']}")
            case "task.changed" if event.get("source") == "poll":
                self.counts["polls"] += 1
                self.line("receiver", f"vendor polled, answer stored: {event['status']}")
            case "task.changed":
                self.line("submitter", f"task stored: {event['status']}, task_id {event['task_id']}")
            case "delivery.attempted":
                self.counts["deliveries"] += event["result"] == "done"
                outcome = "notified" if event["result"] == "done" else "not notified"
                milliseconds = event["seconds"] * 1000
                self.line("receiver", f"hook {event['hook']} {outcome} in {milliseconds:.0f} ms: {event['answer']}")
            case _ if method in ("warning", "error"):
                self.line("receiver", f"{event.get('event')}: {event.get('reason', '')}")
        raise structlog.DropEvent


async def run_demo(directory: Path, vendor: str) -> int:
    """Run the demo with a vendor's stand-in, write all files to `directory`, and return the exit status."""
    from submitter.sandbox.app import create_sandbox, sandbox_class
    from submitter.sandbox.media import make_image, make_video

    stand_in_type = sandbox_class(vendor)
    story = _Story()
    log.send_to(story)
    directory.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    image, video, result = (directory / name for name in ("girl.png", "dance.mp4", "result.mp4"))
    await asyncio.to_thread(lambda: (image.write_bytes(make_image()), video.write_bytes(make_video())))
    story.line("demo", f"created {image} and {video}")

    sandbox_socket, sandbox_url = free_socket()
    receiver_socket, receiver_url = free_socket()
    hook_socket, hook_url = free_socket()
    vendor_secret, hook_secret, key = (base64.b64encode(clock.new_key(KEY_BYTES)).decode() for _ in range(3))
    config = directory / "relay.toml"
    sandbox = stand_in_type(pace_s=1.0, secret=f"whsec_{vendor_secret}")
    sandbox_app = create_sandbox([sandbox], base_url=sandbox_url)
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
    received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(listening(_hook_app(f"whsec_{hook_secret}", received, story, clock), hook_socket))
        await enter(listening(sandbox_app, sandbox_socket))
        await enter(listening(build_app(settings), receiver_socket))
        story.line("demo", f"sandbox {sandbox_url}, receiver {receiver_url}, hook {hook_url}")
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
            while (await received.get())["type"] != f"task.{done.status.value}":
                pass
        if done.status is TaskStatus.SUCCEED:
            await download(done.videos[0].url, result, settings.common.allow_hosts)
    if done.status is not TaskStatus.SUCCEED:
        echo(f"the demo's task ended with status {done.status.value}: {done.status_message}", err=True)
        return 1
    show()
    show(msgspec.json.format(msgspec.json.encode(task_data(done)), indent=2).decode())
    show()
    counts = story.counts
    summary = ", ".join(f"{name}: {count}" for name, count in counts.items())
    show(f"{summary}. Result video: {result}.")
    show(f"Other files in {directory}/: relay.db (ledger), relay.toml (hook settings), media/ (uploads).")
    ledger = f"KLING_RELAY_LEDGER=sqlite:///{directory / 'relay.db'}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "kling-relay" else "kling-relay"
    show(f"Try next: {ledger} {command} tasks show {done.external_task_id}")
    show(f"To use {vendor} itself, set its credentials and follow the quickstart in the README.")
    return 0


def _hook_app(secret: str, received: "asyncio.Queue[dict[str, Any]]", story: _Story, clock: Clock) -> Starlette:
    """Return a hook's endpoint as its owner would write it: verify the webhook signature, then use the event."""
    secrets = [read_secret("demo", secret)]

    async def receive(request: Request) -> Response:
        body = await request.body()
        headers = dict(request.headers.raw)
        try:
            verify(secrets, headers, body, clock.now_s())
        except SignatureInvalid as error:
            return Response(str(error), 401)
        event = msgspec.json.decode(body)
        story.line("hook", f"signature verified: {event['type']} ({event['id']})")
        received.put_nowait(event)
        return Response(status_code=204)

    return Starlette(routes=[Route("/events", receive, methods=["POST"])])
