"""Puts events on an EventBridge bus: `eventbridge://bus?region=eu-west-1`.

`Source` is the CloudEvent's source, `DetailType` its type, and `Detail` the whole CloudEvent, or
in binary mode its data alone. EventBridge keeps no order.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from receiver.cloudevents import encode, traceparent, with_trace
from receiver.destinations.aws import AwsDestination, name_of, open_aws, read_refusal
from receiver.destinations.base import Outcome
from receiver.destinations.batches import Limits
from receiver.hooks import Hook
from submitter.event import Event

LIMITS = Limits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a bus."""
    bus = name_of(hook)

    def entry_of(event: Event) -> dict[str, Any]:
        return {
            "EventBusName": bus,
            "Source": msgspec.json.decode(event.body)["source"],
            "DetailType": event.type,
            "Detail": (with_trace(event) if hook.mode == "structured" else encode(event, hook.mode).body).decode(),
            "TraceHeader": _xray(event),
            "Time": datetime.fromtimestamp(event.time_ms / 1000, UTC),
        }

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        answer = client.put_events(Entries=[entry_of(event) for event in events])
        return [
            Outcome(True, f"event {entry['EventId']}")
            if "EventId" in entry
            else read_refusal(entry, "ErrorCode", "ErrorMessage")
            for entry in answer["Entries"]
        ]

    def look(client: Any) -> object:
        return client.describe_event_bus(Name=bus)

    return open_aws(hook, "events", shape="eventbridge://bus", put=put, look=look, limits=LIMITS)


def _xray(event: Event) -> str:
    """Return the event's trace context as AWS's tracing writes it."""
    _, trace, span, _ = traceparent(event).split("-")
    return f"Root=1-{trace[:8]}-{trace[8:]};Parent={span};Sampled=1"
