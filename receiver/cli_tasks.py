"""The commands that look at tasks and hooks."""

import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from receiver.cli import print_json, print_table, run, with_ledger
from receiver.cli_submit import follow
from receiver.hooks import Hook
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.event import Event, cloud_event, task_data, timestamp
from submitter.schedule import Backoff, Patience
from submitter.settings import load_settings
from submitter.submit import Submitter
from submitter.task import Task, TaskStatus, Video

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def tasks() -> None:
    """Look at tasks, wait for them, submit them again."""


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
        dies = "" if video.expires_at_ms is None else f", until {timestamp(video.expires_at_ms)}"
        click.echo(f"{'video':<18}{video.url} ({video.duration} s{dies})")
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
@AS_JSON
def tasks_retry(external_task_id: str, new_id: str | None, as_json: bool) -> None:
    """Submit a task's request again.

    A failed or abandoned task is submitted under a new id. One whose create has no answer keeps
    its id: the vendor is asked for it, and it is sent only if it is surely absent.
    """

    async def again() -> Task:
        async with Submitter.from_settings() as submitter:
            return (await submitter.retry(external_task_id, new_id=new_id)).task

    task = run(again())
    if as_json:
        print_json(task_data(task))
    else:
        click.echo(f"{task.status.value}  external_task_id {task.external_task_id}  task_id {task.task_id}")


@click.group()
def hooks() -> None:
    """Look at hooks, test them, and replay their dead letters."""


@hooks.command("list")
@AS_JSON
def hooks_list(as_json: bool) -> None:
    """List the hooks of relay.toml with what waits for them."""
    settings = load_receiver_settings()
    routes = [hook.route(0) for hook in settings.hooks]
    states = run(with_ledger(settings.common, lambda ledger: ledger.hook_states(routes)))
    rows = []
    for hook, state in zip(settings.hooks, states, strict=True):
        parts = urlsplit(hook.url)
        rows.append(
            {
                "name": hook.name,
                "to": f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}",
                "events": "all" if hook.events is None else ",".join(sorted(hook.events)),
                "signed": ",".join(secret.scheme for secret in hook.secrets) or "no",
                "due": state.due,
                "dead": state.dead,
                "state": "on" if state.disabled is None else f"disabled: {state.disabled}",
            }
        )
    if as_json:
        print_json(rows)
    else:
        empty = "no hooks: add [[hook]] tables to relay.toml"
        print_table(rows, ("name", "to", "events", "signed", "due", "dead", "state"), empty=empty)


@hooks.command("test")
@click.argument("name")
@AS_JSON
def hooks_test(name: str, as_json: bool) -> None:
    """Send a test event (type `task.test`) to a hook, and say what it answered."""
    from receiver.destinations import open_destination

    settings = load_receiver_settings()
    hook = _hook(settings.hooks, name)

    async def send() -> Any:
        clock = Clock()
        destination = open_destination(hook, settings.common.allow_hosts)
        try:
            return await destination.send(_test_event(clock), clock.now_s())
        finally:
            await destination.close()

    outcome = run(send())
    if as_json:
        print_json({"hook": name, "delivered": outcome.is_delivered, "answer": outcome.answer})
    else:
        click.echo(f"{'delivered' if outcome.is_delivered else 'not delivered'}: {outcome.answer}")
    sys.exit(0 if outcome.is_delivered else 1)


@hooks.command("dead")
@click.argument("name", required=False)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@AS_JSON
def hooks_dead(name: str | None, limit: int, as_json: bool) -> None:
    """List dead letters: events that a hook did not take by the end of its schedule."""
    found = run(with_ledger(load_settings(), lambda ledger: ledger.deliveries(hook=name, state="dead", limit=limit)))
    rows = [
        {
            "hook": delivery.hook,
            "type": delivery.event.type,
            "external_task_id": delivery.event.external_task_id,
            "event_id": delivery.event.id,
            "attempts": delivery.attempts,
            "error": delivery.last_error,
        }
        for delivery in found
    ]
    if as_json:
        print_json(rows)
    else:
        columns = ("hook", "type", "external_task_id", "event_id", "attempts", "error")
        print_table(rows, columns, empty="no dead letters")


@hooks.command("replay")
@click.argument("name")
@click.option("--task", "external_task_id", help="Only this task's events.")
def hooks_replay(name: str, external_task_id: str | None) -> None:
    """Make a hook's dead letters due again, and enable it if it was disabled."""
    settings = load_receiver_settings()
    _hook(settings.hooks, name)
    count = run(with_ledger(settings.common, lambda ledger: ledger.replay(name, Clock().now_ms(), external_task_id)))
    click.echo(f"{count} deliveries are due again; a running `serve` makes them now")


def _hook(found: tuple[Hook, ...], name: str) -> Hook:
    for hook in found:
        if hook.name == name:
            return hook
    names = ", ".join(hook.name for hook in found) or "none"
    raise InvalidSettings([Problem("hook", repr(name), f"one of relay.toml's: {names}", "Check the name.")])


def _test_event(clock: Clock) -> Event:
    now_ms = clock.now_ms()
    forever = Backoff(first_s=1, factor=1, max_s=1)
    task = Task(
        external_task_id="kling-relay-test",
        vendor="kling",
        status=TaskStatus.SUCCEED,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        patience=Patience(forever, forever, 1),
        task_id="0",
        status_message="a test of this hook: no task, nothing was paid",
        videos=(Video("https://example.com/test.mp4", duration=5.0),),
        metadata={"test": "true"},
        sequence=1,
    )
    id = f"evt_test_{clock.new_id().replace('-', '')}"
    body = cloud_event(id=id, type="task.test", task=task, time_ms=now_ms)
    return Event(id, "task.test", task.external_task_id, 1, now_ms, body)
