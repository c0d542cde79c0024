"""What the AWS destinations share: boto3 in a thread, credentials and region as AWS's own tools read them.

`?region=eu-west-1` chooses a region; without it AWS_REGION or the profile does. What is sent at
once shares a request, whose answer tells the end of each entry. The limits are AWS's smallest of
the last years; an entry that is larger than them is refused here, since it would spoil its batch.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Outcome, failed, wrong
from receiver.destinations.batches import Batches, Limits
from receiver.hooks import Hook
from submitter.event import Event

Put = Callable[[Any, Sequence[Event]], list[Outcome]]
"""Sends some events by a client as one request, and returns what became of each; raises ClientError."""


class AwsDestination:
    """One queue, topic, stream or bus. `look` raises when it is not there."""

    def __init__(self, client: Any, put: Put, look: Callable[[Any], object], limits: Limits) -> None:
        self._client = client
        self._put = put
        self._look = look
        self._batches = Batches(self._post, limits)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        try:
            return await asyncio.to_thread(self._put, self._client, events)
        except (ClientError, BotoCoreError) as error:
            return [failed(error)] * len(events)

    async def reach(self) -> str | None:
        try:
            await asyncio.to_thread(self._look, self._client)
        except (ClientError, BotoCoreError) as error:
            return failed(error).answer
        return None

    async def close(self) -> None:
        await self._batches.close()
        self._client.close()


def open_aws(
    hook: Hook, service: str, *, shape: str, put: Put, look: Callable[[Any], object], limits: Limits
) -> AwsDestination:
    """Open a client of `service`; raise InvalidSettings for a wrong URL, or when no region is known."""
    asked = parse_qs(hook.url.partition("?")[2])
    if set(asked) - {"region"} or not name_of(hook):
        raise wrong(hook, "url", repr(hook.url), f"{shape}?region=eu-west-1", "Mend it, or leave the region out.")
    config = Config(
        connect_timeout=5,
        read_timeout=hook.timeout_s,
        max_pool_connections=-(-hook.concurrency // limits.events),
        retries={"total_max_attempts": 1},  # the hook's schedule tries again
    )
    try:
        client = boto3.client(service, region_name=asked.get("region", [None])[0], config=config)
    except (BotoCoreError, ValueError) as error:
        remedy = "Give ?region=..., or set AWS_REGION."
        raise wrong(hook, "url", repr(hook.url), f"cannot be used: {error}", remedy) from error
    return AwsDestination(client, put, look, limits)


def name_of(hook: Hook) -> str:
    """Return what the URL names."""
    return urlsplit(hook.url).netloc


def message_of(hook: Hook, name: str, event: Event, position: int) -> dict[str, Any]:
    """Return an event as what an entry for SQS and one for SNS have in common, but for the body's name.

    In a FIFO queue or topic (`name`) a task's events stay in order, and a repeated event is dropped.
    """
    encoded = encode(event, hook.mode)
    attributes = {f"ce-{name}": value for name, value in encoded.attributes.items()}
    attributes |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
    typed = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
    entry = {"Id": str(position), "Body": encoded.body.decode(), "MessageAttributes": typed}
    if name.endswith(".fifo"):
        entry |= {"MessageGroupId": event.external_task_id, "MessageDeduplicationId": event.id}
    return entry


def read_entries(answer: Mapping[str, Any], count: int) -> list[Outcome]:
    """Return what became of each of `count` entries, by the answer of SQS or SNS to a batch."""
    taken = {entry["Id"]: Outcome(True, f"message {entry['MessageId']}") for entry in answer.get("Successful", ())}
    refused = {entry["Id"]: read_refusal(entry, "Code", "Message") for entry in answer.get("Failed", ())}
    unsaid = Outcome(False, "the answer does not name this entry")
    return [(taken | refused).get(str(position), unsaid) for position in range(count)]


def read_refusal(entry: Mapping[str, Any], code: str, message: str) -> Outcome:
    """Return the outcome of an entry that a service refused in a batch that it took."""
    return Outcome(False, f"{entry.get(code)}: {entry.get(message, '')}"[:500])
