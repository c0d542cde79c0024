"""Puts events into a Kinesis stream: `kinesis://stream?region=eu-west-1`.

A record is the whole CloudEvent; its partition key is the task, whose events so stay in order.
"""

from typing import Any

from receiver.destinations.aws import AwsDestination, name_of, open_aws
from receiver.destinations.base import wrong
from receiver.hooks import Hook
from submitter.event import Event


def open(hook: Hook, allow_hosts: frozenset[str]) -> AwsDestination:
    """Open a stream."""
    stream = name_of(hook)
    if hook.mode != "structured":
        raise wrong(hook, "mode", repr(hook.mode), "structured", "A record has no attributes: leave `mode` out.")

    def put(client: Any, event: Event) -> str:
        answer = client.put_record(StreamName=stream, Data=event.body, PartitionKey=event.external_task_id)
        return f"{answer['ShardId']}, sequence {answer['SequenceNumber']}"

    def look(client: Any) -> object:
        return client.describe_stream_summary(StreamName=stream)

    return open_aws(hook, "kinesis", shape="kinesis://stream", put=put, look=look)
