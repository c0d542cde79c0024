"""`kling-relay tasks`: look at tasks, wait, settle what nobody knows, submit again, count the costs."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from receiver.cli import print_json, print_table, run, with_ledger
from receiver.cli_submit import follow
from submitter.clock import Clock
from submitter.costs import Total, totals
from submitter.event import Event, task_data, timestamp
from submitter.ledger import Ledger
from submitter.settings import load_settings
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus, Video

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def tasks() -> None:
    """Look at tasks, wait for them, settle them, submit them again, count their costs."""


@tasks.command("list")
@click.option("--status", type=click.Choice([status.value for status in TaskStatus]))
@click.option("--vendor")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--before", metavar="ID", help="Continue behind this task.")
@AS_JSON
def tasks_list(status: str | None, vendor: str | None, limit: int, before: str | None, as_json: bool) -> None:
    """List tasks, the newest first.

    \b
      kling-relay tasks list --status failed --json
    """
    wanted = None if status is None else TaskStatus(status)
    found = run(
        with_ledger(
            load_settings(),
            lambda ledger: ledger.tasks(status=wanted, vendor=vendor, before_id=before, limit=limit),
        )
    )
    rows = [task_data(task) for task in found]
    if as_json:
        print_json(rows)
    else:
        columns = ("external_task_id", "vendor", "status", "task_id", "created_at", "status_message")
        print_table(rows, columns, empty="no such tasks")


@tasks.command("show")
@click.argument("external_task_id")
@AS_JSON
def tasks_show(external_task_id: str, as_json: bool) -> None:
    """Show a task, its request and its events."""

    async def read(ledger: Any) -> tuple[Task, list[Event]]:
        return await ledger.get(external_task_id), await ledger.events(external_task_id)

    task, events = run(with_ledger(load_settings(), read))
    if as_json:
        print_json(task_data(task))
        return
    for name, value in task_data(task).items():
        if name not in ("videos", "cost", "metadata"):
            click.echo(f"{name:<18}{value or ''}")
    for video in task.videos:
        _show_video(video)
    for tried in task.tried:
        click.echo(f"{'refused by':<18}{tried.vendor}: {tried.reason}")
    for charge in task.cost:
        click.echo(f"{'cost':<18}{charge.amount} {charge.currency or charge.kind}")
    for group in ("metadata", "request"):
        for name, value in getattr(task, group).items():
            click.echo(f"{group + '.' + name:<34}{value}")
    if task.poll_at_ms is not None:
        click.echo(f"{'next poll':<18}{timestamp(task.poll_at_ms)}")
    for event in events:
        click.echo(f"{'event':<18}{timestamp(event.time_ms)}  {event.type:<24}{event.id}")


@tasks.command("wait")
@click.argument("external_task_id")
@click.option("--timeout", type=float, help="Seconds to wait at the most.")
@click.option("--output", type=click.Path(path_type=Path), help="Save the result video here.")
@AS_JSON
def tasks_wait(external_task_id: str, timeout: float | None, output: Path | None, as_json: bool) -> None:
    """Wait for a task's end; exit status 0 only for succeed."""
    settings = load_settings()
    task = run(with_ledger(settings, lambda ledger: ledger.get(external_task_id)))
    sys.exit(run(follow(settings, task, timeout, output, as_json)))


@tasks.command("retry")
@click.argument("external_task_id")
@click.option("--external-task-id", "new_id", help="The new task's id. Default: a UUIDv7.")
@click.option("--absent", is_flag=True, help="You looked into the vendor's console, and no task of it is there.")
@AS_JSON
def tasks_retry(external_task_id: str, new_id: str | None, absent: bool, as_json: bool) -> None:
    """Submit a task's request again.

    A failed or abandoned task is submitted under a new id. One whose create has no answer keeps
    its id: the vendor is asked for it, where it can be, and it is sent only if it is surely absent.

    \b
      kling-relay tasks retry order-42
      kling-relay tasks retry order-42 --absent      novita, highway, aihubmax, oxen: when you have looked
    """

    async def again() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.retry(external_task_id, new_id=new_id, surely_absent=absent)).task

    _show_short(run(again()), as_json)


@tasks.command("adopt")
@click.argument("external_task_id")
@click.argument("task_id")
@AS_JSON
def tasks_adopt(external_task_id: str, task_id: str, as_json: bool) -> None:
    """Say that a create which had no answer made the vendor's task TASK_ID.

    Copy that id from the vendor's console. The vendor is asked about it from then on.
    """

    async def adopt() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.adopt(external_task_id, task_id)).task

    _show_short(run(adopt()), as_json)


@tasks.command("costs")
@click.option("--days", default=31, show_default=True, type=click.IntRange(1, 3660), help="How far back.")
@click.option("--vendor", help="Only this vendor's.")
@AS_JSON
def tasks_costs(days: int, vendor: str | None, as_json: bool) -> None:
    """Total what tasks cost, by the day of their submission (UTC) and vendor, as the vendors state it."""
    since_ms = Clock().now_ms() - days * 86_400_000

    async def read(ledger: Ledger) -> list[Total]:
        found: list[Task] = []
        before = None
        while page := await ledger.tasks(vendor=vendor, before_id=before, limit=1000):
            before = page[-1].external_task_id
            found.extend(task for task in page if task.created_at_ms >= since_ms)
            if page[-1].created_at_ms < since_ms:
                break
        return totals(found)

    rows = [msgspec.to_builtins(total) for total in run(with_ledger(load_settings(), read))]
    if as_json:
        print_json(rows)
    else:
        print_table(rows, ("day", "vendor", "tasks", "amount", "unit"), empty=f"no costs in {days} days")


def _show_video(video: Video) -> None:
    dies = "" if video.expires_at_ms is None else f", until {timestamp(video.expires_at_ms)}"
    click.echo(f"{'video':<18}{video.url} ({video.duration or '?'} s{dies})")
    for copy in filter(None, (video.archived, video.archived_watermark)):
        click.echo(f"{'archived':<18}{copy.url} (sha256 {copy.sha256})")


def _show_short(task: Task, as_json: bool) -> None:
    if as_json:
        print_json(task_data(task))
    else:
        click.echo(f"{task.status.value}  external_task_id {task.external_task_id}  task_id {task.task_id}")
