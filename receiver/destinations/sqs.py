"""Sends events to an SQS queue: `sqs://queue?region=eu-west-1` (`queue.fifo` for a FIFO queue).

CloudEvents has no binding for SQS: the attributes are message attributes `ce-...` in binary
mode. In a FIFO queue the group is the task and the deduplication id the event's id.
"""

from typing import Any

from receiver.destinations.aws import AwsDestination, fifo_of, message_of, name_of, open_aws
from receiver.hooks import Hook
from submitter.event import Event


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a queue, which is looked up by its name at its first use."""
    queue = name_of(hook)
    urls: dict[str, str] = {}

    def look(client: Any) -> str:
        if queue not in urls:
            urls[queue] = client.get_queue_url(QueueName=queue)["QueueUrl"]
        return urls[queue]

    def put(client: Any, event: Event) -> str:
        body, attributes = message_of(hook, event)
        answer = client.send_message(
            QueueUrl=look(client), MessageBody=body, MessageAttributes=attributes, **fifo_of(queue, event)
        )
        return f"message {answer['MessageId']}"

    def look_anew(client: Any) -> str:
        urls.clear()
        return look(client)

    return open_aws(hook, "sqs", shape="sqs://queue", put=put, look=look_anew)
