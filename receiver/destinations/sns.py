"""Publishes events to an SNS topic: `sns://arn:aws:sns:eu-west-1:123456789012:topic`.

CloudEvents has no binding for SNS: the attributes are message attributes `ce-...` in binary
mode. For a FIFO topic the group is the task and the deduplication id the event's id.
"""

from typing import Any

from receiver.destinations.aws import AwsDestination, fifo_of, message_of, name_of, open_aws
from receiver.destinations.base import wrong
from receiver.hooks import Hook
from submitter.event import Event

SHAPE = "sns://arn:aws:sns:eu-west-1:123456789012:topic"


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a topic."""
    arn = name_of(hook)
    if not arn.startswith("arn:") or arn.count(":") != 5:
        raise wrong(hook, "url", repr(hook.url), SHAPE, "Copy the topic's ARN.")

    def put(client: Any, event: Event) -> str:
        body, attributes = message_of(hook, event)
        answer = client.publish(TopicArn=arn, Message=body, MessageAttributes=attributes, **fifo_of(arn, event))
        return f"message {answer['MessageId']}"

    def look(client: Any) -> object:
        return client.get_topic_attributes(TopicArn=arn)

    return open_aws(hook, "sns", shape=SHAPE, put=put, look=look)
