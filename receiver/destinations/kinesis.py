"""Puts events into a Kinesis stream: `kinesis://stream?region=eu-west-1`.

A record is the whole CloudEvent; its partition key is the task, whose events so stay in order.
"""

from collections.abc import Sequence
from typing import Any

from receiver.cloudevents import with_trace
from receiver.destinations.aws import AwsDestination, name_of, open_aws, read_refusal
from receiver.destinations.base import Outcome, wrong
from receiver.destinations.batches import Limits
from receiver.hooks import Hook
from submitter.event import Event

LIMITS = Limits(event_bytes=1024 * 1024, events=500, request_bytes=5 * 1024 * 1024)


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a stream."""
    stream = name_of(hook)
    if hook.mode != "structured":
        raise wrong(hook, "mode", repr(hook.mode), "structured", "A record has no attributes: leave `mode` out.")

    def put(client: Any, events: Sequence[Event]) -> list[Outcome]:
        records = [{"Data": with_trace(event), "PartitionKey": event.external_task_id} for event in events]
        answer = client.put_records(StreamName=stream, Records=records)
        return [
            Outcome(True, f"{record['ShardId']}, sequence {record['SequenceNumber']}")
            if "SequenceNumber" in record
            else read_refusal(record, "ErrorCode", "ErrorMessage")
            for record in answer["Records"]
        ]

    def look(client: Any) -> object:
        return client.describe_stream_summary(StreamName=stream)

    return open_aws(hook, "kinesis", shape="kinesis://stream", put=put, look=look, limits=LIMITS)
