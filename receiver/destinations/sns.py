"""Publishes events to an SNS topic: `sns://arn:aws:sns:eu-west-1:123456789012:topic`.

CloudEvents has no binding for SNS: the attributes are message attributes `ce-...` in binary
mode. For a FIFO topic the group is the task and the deduplication id the event's id.
"""

from collections.abc import Sequence
from typing import Any

from receiver.destinations.aws import AwsDestination, message_of, name_of, open_aws, read_entries
from receiver.destinations.base import Outcome, wrong
from receiver.destinations.batches import Limits
from receiver.hooks import Hook
from submitter.event import Event

SHAPE = "sns://arn:aws:sns:eu-west-1:123456789012:topic"
LIMITS = Limits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a topic."""
    arn = name_of(hook)
    if not arn.startswith("arn:") or arn.count(":") != 5:
        raise wrong(hook, "url", repr(hook.url), SHAPE, "Copy the topic's ARN.")

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        entries = [message_of(hook, arn, event, position) for position, event in enumerate(events)]
        for entry in entries:
            entry["Message"] = entry.pop("Body")
        return read_entries(client.publish_batch(TopicArn=arn, PublishBatchRequestEntries=entries), len(events))

    def look(client: Any) -> object:
        return client.get_topic_attributes(TopicArn=arn)

    return open_aws(hook, "sns", shape=SHAPE, put=put, look=look, limits=LIMITS)
