"""`kling-relay tasks`: list, show, wait, refresh, retry, adopt, read the quarantine, total the costs."""

import sys
from pathlib import Path

import click
import msgspec

from receiver.cli.console import echo, echo_json, print_json, print_table, run, unknown, with_ledger
from receiver.cli.follow import OUTPUT, SECONDS, check_output, follow
from submitter.clock import Clock
from submitter.costs import Total, totals
from submitter.errors import InvalidRequest, Problem, TaskNotFound
from submitter.event import Event, task_data, timestamp
from submitter.ledger import Ledger
from submitter.ledger.base import QUARANTINED_MAX, Quarantined
from submitter.refresh import Refreshed
from submitter.settings import load_settings
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus, Video
from submitter.vendors.registry import vendors as installed
from submitter.web_address import without_password

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group()
def tasks() -> None:
    """List, show, wait for, refresh, retry and resolve tasks; total their costs."""


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
    settings = load_settings()
    if vendor is not None and vendor not in installed():
        raise unknown("vendor", vendor, installed(), "Choose one of them.")

    async def read(ledger: Ledger) -> list[Task]:
        try:
            return await ledger.tasks(status=only, vendor=vendor, before_id=before, limit=limit)
        except TaskNotFound as error:
            remedy = "Copy the id from the last row of the page before."
            problem = Problem("--before", repr(before), "the id of a task in this ledger", remedy)
            raise InvalidRequest([problem]) from error

    found = run(with_ledger(settings, read))
    rows = [task_data(task) for task in found]
    if as_json:
        print_json(rows)
    else:
        columns = ("external_task_id", "vendor", "status", "task_id", "created_at", "status_message")
        print_table(rows, columns, empty=f"no such tasks in {without_password(settings.ledger)}")


@tasks.command("show")
@click.argument("external_task_id")
@click.option("--raw", is_flag=True, help="Print the last body that the vendor sent about the task, and nothing else.")
@AS_JSON
def tasks_show(external_task_id: str, raw: bool, as_json: bool) -> None:
    """Show one task: state, result, cost, request and events.

    \b
      kling-relay tasks show order-42
      kling-relay tasks show order-42 --json     like `data` of its events
      kling-relay tasks show order-42 --raw      with the fields that kling-relay does not know
    """

    async def read(ledger: Ledger) -> tuple[Task, list[Event], list[Quarantined]]:
        quarantined = await ledger.quarantined(QUARANTINED_MAX, external_task_id)
        return await ledger.get(external_task_id), await ledger.events(external_task_id), quarantined

    task, events, quarantined = run(with_ledger(load_settings(), read))
    if raw:
        if not task.raw:
            raise click.ClickException(f"{external_task_id}: the vendor has not reported anything yet")
        echo_json(task.raw)
        return
    if as_json:
        print_json(task_data(task))
    else:
        _show_task(task, events)
        if quarantined:
            command = f"kling-relay tasks quarantine {external_task_id}"
            echo(f"{'quarantined':<18}{sum(one.times for one in quarantined)} bodies: {command}")


@tasks.command("wait")
@click.argument("external_task_id")
@click.option("--timeout", type=SECONDS, help="Seconds to wait at most. Default: no limit.")
@click.option("--output", type=OUTPUT, callback=check_output, help="File to save the result video to.")
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


@tasks.command("refresh")
@click.argument("external_task_ids", nargs=-1, required=True, metavar="EXTERNAL_TASK_ID...")
@AS_JSON
def tasks_refresh(external_task_ids: tuple[str, ...], as_json: bool) -> None:
    """Ask the vendor about tasks now, and apply what it says.

    Use it for a task that was abandoned or whose submission is unknown: if the vendor says that it
    ended, it gets that end. One that the vendor still works on stays as it is. For a finished task it
    renews the result URLs, where the vendor gives new ones (Novita, Highway).

    \b
      kling-relay tasks refresh order-42
      kling-relay tasks refresh order-42 order-43 --json

    Exit status: 0 the vendor answered, 1 it did not answer, 2 a task cannot be asked about.
    """

    async def refresh() -> list[Refreshed]:
        async with Submitter.from_settings() as submitter:
            return await submitter.refresh(*external_task_ids)

    found = run(refresh())
    rows = [
        {
            "external_task_id": one.task.external_task_id,
            "outcome": one.outcome,
            "status": one.task.status.value,
            "vendor_says": one.message,
        }
        for one in found
    ]
    if as_json:
        print_json([row | {"task": task_data(one.task)} for row, one in zip(rows, found, strict=True)])
    else:
        print_table(rows, ("external_task_id", "outcome", "status", "vendor_says"), empty="")
    outcomes = {one.outcome for one in found}
    sys.exit(2 if "not_asked" in outcomes else 1 if "no_answer" in outcomes else 0)


