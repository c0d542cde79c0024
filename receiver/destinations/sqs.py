"""Sends events to an SQS queue: `sqs://queue?region=eu-west-1` (`queue.fifo` for a FIFO queue).

CloudEvents has no binding for SQS: the attributes are message attributes `ce-...` in binary
mode. In a FIFO queue the group is the task and the deduplication id the event's id.
"""

from collections.abc import Sequence
from typing import Any

from receiver.destinations.aws import AwsDestination, message_of, name_of, open_aws, read_entries
from receiver.destinations.base import Outcome
from receiver.destinations.batches import Limits
from receiver.hooks import Hook
from submitter.event import Event

LIMITS = Limits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a queue, which is looked up by its name at its first use."""
    queue = name_of(hook)
    urls: dict[str, str] = {}

    def look(client: Any) -> str:
        if queue not in urls:
            urls[queue] = client.get_queue_url(QueueName=queue)["QueueUrl"]
        return urls[queue]

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        entries = [message_of(hook, queue, event, position) for position, event in enumerate(events)]
        for entry in entries:
            entry["MessageBody"] = entry.pop("Body")
        return read_entries(client.send_message_batch(QueueUrl=look(client), Entries=entries), len(events))

    def look_anew(client: Any) -> str:
        urls.clear()
        return look(client)

    return open_aws(hook, "sqs", shape="sqs://queue", put=put, look=look_anew, limits=LIMITS)
