"""`kling-relay hooks`: list and test webhooks and other hooks, list and replay dead letters."""

import re
import sys
from typing import Any

import click

from receiver.cli.console import echo, print_json, print_table, run, with_ledger
from receiver.hook import TEST, Hook
from receiver.settings import load_receiver_settings
from submitter.clock import Clock
from submitter.errors import InvalidSettings, Problem
from submitter.event import Event, cloud_event, timestamp
from submitter.ledger.base import HookState
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus, Video
from submitter.web_address import without_password

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group()
def hooks() -> None:
    """List and test hooks, and list and replay dead letters.

    A hook is a [[hook]] table of relay.toml: a webhook or an event bus that gets the tasks' events.
    """


@hooks.command("list")
@AS_JSON
def hooks_list(as_json: bool) -> None:
    """List hooks, with due deliveries, dead letters and state.

    The state is `on`, `paused until ...` (the circuit breaker, after repeated failures) or
    `disabled: ...` (the endpoint answered that it is gone; `hooks replay` enables it).
    """
    settings = load_receiver_settings()
    subscriptions = [hook.subscription(0) for hook in settings.hooks]
    states = run(with_ledger(settings.common, lambda ledger: ledger.hook_states(subscriptions)))
    rows = []
    now_ms = Clock().now_ms()
    for hook, state in zip(settings.hooks, states, strict=True):
        rows.append(
            {
                "name": hook.name,
                "to": _shown(hook.url),
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
    """Send a test event (type `task.test`) to a hook.

    Prints the hook's answer. The event is signed and sent like any other, but not stored or retried.

    \b
      kling-relay hooks test billing

    Exit status: 0 when the event was delivered, else 1.
    """
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
        echo(f"{'delivered' if outcome.is_delivered else 'not delivered'}: {outcome.answer}")
    sys.exit(0 if outcome.is_delivered else 1)


@hooks.command("dead")
@click.argument("name", required=False)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="Rows to list at most.")
@AS_JSON
def hooks_dead(name: str | None, limit: int, as_json: bool) -> None:
    """List dead letters: deliveries that failed for good.

    A delivery becomes a dead letter after the last attempt of the hook's schedule, or at once when
    the failure is permanent. NAME limits the list to one hook. `hooks replay` delivers them again.

    \b
      kling-relay hooks dead
      kling-relay hooks dead billing --json
    """
    settings = load_receiver_settings()
    found = run(with_ledger(settings.common, lambda ledger: ledger.deliveries(hook=name, state="dead", limit=limit)))
    if name is not None and not found:  # dead letters stay when their hook is removed from relay.toml
        _hook(settings.hooks, name)
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
@click.option("--task", "external_task_id", help="Replay only the events of this task (its external_task_id).")
def hooks_replay(name: str, external_task_id: str | None) -> None:
    """Deliver a hook's dead letters again, and enable a disabled hook.

    Use it once the hook works again. A running `serve` (or `kling-relay deliver`) makes the deliveries.

    \b
      kling-relay hooks replay billing
      kling-relay hooks replay billing --task order-42
    """
    settings = load_receiver_settings()
    _hook(settings.hooks, name)
    count = run(with_ledger(settings.common, lambda ledger: ledger.replay(name, Clock().now_ms(), external_task_id)))
    what = "1 delivery is" if count == 1 else f"{count} deliveries are"
    echo(f"{what} due again; a running `serve` delivers now")


def _state(state: HookState, now_ms: int) -> str:
    if state.disabled is not None:
        return f"disabled: {state.disabled}"
    if state.paused is not None and state.paused_until_ms > now_ms:  # then a probe delivery decides
        return f"paused until {timestamp(state.paused_until_ms)}: {state.paused}"
    return "on"


def _hook(hooks: tuple[Hook, ...], name: str) -> Hook:
    for hook in hooks:
        if hook.name == name:
            return hook
    names = ", ".join(hook.name for hook in hooks) or "none"
    raise InvalidSettings([Problem("hook", repr(name), f"one of the hooks in relay.toml: {names}", "Check the name.")])


def _test_event(clock: Clock) -> Event:
    now_ms = clock.now_ms()
    backoff = Backoff(first_s=1, factor=1, max_s=1)
    task = Task(
        external_task_id="kling-relay-test",
        vendor="kling",
        status=TaskStatus.SUCCEED,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        poll_policy=PollPolicy(backoff, backoff, 1),
        task_id="0",
        status_message="a test of this hook: there is no task, and nothing was billed",
        videos=(Video("https://example.com/test.mp4", duration=5.0),),
        metadata={"test": "true"},
        sequence=1,
    )
    id = f"evt_test_{clock.new_id().replace('-', '')}"
    body = cloud_event(id=id, type=TEST, task=task, time_ms=now_ms)
    return Event(id, TEST, task.external_task_id, 1, now_ms, body)


def _shown(url: str) -> str:
    """Return where a hook leads to: of an HTTP endpoint only its host, since its path may be a secret."""
    endpoint = re.match("https?://[^/?#]+", url)
    return without_password(endpoint[0] if endpoint else url)
