"""Puts events on an EventBridge bus: `eventbridge://bus?region=eu-west-1`.

`Source` is the CloudEvent's source, `DetailType` its type, and `Detail` the whole CloudEvent, or
in binary mode its data alone. EventBridge keeps no order.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec

from receiver.cloudevents import encode
from receiver.destinations.aws import AwsDestination, Refused, name_of, open_aws
from receiver.hooks import Hook
from submitter.event import Event


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a bus."""
    bus = name_of(hook)

    def put(client: Any, event: Event) -> str:
        entry = {
            "EventBusName": bus,
            "Source": msgspec.json.decode(event.body)["source"],
            "DetailType": event.type,
            "Detail": encode(event, hook.mode).body.decode(),
            "Time": datetime.fromtimestamp(event.time_ms / 1000, UTC),
        }
        answer = client.put_events(Entries=[entry])
        taken = answer["Entries"][0]
        if answer["FailedEntryCount"] or "EventId" not in taken:
            raise Refused(f"{taken.get('ErrorCode')}: {taken.get('ErrorMessage')}")
        return f"event {taken['EventId']}"

    def look(client: Any) -> object:
        return client.describe_event_bus(Name=bus)

    return open_aws(hook, "events", shape="eventbridge://bus", put=put, look=look)
