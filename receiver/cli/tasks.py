"""`kling-relay tasks`: list, show, wait, retry, resolve a create without an answer (adopt), total the costs."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from receiver.cli.console import print_json, print_table, run, with_ledger
from receiver.cli.follow import follow
from submitter.clock import Clock
from submitter.costs import Total, totals
from submitter.event import Event, task_data, timestamp
from submitter.ledger import Ledger
from submitter.settings import load_settings
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus, Video

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group()
def tasks() -> None:
    """List, show, wait for, retry and resolve tasks; total their costs."""


@tasks.command("list")
@click.option(
    "--status", type=click.Choice([status.value for status in TaskStatus]), help="Only tasks with this status."
)
@click.option("--vendor", help="Only tasks of this vendor.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Rows to list at most.")
@click.option("--before", metavar="ID", help="Next page: only tasks older than the one with this external_task_id.")
@AS_JSON
def tasks_list(status: str | None, vendor: str | None, limit: int, before: str | None, as_json: bool) -> None:
    """List tasks, newest first.

    \b
      kling-relay tasks list
      kling-relay tasks list --status submission_unknown
      kling-relay tasks list --vendor novita --limit 100 --json
    """
    only = None if status is None else TaskStatus(status)
    found = run(
        with_ledger(
            load_settings(),
            lambda ledger: ledger.tasks(status=only, vendor=vendor, before_id=before, limit=limit),
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
    """Show one task: state, result, cost, request and events.

    \b
      kling-relay tasks show order-42
      kling-relay tasks show order-42 --json     like `data` of its events
    """

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
    for refused_by in task.refused_by:
        click.echo(f"{'refused by':<18}{refused_by.vendor}: {refused_by.reason}")
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
@click.option("--timeout", type=float, help="Seconds to wait at most. Default: no limit.")
@click.option("--output", type=click.Path(path_type=Path), help="File to save the result video to.")
@AS_JSON
def tasks_wait(external_task_id: str, timeout: float | None, output: Path | None, as_json: bool) -> None:
    """Wait until a task ends, and print its result.

    Prints the URLs of the result videos. A task without callbacks is polled meanwhile.

    \b
      kling-relay tasks wait order-42 --timeout 1800 --output result.mp4

    Exit status: 0 only for succeed; 1 for another end or a timeout.
    """
    settings = load_settings()
    task = run(with_ledger(settings, lambda ledger: ledger.get(external_task_id)))
    sys.exit(run(follow(settings, task, timeout, output, as_json)))


@tasks.command("retry")
@click.argument("external_task_id")
@click.option(
    "--external-task-id", "new_id", help="Id of the new task, for a failed or abandoned one. Default: a UUIDv7."
)
@click.option("--absent", is_flag=True, help="State that the vendor's console shows no such task.")
@AS_JSON
def tasks_retry(external_task_id: str, new_id: str | None, absent: bool, as_json: bool) -> None:
    """Submit the request of a failed or unanswered task again.

    A failed or abandoned task is submitted under a new id. A task whose create got no answer
    (created, submission_unknown) keeps its id: it is sent again only if the vendor confirms that it
    does not exist. Novita, Highway, AIHubMax and Oxen.ai cannot be queried by your id: look into
    their console. If the task is there, use `tasks adopt`; if it is not, use --absent.

    \b
      kling-relay tasks retry order-42
      kling-relay tasks retry order-42 --absent
    """

    async def retry() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.retry(external_task_id, new_id=new_id, absent=absent)).task

    _show_short(run(retry()), as_json)


@tasks.command("adopt")
@click.argument("external_task_id")
@click.argument("task_id")
@AS_JSON
def tasks_adopt(external_task_id: str, task_id: str, as_json: bool) -> None:
    """Assign the vendor's TASK_ID to a task without one.

    Use it for a task in submission_unknown, whose create got no answer, when the vendor's console
    shows that the vendor created it. Copy TASK_ID from there: the task is polled by it from then on.

    \b
      kling-relay tasks adopt order-42 893605946402811985
    """

    async def adopt() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.adopt(external_task_id, task_id)).task

    _show_short(run(adopt()), as_json)


@tasks.command("costs")
@click.option("--days", default=31, show_default=True, type=click.IntRange(1, 3660), help="Number of days to include.")
@click.option("--vendor", help="Only tasks of this vendor.")
@AS_JSON
def tasks_costs(days: int, vendor: str | None, as_json: bool) -> None:
    """Total the costs of tasks by day (UTC) and vendor.

    The day is that of the submission. Costs are as the vendors state them: cash, units of a resource
    pack, or credits.

    \b
      kling-relay tasks costs --days 7 --vendor kling
    """
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
    expiry = "" if video.expires_at_ms is None else f", until {timestamp(video.expires_at_ms)}"
    click.echo(f"{'video':<18}{video.url} ({video.duration or '?'} s{expiry})")
    for copy in filter(None, (video.archived, video.archived_watermark)):
        click.echo(f"{'archived':<18}{copy.url} (sha256 {copy.sha256})")


def _show_short(task: Task, as_json: bool) -> None:
    if as_json:
        print_json(task_data(task))
    else:
        click.echo(f"{task.status.value}  external_task_id {task.external_task_id}  task_id {task.task_id}")
