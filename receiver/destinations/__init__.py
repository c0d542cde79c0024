"""Where events go. A destination is picked by the scheme of a hook's URL, and imported when a hook uses it.

Other packages add theirs by an entry point, in their pyproject.toml:
`[project.entry-points."kling_relay.destinations"]` and below it `acme = "acme_bus:KIND"`, where
`acme` is the scheme and KIND a `Kind`.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from receiver.destinations.base import Destination, wrong
from submitter.errors import InvalidSettings, Problem
from submitter.plugins import entry_points_of

if TYPE_CHECKING:
    from receiver.hooks import Hook

GROUP = "kling_relay.destinations"


class Kind(msgspec.Struct, frozen=True):
    """One kind of destination: the module whose `open(hook, allow_hosts)` opens it.

    `extra` is what `pip install 'kling-relay[...]'` brings for it. `ordered`: a task's events go
    one after the other. `signs`: a hook's `secret` is used. `has_host`: its URL names one.
    `concurrency` is a hook's default: how many events may be under way at once.
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
    "sqs": Kind("receiver.destinations.sqs", "aws"),
    "sns": Kind("receiver.destinations.sns", "aws"),
    "kinesis": Kind("receiver.destinations.kinesis", "aws"),
    "eventbridge": Kind("receiver.destinations.eventbridge", "aws", ordered=False),
    "archive": Kind("receiver.destinations.archive", "storage", ordered=False, has_host=False, concurrency=4),
    "file": Kind("receiver.destinations.file", has_host=False),
    "python": Kind("receiver.destinations.python", has_host=False, concurrency=10),
}


@cache
def kinds() -> Mapping[str, Kind]:
    """Return every kind of destination by its scheme; raise InvalidSettings for one that cannot be used."""
    found = dict(BUILT_IN)
    problems = []
    for entry in entry_points_of(GROUP):
        try:
            kind = entry.load()
        except Exception as error:  # noqa: BLE001 - another package may do anything when it is imported
            reason = f"it cannot be imported: {error}"
        else:
            reason = "" if isinstance(kind, Kind) else f"it is a {type(kind).__name__}, and not a Kind"
            if entry.name in found:
                reason = "its scheme must be of its own"
        if reason:
            remedy = "Mend or remove the package that adds it."
            problems.append(Problem(f"entry point {GROUP}", f"{entry.name} = {entry.value}", reason, remedy))
        else:
            found[entry.name] = kind
    if problems:
        raise InvalidSettings(problems)
    return found


def open_destination(hook: "Hook", allow_hosts: frozenset[str]) -> Destination:
    """Open what a hook's URL leads to; connect when it is first used. Raise InvalidSettings for a wrong URL."""
    kind = kinds()[hook.url.partition(":")[0]]
    try:
        destination: Destination = import_module(kind.module).open(hook, allow_hosts)
    except ImportError as error:
        if kind.extra is None:
            raise
        remedy = f"Install it: pip install 'kling-relay[{kind.extra}]'."
        raise wrong(hook, "url", hook.scheme, f"needs the extra `{kind.extra}` ({error})", remedy) from error
    return destination
