"""Puts events on an Amazon EventBridge bus (PutEvents): `eventbridge://bus?region=eu-west-1`.

Event: `Source` is the CloudEvent's source and `DetailType` its type. `Detail` is the whole CloudEvent; in binary
mode it is the data alone. `TraceHeader` is the trace context in X-Ray's format.
Delivered: the response has an `EventId` for the entry. Concurrent events share a request.
Order is not kept.
Limits: 256 KiB per event and per request, 10 events per request.
Source: https://docs.aws.amazon.com/eventbridge/latest/APIReference/API_PutEvents.html.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from receiver.destinations.aws import AwsClient, AwsDestination, Service, open_aws, read_refusal, resource_name
from receiver.destinations.batches import BatchLimits
from receiver.destinations.cloudevents import encode, traceparent, with_trace
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

SERVICE = Service("events", "EVENTBRIDGE", "AWSEvents")
LIMITS = BatchLimits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    bus = resource_name(hook)

    def entry_of(event: Event) -> dict[str, Any]:
        return {
            "EventBusName": bus,
            "Source": msgspec.json.decode(event.body)["source"],
            "DetailType": event.type,
            "Detail": (with_trace(event) if hook.mode == "structured" else encode(event, hook.mode).body).decode(),
            "TraceHeader": _xray_header(event),
            "Time": event.time_ms // 1000,
        }

    def put(client: AwsClient, events: Sequence[Event]) -> list[Outcome]:
        response = client.call("PutEvents", Entries=[entry_of(event) for event in events])
        return [
            Outcome(True, f"event {entry['EventId']}")
            if entry.get("EventId")
            else read_refusal(entry, "ErrorCode", "ErrorMessage")
            for entry in response["Entries"]
        ]

    def check(client: AwsClient) -> object:
        return client.call("DescribeEventBus", Name=bus)

    return open_aws(hook, SERVICE, url_format="eventbridge://bus", put=put, check=check, limits=LIMITS)


def _xray_header(event: Event) -> str:
    """Return the event's trace context in the format of AWS X-Ray's trace header."""
    _, trace, span, _ = traceparent(event).split("-")
    return f"Root=1-{trace[:8]}-{trace[8:]};Parent={span};Sampled=1"
