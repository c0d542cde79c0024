"""`kling-relay submit`, and following a task to its end."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from receiver.cli import print_json, run, with_ledger
from submitter.callback_url import redact
from submitter.clock import Clock
from submitter.errors import SubmissionUnknown
from submitter.event import task_data
from submitter.ledger import Ledger
from submitter.request import MotionControl
from submitter.settings import Settings, load_settings
from submitter.submit import Submitter
from submitter.task import SETTLED, Task, TaskStatus


def _metadata(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    metadata = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        metadata[key] = text
    return metadata


@click.command()
@click.option("--image", required=True, help="The character: a URL, a PNG or JPEG file, or base64.")
@click.option("--video", required=True, help="The motion: a URL, or (with a media store) an MP4 or MOV file.")
@click.option(
    "--orientation", required=True, type=click.Choice(["image", "video"]), help="Whose facing the result keeps."
)
@click.option(
    "--mode", type=click.Choice(["std", "pro"]), help="720p or 1080p. Default: the first that the vendor makes."
)
@click.option("--model", default="kling-v3", show_default=True, help="kling-v3 or kling-v2-6.")
@click.option("--prompt", default="", help="What else to say of the scene.")
@click.option("--negative-prompt", default="", help="What to avoid, where the vendor takes it.")
@click.option("--sound/--no-sound", default=True, show_default=True, help="Keep the reference video's sound.")
@click.option("--element-id", help="One element (kling-v3, orientation video).")
@click.option("--watermark", is_flag=True, help="Make a watermarked copy too.")
@click.option("--external-task-id", help="Your own id; repeating it never makes a second task. Default: a UUIDv7.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", callback=_metadata, help="Comes back in every event.")
@click.option("--vendor", default="kling", show_default=True, help="One, or several in the order to try: kling,novita.")
@click.option("--no-callback", is_flag=True, help="Follow the task by polling alone; needs no public URL.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit status 0 only for succeed.")
@click.option("--timeout", type=float, help="Seconds to wait at the most.")
@click.option("--output", type=click.Path(path_type=Path), help="Save the result video here (with --wait).")
@click.option("--dry-run", is_flag=True, help="Print the request that would be sent, and send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the task as an event's data does.")
def submit(
    image: str,
    video: str,
    orientation: str,
    sound: bool,
    no_callback: bool,
    wait: bool,
    timeout: float | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Send one task.

    \b
      kling-relay submit --image girl.png --video https://example.com/dance.mp4 \\
          --orientation video --mode pro --prompt "on a beach" --metadata order=42 --wait
      kling-relay submit --image girl.png --video dance.mp4 --orientation image --dry-run
    """
    request = MotionControl(
        image=image, video=video, character_orientation=orientation, keep_original_sound=sound, **rest
    )
    if output is not None and not wait:
        raise click.UsageError("--output needs --wait: without it there is no result to save yet")
    sys.exit(run(_submit(request, not no_callback, wait, timeout, output, dry_run, as_json)))


async def _submit(
    request: MotionControl,
    callback: bool,
    wait: bool,
    timeout: float | None,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    settings = load_settings()
    async with Submitter.from_settings(settings) as submitter:
        prepared = await submitter.prepare(request)
        for warning in prepared.warnings:
            click.echo(f"warning: {warning}", err=True)
        if dry_run:
            would = await submitter.request_of(prepared, callback=callback, publish=False)
            _print_request(would.method, would.url, would.body)
            return 0
        # Said before anything is sent: whoever is interrupted can ask again with the same id.
        click.echo(f"external_task_id {prepared.external_task_id}", err=True)
        try:
            task = (await submitter.submit_prepared(prepared, callback=callback)).task
        except SubmissionUnknown as error:
            if not wait:
                raise
            click.echo(f"warning: {error}", err=True)
            task = (await submitter.task(prepared.external_task_id)).task
    return await follow(settings, task, timeout, output, as_json) if wait else _show(task, as_json)


def _show(task: Task, as_json: bool) -> int:
    if as_json:
        print_json(task_data(task))
    else:
        click.echo(f"{task.status.value}  task_id {task.task_id}")
        click.echo(f"follow it: kling-relay tasks wait {task.external_task_id}", err=True)
    return 0


def _print_request(method: str, url: str, body: bytes) -> None:
    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and len(value) > 3000:
            return f"{value[:32]}... ({len(value)} characters of base64)"
        return redact(value) if isinstance(value, str) else value

    click.echo(f"{method} {url}")
    print_json(shorten(msgspec.json.decode(body)))


async def follow(settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool) -> int:
    """Wait for a task's end with a progress line, and return the exit status."""
    return await with_ledger(settings, lambda ledger: _follow(ledger, settings, task, timeout, output, as_json))


async def _follow(
    ledger: Ledger, settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool
) -> int:
    begun = time.monotonic()
    configured = settings.vendors.get(task.vendor)
    is_called = task.is_told and configured is not None and configured.callbacks is not False
    polling = None if is_called else asyncio.create_task(_poll_meanwhile(ledger, settings))
    live = sys.stderr.isatty()
    line = "\r" if live else ""
    said: TaskStatus | None = None
    try:
        while True:
            mark = ledger.mark()
            task = await ledger.get(task.external_task_id)
            elapsed_s = time.monotonic() - begun
            if task.status is not said:
                said = task.status
                click.echo(f"{line}{elapsed_s:6.1f} s  {said.value:<20}", err=True)
            elif live:
                click.echo(f"\r{elapsed_s:6.1f} s  {said.value} ...", err=True, nl=False)
            if task.status in SETTLED:
                break
            if timeout is not None and elapsed_s >= timeout:
                waited = f"no end after {timeout:g} s; the task goes on: kling-relay tasks wait {task.external_task_id}"
                click.echo(waited, err=True)
                return 1
            await ledger.changed(mark, min(1.0, (timeout or 1e9) - elapsed_s))
    finally:
        if polling is not None:
            polling.cancel()
    return await _show_end(task, settings, output, as_json)


async def _show_end(task: Task, settings: Settings, output: Path | None, as_json: bool) -> int:
    if as_json:
        print_json(task_data(task))
    elif task.status is TaskStatus.SUCCEED:
        for video in task.videos:
            click.echo(video.url)
        cost = ", ".join(f"{charge.amount} {charge.currency or charge.kind}" for charge in task.cost)
        click.echo(f"cost: {cost or 'not said'}", err=True)
    else:
        click.echo(f"{task.status.value}: {task.status_message or 'no reason given'}", err=True)
    if task.status is TaskStatus.SUCCEED and output is not None:
        from submitter.media import download

        await download(task.videos[0].url, output, settings.allow_hosts)
        click.echo(f"saved {output}", err=True)
    return 0 if task.status is TaskStatus.SUCCEED else 1


async def _poll_meanwhile(ledger: Ledger, settings: Settings) -> None:
    from receiver.poll import Poller
    from submitter.http import VendorHttp

    http = VendorHttp()
    poller = Poller(ledger, settings.vendors, http, Clock())
    try:
        while True:
            mark = ledger.mark()
            await ledger.changed(mark, await poller.poll())
    finally:
        await http.close()
