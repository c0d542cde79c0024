"""CloudEvents encoding of an event in structured or binary mode, and its W3C trace context. Pure.

Structured mode: the body is the whole event as JSON, the same bytes as in the ledger. Binary mode: the body is
the event's `data`, and its attributes go beside the body, where the protocol binding defines (headers, message
properties). Sources: CloudEvents 1.0.2, https://github.com/cloudevents/spec/tree/v1.0.2/cloudevents; W3C Trace
Context, https://www.w3.org/TR/trace-context/.
"""

import hashlib
from typing import Any

import msgspec

from submitter.event import CONTENT_TYPE, Event

ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time", "sequence")


class Encoded(msgspec.Struct, frozen=True):
    """An encoded event. `attributes` go beside the body; they are empty in structured mode."""

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
    """Return the structured event with `traceparent` as an attribute, for a protocol without headers.

    The attribute is defined by the CloudEvents extension Distributed Tracing.
    """
    return event.body[:-1] + b',"traceparent":"' + traceparent(event).encode() + b'"}'


def traceparent(event: Event) -> str:
    """Return an event's W3C `traceparent`: one trace per task, one span per event.

    It is derived from their ids, so it is the same in every retry and at every hook.
    """
    trace = hashlib.sha256(event.external_task_id.encode()).hexdigest()[:32]
    span = hashlib.sha256(event.id.encode()).hexdigest()[:16]
    return f"00-{trace}-{span}-01"