@tasks.command("retry")
@click.argument("external_task_id")
@click.option(
    "--external-task-id", "new_id", help="Id of the new task, for a failed or abandoned one. Default: ID~2, then ID~3."
)
@click.option("--absent", is_flag=True, help="State that the vendor's console shows no such task, or a failed one.")
@AS_JSON
def tasks_retry(external_task_id: str, new_id: str | None, absent: bool, as_json: bool) -> None:
    """Submit the request of a refused, failed, abandoned or unanswered task again.

    A failed task is submitted under a new id: the retry of order-42 is order-42~2, and a repeated retry
    returns that task instead of paying again. An abandoned one too, but only if the vendor, asked
    first, says that it failed or does not exist. A refused task, and one whose create got no answer
    (created, submission_unknown), keeps its id: the latter is sent again only if the vendor confirms
    that it does not exist. Novita, Highway, AIHubMax and Oxen.ai cannot be queried by your id: look
    into their console. If the task is there, use `tasks adopt`; if it is not, use --absent.

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
    shows that the vendor created it: copy TASK_ID from there. The vendor is asked for it first, and the
    task takes over what it says. It works for created, abandoned and refused tasks too.

    \b
      kling-relay tasks adopt order-42 893605946402811985
    """

    async def adopt() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.adopt(external_task_id, task_id)).task

    _show_short(run(adopt()), as_json)


@tasks.command("quarantine")
@click.argument("external_task_id", required=False)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Bodies to list at most.")
@AS_JSON
def tasks_quarantine(external_task_id: str | None, limit: int, as_json: bool) -> None:
    """Show authentic bodies that could not be parsed, newest first; with an id, those of one task.

    The vendor was polled instead, so no state is lost. If a body has a status or a field that
    kling-relay does not know, open an issue. `ledger prune` deletes old ones.

    \b
      kling-relay tasks quarantine
      kling-relay tasks quarantine order-42 --json
    """
    found = run(with_ledger(load_settings(), lambda ledger: ledger.quarantined(limit, external_task_id)))
    rows = [
        {
            "received_at": timestamp(entry.received_at_ms),
            "vendor": entry.vendor,
            "external_task_id": entry.external_task_id,
            "times": entry.times,
            "reason": entry.reason,
            "body": entry.body.decode(errors="backslashreplace"),
        }
        for entry in found
    ]
    if as_json:
        print_json(rows)
    else:
        columns = ("received_at", "vendor", "external_task_id", "times", "reason", "body")
        print_table(rows, columns, empty="nothing is quarantined")


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
    if vendor is not None and vendor not in installed():
        raise unknown("vendor", vendor, installed(), "Choose one of them.")
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


def _show_task(task: Task, events: list[Event]) -> None:
    for name, value in task_data(task).items():
        if name not in ("videos", "cost", "metadata"):
            echo(f"{name:<18}{value or ''}")
    for video in task.videos:
        _show_video(video)
    for refused_by in task.refused_by:
        echo(f"{'refused by':<18}{refused_by.vendor}: {refused_by.reason}")
    for charge in task.cost:
        source = f" ({charge.source})" if charge.source else ""
        echo(f"{'cost':<18}{charge.amount} {charge.currency or charge.kind}{source}")
    for group in ("metadata", "request"):
        for name, value in getattr(task, group).items():
            echo(f"{group + '.' + name:<34}{value}")
    if task.poll_at_ms is not None:
        echo(f"{'next poll':<18}{timestamp(task.poll_at_ms)}")
    for event in events:
        echo(f"{'event':<18}{timestamp(event.time_ms)}  {event.type:<24}{event.id}")


def _show_video(video: Video) -> None:
    expiry = "" if video.expires_at_ms is None else f", until {timestamp(video.expires_at_ms)}"
    id = f", id {video.id}" if video.id else ""
    echo(f"{'video':<18}{video.url} ({video.duration or '?'} s{expiry}{id})")
    if video.watermark_url:
        echo(f"{'watermarked':<18}{video.watermark_url}")
    for copy in filter(None, (video.archived, video.archived_watermark)):
        echo(f"{'archived':<18}{copy.url} (sha256 {copy.sha256})")


def _show_short(task: Task, as_json: bool) -> None:
    if as_json:
        print_json(task_data(task))
    else:
        echo(f"{task.status.value}  external_task_id {task.external_task_id}  task_id {task.task_id}")
