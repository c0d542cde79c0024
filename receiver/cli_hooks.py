"""`kling-relay hooks`: look at hooks, test them, replay their dead letters."""

import sys
from typing import Any
from urllib.parse import urlsplit

import click

from receiver.cli import print_json, print_table, run, with_ledger
from receiver.hooks import TEST, Hook
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.event import Event, cloud_event, timestamp
from submitter.ledger.base import HookState
from submitter.schedule import Backoff, Patience
from submitter.settings import load_settings
from submitter.task import Task, TaskStatus, Video

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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
    now_ms = Clock().now_ms()
    for hook, state in zip(settings.hooks, states, strict=True):
        parts = urlsplit(hook.url)
        rows.append(
            {
                "name": hook.name,
                "to": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else hook.url,
                "events": "all" if hook.events is None else ",".join(sorted(hook.events)),
                "signed": ",".join(secret.scheme for secret in hook.secrets) or "no",
                "due": state.due,
                "dead": state.dead,
                "state": _state(state, now_ms),
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


def _state(state: HookState, now_ms: int) -> str:
    if state.disabled is not None:
        return f"disabled: {state.disabled}"
    if state.paused is not None and state.paused_until_ms > now_ms:  # else it is being tried again
        return f"paused until {timestamp(state.paused_until_ms)}: {state.paused}"
    return "on"


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
    body = cloud_event(id=id, type=TEST, task=task, time_ms=now_ms)
    return Event(id, TEST, task.external_task_id, 1, now_ms, body)
