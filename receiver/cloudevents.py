"""An event in CloudEvents' two modes, for every protocol binding, and its trace context. Pure.

`structured` is the whole event as JSON, the ledger's own bytes. `binary` is its `data`, with the
attributes beside it as the protocol has places for them.
"""

import hashlib
from typing import Any

import msgspec

from submitter.event import CONTENT_TYPE, Event

ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time", "sequence")


class Encoded(msgspec.Struct, frozen=True):
    """An event as it is sent: the content type goes where the protocol has it, attributes beside the body."""

    body: bytes
    content_type: str
    attributes: dict[str, str]


def encode(event: Event, mode: str) -> Encoded:
    """Return an event in `structured` or `binary` mode."""
    if mode == "structured":
        return Encoded(event.body, CONTENT_TYPE, {})
    envelope: dict[str, Any] = msgspec.json.decode(event.body)
    attributes = {name: str(envelope[name]) for name in ATTRIBUTES}
    return Encoded(msgspec.json.encode(envelope["data"]), envelope["datacontenttype"], attributes)


def with_trace(event: Event) -> bytes:
    """Return the whole event with its trace context inside, for what has no place beside the body.

    `traceparent` is an attribute then, as CloudEvents' distributed tracing extension has it.
    """
    return event.body[:-1] + b',"traceparent":"' + traceparent(event).encode() + b'"}'


def traceparent(event: Event) -> str:
    """Return the event's trace context (W3C): one trace a task, one span an event, the same at every hook."""
    trace = hashlib.sha256(event.external_task_id.encode()).hexdigest()[:32]
    span = hashlib.sha256(event.id.encode()).hexdigest()[:16]
    return f"00-{trace}-{span}-01"
