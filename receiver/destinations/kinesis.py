"""Puts events into an Amazon Kinesis data stream (PutRecords): `kinesis://stream?region=eu-west-1`.

Event: a record with the whole CloudEvent (structured mode only); the partition key is the external_task_id.
Delivered: the response has a `SequenceNumber` for the record. Concurrent events share a request.
Order: a task's events are sent one after the other to one shard, so they keep their order.
Limits: 1 MiB per record, 500 records and 5 MiB per request.
Source: https://docs.aws.amazon.com/kinesis/latest/APIReference/API_PutRecords.html.
"""

from collections.abc import Sequence
from typing import Any

from receiver.destinations.aws import AwsDestination, open_aws, read_refusal, resource_name
from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import BatchLimits
from receiver.destinations.cloudevents import with_trace
from receiver.destinations.outcome import Outcome
from receiver.hook import Hook
from submitter.event import Event

LIMITS = BatchLimits(event_bytes=1024 * 1024, events=500, request_bytes=5 * 1024 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL or mode."""
    stream = resource_name(hook)
    if hook.mode != "structured":
        raise invalid_hook(hook, "mode", repr(hook.mode), "structured", "A record has no attributes: remove `mode`.")

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        records = [{"Data": with_trace(event), "PartitionKey": event.external_task_id} for event in events]
        response = client.put_records(StreamName=stream, Records=records)
        return [
            Outcome(True, f"{record['ShardId']}, sequence {record['SequenceNumber']}")
            if "SequenceNumber" in record
            else read_refusal(record, "ErrorCode", "ErrorMessage")
            for record in response["Records"]
        ]

    def check(client: Any) -> object:
        return client.describe_stream_summary(StreamName=stream)

    return open_aws(hook, "kinesis", url_format="kinesis://stream", put=put, check=check, limits=LIMITS)
