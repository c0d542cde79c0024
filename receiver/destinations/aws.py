"""Shared by the AWS destinations: boto3 in a thread, batched requests, an outcome for each entry.

Credentials come from boto3's default chain. The region comes from `?region=eu-west-1`, AWS_REGION or the profile.
Each destination's limits are the smallest that AWS documented in recent years. A larger event is refused here,
because it would fail its whole batch. Retries are left to the hook's schedule.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import Batches, BatchLimits
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event

PutBatch = Callable[[Any, Sequence[Event]], list[Outcome]]
"""Sends events as one request of a boto3 client; returns their outcomes in the same order. Raises ClientError."""


class AwsDestination:
    """One queue, topic, stream or event bus. `check` calls the API and raises if the resource does not exist."""

    def __init__(self, client: Any, put: PutBatch, check: Callable[[Any], object], limits: BatchLimits) -> None:
        self._client = client
        self._put = put
        self._check = check
        self._batches = Batches(self._post, limits)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        try:
            return await asyncio.to_thread(self._put, self._client, events)
        except (ClientError, BotoCoreError) as error:
            return [failed_outcome(error)] * len(events)

    async def reach(self) -> str | None:
        try:
            await asyncio.to_thread(self._check, self._client)
        except (ClientError, BotoCoreError) as error:
            return failed_outcome(error).answer
        return None

    async def close(self) -> None:
        await self._batches.close()
        self._client.close()


def open_aws(
    hook: Hook, service: str, *, url_format: str, put: PutBatch, check: Callable[[Any], object], limits: BatchLimits
) -> AwsDestination:
    """Return a destination with a client of `service`; raise InvalidSettings for an invalid URL or a missing region."""
    options = parse_qs(hook.url.partition("?")[2])
    if set(options) - {"region"} or not resource_name(hook):
        limit, remedy = f"{url_format}?region=eu-west-1", "Give the name, and no option but `region`."
        raise invalid_hook(hook, "url", repr(hook.url), limit, remedy)
    config = Config(
        connect_timeout=5,
        read_timeout=hook.timeout_s,
        max_pool_connections=-(-hook.concurrency // limits.events),  # rounded up: one for each full batch
        retries={"total_max_attempts": 1},  # the hook's schedule retries
    )
    try:
        client = boto3.client(service, region_name=options.get("region", [None])[0], config=config)
    except (BotoCoreError, ValueError) as error:
        remedy = "Add ?region=... to the URL, or set AWS_REGION."
        raise invalid_hook(hook, "url", repr(hook.url), f"cannot be used: {error}", remedy) from error
    return AwsDestination(client, put, check, limits)


def resource_name(hook: Hook) -> str:
    """Return the name (of SNS: the ARN) of the resource in a hook's URL."""
    return urlsplit(hook.url).netloc


def message_of(hook: Hook, name: str, event: Event, position: int) -> dict[str, Any]:
    """Return an event as a batch entry of SQS or SNS; the caller renames `Body`, the field that differs.

    In a FIFO queue or topic (`name` ends in `.fifo`) the message group is the task, which keeps its events in
    order, and the deduplication id is the event's id, which drops repeats.
    """
    encoded = encode(event, hook.mode)
    attributes = {f"ce-{name}": value for name, value in encoded.attributes.items()}
    attributes |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
    typed = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
    entry = {"Id": str(position), "Body": encoded.body.decode(), "MessageAttributes": typed}
    if name.endswith(".fifo"):
        entry |= {"MessageGroupId": event.external_task_id, "MessageDeduplicationId": event.id}
    return entry


def read_entries(response: Mapping[str, Any], count: int) -> list[Outcome]:
    """Return the outcome of each of `count` entries in an SQS or SNS batch response."""
    accepted = {entry["Id"]: Outcome(True, f"message {entry['MessageId']}") for entry in response.get("Successful", ())}
    refused = {entry["Id"]: read_refusal(entry, "Code", "Message") for entry in response.get("Failed", ())}
    missing = Outcome(False, "the response does not contain this entry")
    return [(accepted | refused).get(str(position), missing) for position in range(count)]


def read_refusal(entry: Mapping[str, Any], code: str, message: str) -> Outcome:
    """Return the outcome of an entry that was refused in an otherwise accepted batch."""
    return Outcome(False, f"{entry.get(code)}: {entry.get(message, '')}"[:500])
