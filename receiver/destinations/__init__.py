"""Event destinations: a registry from URL scheme to implementation, open to plugins.

The scheme of a hook's URL selects its destination. The module is imported when the first hook uses it.

Another package adds a destination with an entry point in its pyproject.toml:

    [project.entry-points."kling_relay.destinations"]
    acme = "acme_bus:KIND"

`acme` is the scheme, and `KIND` is a `Kind`.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from receiver.destinations.base import Destination, invalid_hook
from submitter.entry_points import entry_points_of
from submitter.errors import InvalidSettings, Problem
from submitter.extras import install_command

if TYPE_CHECKING:
    from receiver.hook import Hook

GROUP = "kling_relay.destinations"


class Kind(msgspec.Struct, frozen=True):
    """One kind of destination. `open(hook, allow_hosts)` in `module` returns a `Destination`.

    extra        the extra of `kling-relay[...]` that installs its client library
    ordered      deliver a task's events one after the other
    signs        it signs with the hook's `secret`
    has_host     its URL must name a host
    concurrency  default number of a hook's concurrent deliveries
    """

    module: str
    extra: str | None = None
    ordered: bool = True
    signs: bool = False
    has_host: bool = True
    concurrency: int = 100


BUILT_IN: dict[str, Kind] = {
    "https": Kind("receiver.destinations.http", ordered=False, signs=True, concurrency=10),
    "http": Kind("receiver.destinations.http", ordered=False, signs=True, concurrency=10),
    "kafka": Kind("receiver.destinations.kafka", "kafka"),
    "kafkas": Kind("receiver.destinations.kafka", "kafka"),
    "pubsub": Kind("receiver.destinations.pubsub", "google"),
    "eventgrid": Kind("receiver.destinations.eventgrid", "azure", ordered=False),
    "servicebus": Kind("receiver.destinations.servicebus", "azure"),
    "nats": Kind("receiver.destinations.nats", "nats"),
    "amqp": Kind("receiver.destinations.amqp", "amqp"),
    "amqps": Kind("receiver.destinations.amqp", "amqp"),
    "redis": Kind("receiver.destinations.redis", "redis"),
    "rediss": Kind("receiver.destinations.redis", "redis"),
    "mqtt": Kind("receiver.destinations.mqtt", "mqtt", concurrency=50),
    "mqtts": Kind("receiver.destinations.mqtt", "mqtt", concurrency=50),
    "sqs": Kind("receiver.destinations.sqs"),
    "sns": Kind("receiver.destinations.sns"),
    "kinesis": Kind("receiver.destinations.kinesis"),
    "eventbridge": Kind("receiver.destinations.eventbridge", ordered=False),
    "archive": Kind("receiver.destinations.archive", "storage", ordered=False, has_host=False, concurrency=4),
    "file": Kind("receiver.destinations.file", has_host=False),
    "python": Kind("receiver.destinations.python", has_host=False, concurrency=10),
}


@cache
def kinds() -> Mapping[str, Kind]:
    """Return every kind of destination by its scheme; raise InvalidSettings for an invalid entry point."""
    found = dict(BUILT_IN)
    problems = []
    for entry in entry_points_of(GROUP):
        try:
            kind = entry.load()
        except Exception as error:  # noqa: BLE001 - importing another package can raise anything
            reason = f"cannot be imported: {error}"
        else:
            reason = "" if isinstance(kind, Kind) else f"is of type {type(kind).__name__}, not Kind"
            if entry.name in found:
                reason = "another destination already uses this scheme"
        if reason:
            remedy = "Fix or uninstall the package that adds it."
            problems.append(Problem(f"entry point {GROUP}", f"{entry.name} = {entry.value}", reason, remedy))
        else:
            found[entry.name] = kind
    if problems:
        raise InvalidSettings(problems)
    return found


def open_destination(hook: "Hook", allow_hosts: frozenset[str]) -> Destination:
    """Return the destination of a hook, which connects on first use; raise InvalidSettings for an invalid URL."""
    kind = kinds()[hook.url.partition(":")[0]]
    try:
        destination: Destination = import_module(kind.module).open(hook, allow_hosts)
    except ImportError as error:
        if kind.extra is None:
            raise
        remedy = f"Install it: {install_command(kind.extra)}."
        raise invalid_hook(hook, "url", hook.scheme, f"needs the extra `{kind.extra}` ({error})", remedy) from error
    return destination
