"""Follow a task until it ends: progress line, result, exit status. For `submit --wait` and `tasks wait`."""

import asyncio
import os
import sys
from pathlib import Path

import click

from receiver.cli.console import echo, print_json, with_ledger
from submitter.clock import Clock
from submitter.event import task_data
from submitter.ledger import Ledger
from submitter.settings import Settings
from submitter.task import SETTLED, Task, TaskStatus

YEAR_S = 366 * 86400


class Seconds(click.ParamType[float]):
    """A number of seconds, at most a year."""

    name = "seconds"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> float:
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = -1
        if not 0 <= seconds <= YEAR_S:
            self.fail(f"{value!r} is no number of seconds from 0 to {YEAR_S}.", parameter, context)
        return seconds


SECONDS = Seconds()
OUTPUT = click.Path(path_type=Path, dir_okay=False)


def check_output(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Return the file that a path or a link leads to; refuse what cannot be written, before a task is paid for."""
    if path is None:
        return None
    if path == Path():
        raise click.BadParameter("'' is no file name")
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise click.BadParameter(f"{str(path)!r} is no regular file: the result is written beside it, then renamed")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise click.BadParameter(f"{str(path)!r} cannot be written: its folder must exist and be writable")
    return target


async def follow(settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool) -> int:
    """Wait until a task ends, show its progress, and return the exit status: 0 only for `succeed`.

    `timeout` in seconds (None: no limit). `output` is the file that the first result video is saved to.
    """
    try:
        return await with_ledger(settings, lambda ledger: _follow(ledger, settings, task, timeout, output, as_json))
    except asyncio.CancelledError:  # Ctrl-C
        command = f"kling-relay tasks wait {task.external_task_id}"
        click.echo(f"\ninterrupted; the task continues, and is billed. Wait again: {command}", err=True)
        raise


async def _follow(
    ledger: Ledger, settings: Settings, task: Task, timeout: float | None, output: Path | None, as_json: bool
) -> int:
    clock = Clock()
    started_s = clock.monotonic_s()
    configured = settings.vendors.get(task.vendor)
    has_callbacks = task.expects_callback and configured is not None and configured.callbacks is not False
    # Without callbacks the task is polled from here: `serve` may not be running.
    polling = None if has_callbacks else asyncio.create_task(_poll_until_cancelled(ledger, settings))
    live = sys.stderr.isatty()
    line = "\r" if live else ""
    shown: TaskStatus | None = None
    try:
        while True:
            version = ledger.version()
            task = await ledger.get(task.external_task_id)
            elapsed_s = clock.monotonic_s() - started_s
            if task.status is not shown:
                shown = task.status
                click.echo(f"{line}{elapsed_s:6.1f} s  {shown.value:<20}", err=True)
            elif live:
                click.echo(f"\r{elapsed_s:6.1f} s  {shown.value} ...", err=True, nl=False)
            if task.status in SETTLED:
                break
            if timeout is not None and elapsed_s >= timeout:
                command = f"kling-relay tasks wait {task.external_task_id}"
                click.echo(f"timed out after {timeout:g} s; the task continues. Wait again: {command}", err=True)
                return 1
            await clock.wait_for_change(ledger, version, min(1.0, (timeout or 1e9) - elapsed_s))
    finally:
        if polling is not None:
            polling.cancel()
    return await _show_end(task, settings, output, as_json)


async def _show_end(task: Task, settings: Settings, output: Path | None, as_json: bool) -> int:
    if as_json:
        print_json(task_data(task))
    elif task.status is TaskStatus.SUCCEED:
        for video in task.videos:
            echo(video.url)
        cost = ", ".join(f"{charge.amount} {charge.currency or charge.kind}" for charge in task.cost)
        echo(f"cost: {cost or 'not stated by the vendor'}", err=True)
    else:
        echo(f"{task.status.value}: {task.status_message or 'no reason given'}", err=True)
    if task.status is TaskStatus.SUCCEED and output is not None:
        from submitter.media.download import download

        await download(task.videos[0].url, output, settings.allow_hosts)
        click.echo(f"saved {output}", err=True)
    return 0 if task.status is TaskStatus.SUCCEED else 1


async def _poll_until_cancelled(ledger: Ledger, settings: Settings) -> None:
    from receiver.poller import Poller
    from submitter.http import VendorHttp

    http = VendorHttp()
    poller = Poller(ledger, settings.vendors, http, Clock())
    try:
        while True:
            version = ledger.version()
            await ledger.wait_for_change(version, await poller.poll())
    finally:
        await http.close()
