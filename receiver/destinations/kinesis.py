"""Puts events into an Amazon Kinesis data stream (PutRecords): `kinesis://stream?region=eu-west-1`.

Event: a record with the whole CloudEvent (structured mode only); the partition key is the external_task_id.
Delivered: the response has a `SequenceNumber` for the record. Concurrent events share a request.
Order: a task's events are sent one after the other to one shard, so they keep their order.
Limits: 1 MiB per record, 500 records and 5 MiB per request.
Source: https://docs.aws.amazon.com/kinesis/latest/APIReference/API_PutRecords.html.
"""

from base64 import b64encode
from collections.abc import Sequence

from receiver.destinations.aws import AwsClient, AwsDestination, Service, open_aws, read_refusal, resource_name
from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import BatchLimits
from receiver.destinations.cloudevents import with_trace
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

SERVICE = Service("kinesis", "KINESIS", "Kinesis_20131202")
LIMITS = BatchLimits(event_bytes=1024 * 1024, events=500, request_bytes=5 * 1024 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL or mode."""
    stream = resource_name(hook)
    if hook.mode != "structured":
        raise invalid_hook(hook, "mode", repr(hook.mode), "structured", "A record has no attributes: remove `mode`.")

    def put(client: AwsClient, events: Sequence[Event]) -> list[Outcome]:
        records = [
            {"Data": b64encode(with_trace(event)).decode(), "PartitionKey": event.external_task_id} for event in events
        ]
        response = client.call("PutRecords", StreamName=stream, Records=records)
        return [
            Outcome(True, f"{record['ShardId']}, sequence {record['SequenceNumber']}")
            if record.get("SequenceNumber")
            else read_refusal(record, "ErrorCode", "ErrorMessage")
            for record in response["Records"]
        ]

    def check(client: AwsClient) -> object:
        return client.call("DescribeStreamSummary", StreamName=stream)

    return open_aws(hook, SERVICE, url_format="kinesis://stream", put=put, check=check, limits=LIMITS)
