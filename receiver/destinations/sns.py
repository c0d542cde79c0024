"""Publishes events to an Amazon SNS topic (PublishBatch): `sns://arn:aws:sns:eu-west-1:123456789012:topic`.

Event: a message with the CloudEvent; in binary mode its data, and the attributes as message attributes `ce-...`
(CloudEvents defines no SNS binding). Message attributes in both modes: `content-type`, `traceparent`.
Delivered: the response has a `MessageId` for the entry. Concurrent events share a request.
Order: kept in a FIFO topic, where the message group is the external_task_id. Its deduplication id is the event's id.
Limits: 256 KiB per event and per request, 10 events per request.
Source: https://docs.aws.amazon.com/sns/latest/api/API_PublishBatch.html.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import msgspec

from receiver.destinations.aws import (
    AwsClient,
    AwsDestination,
    Service,
    message_of,
    open_aws,
    read_entries,
    resource_name,
)
from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import BatchLimits
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

URL_FORMAT = "sns://arn:aws:sns:eu-west-1:123456789012:topic"
SERVICE = Service("sns", "SNS")
LIMITS = BatchLimits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    arn = resource_name(hook)
    if not arn.startswith("arn:") or arn.count(":") != 5:
        raise invalid_hook(hook, "url", repr(hook.url), URL_FORMAT, "Copy the topic's ARN.")

    def put(client: AwsClient, events: Sequence[Event]) -> list[Outcome]:
        entries = [message_of(hook, arn, event, position) for position, event in enumerate(events)]
        for entry in entries:
            entry["Message"] = entry.pop("Body")
        members = {f"PublishBatchRequestEntries.member.{n}": entry for n, entry in enumerate(entries, start=1)}
        return read_entries(read_batch(client.query(form("PublishBatch", arn) | dict(fields(members)))), len(events))

    def check(client: AwsClient) -> object:
        return client.query(form("GetTopicAttributes", arn))

    return open_aws(hook, SERVICE, url_format=URL_FORMAT, put=put, check=check, limits=LIMITS)


def form(action: str, arn: str) -> dict[str, str]:
    """Return the fields that every request has."""
    return {"Action": action, "Version": "2010-03-31", "TopicArn": arn}


def fields(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield nested values as fields of a form; the message attributes are a map, with numbered entries."""
    for name, value in values.items():
        if name.endswith("MessageAttributes"):
            entries = {f"entry.{n}": {"Name": k, "Value": v} for n, (k, v) in enumerate(value.items(), start=1)}
            yield from ((f"{name}.{inner}", text) for inner, text in fields(entries))
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", text) for inner, text in fields(value))
        else:
            yield name, value


def read_batch(content: bytes) -> dict[str, list[dict[str, str]]]:
    """Return the entries `Successful` and `Failed` of a response; raise DecodeError if it is no XML."""
    try:
        root = ElementTree.fromstring(content)  # noqa: S314 - from AWS, over TLS
    except ElementTree.ParseError as error:
        raise msgspec.DecodeError(str(error)) from error
    return {
        name: [
            {field.tag.rpartition("}")[2]: field.text or "" for field in member}
            for member in root.iterfind(f".//{{*}}{name}/{{*}}member")
        ]
        for name in ("Successful", "Failed")
    }
