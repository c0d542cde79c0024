"""Publishes events to an Amazon SNS topic (PublishBatch): `sns://arn:aws:sns:eu-west-1:123456789012:topic`.

Event: a message with the CloudEvent; in binary mode its data, and the attributes as message attributes `ce-...`
(CloudEvents defines no SNS binding). Message attributes in both modes: `content-type`, `traceparent`.
Delivered: the response has a `MessageId` for the entry. Concurrent events share a request.
Order: kept in a FIFO topic, where the message group is the external_task_id. Its deduplication id is the event's id.
Limits: 256 KiB per event and per request, 10 events per request.
Source: https://docs.aws.amazon.com/sns/latest/api/API_PublishBatch.html.
"""

from collections.abc import Sequence
from typing import Any

from receiver.destinations.aws import AwsDestination, message_of, open_aws, read_entries, resource_name
from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import BatchLimits
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

URL_FORMAT = "sns://arn:aws:sns:eu-west-1:123456789012:topic"
LIMITS = BatchLimits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    arn = resource_name(hook)
    if not arn.startswith("arn:") or arn.count(":") != 5:
        raise invalid_hook(hook, "url", repr(hook.url), URL_FORMAT, "Copy the topic's ARN.")

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        entries = [message_of(hook, arn, event, position) for position, event in enumerate(events)]
        for entry in entries:
            entry["Message"] = entry.pop("Body")
        return read_entries(client.publish_batch(TopicArn=arn, PublishBatchRequestEntries=entries), len(events))

    def check(client: Any) -> object:
        return client.get_topic_attributes(TopicArn=arn)

    return open_aws(hook, "sns", url_format=URL_FORMAT, put=put, check=check, limits=LIMITS)
