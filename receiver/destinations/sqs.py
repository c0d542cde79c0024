"""Sends events to an Amazon SQS queue (SendMessageBatch): `sqs://queue?region=eu-west-1`, or `sqs://queue.fifo`.

Event: a message with the CloudEvent; in binary mode its data, and the attributes as message attributes `ce-...`
(CloudEvents defines no SQS binding). Message attributes in both modes: `content-type`, `traceparent`.
Delivered: the response has a `MessageId` for the entry. Concurrent events share a request.
Order: kept in a FIFO queue, where the message group is the external_task_id. Its deduplication id is the event's id.
Limits: 256 KiB per event and per request, 10 events per request.
Source: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_SendMessageBatch.html.
"""

from collections.abc import Sequence

from receiver.destinations.aws import (
    AwsClient,
    AwsDestination,
    Service,
    message_of,
    open_aws,
    read_entries,
    resource_name,
)
from receiver.destinations.batches import BatchLimits
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

SERVICE = Service("sqs", "SQS", "AmazonSQS", "application/x-amz-json-1.0")
LIMITS = BatchLimits(event_bytes=256 * 1024, events=10, request_bytes=256 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL. The first use looks up the queue."""
    queue = resource_name(hook)
    urls: dict[str, str] = {}

    def queue_url(client: AwsClient) -> str:
        if queue not in urls:
            urls[queue] = client.call("GetQueueUrl", QueueName=queue)["QueueUrl"]
        return urls[queue]

    def put(client: AwsClient, events: Sequence[Event]) -> list[Outcome]:
        entries = [message_of(hook, queue, event, position) for position, event in enumerate(events)]
        for entry in entries:
            entry["MessageBody"] = entry.pop("Body")
        response = client.call("SendMessageBatch", QueueUrl=queue_url(client), Entries=entries)
        return read_entries(response, len(events))

    def check(client: AwsClient) -> str:
        urls.clear()  # a cached URL would hide that the queue is gone
        return queue_url(client)

    return open_aws(hook, SERVICE, url_format="sqs://queue", put=put, check=check, limits=LIMITS)
