"""What the AWS destinations share: boto3 in a thread, credentials and region as AWS's own tools read them.

`?region=eu-west-1` chooses a region; without it AWS_REGION or the profile does.
"""

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Outcome, failed, wrong
from receiver.hooks import Hook
from submitter.event import Event

Put = Callable[[Any, Event], str]
"""Sends one event by a client, and returns what the service answered; raises ClientError, or Refused."""


class Refused(Exception):
    """A 2xx of AWS that says that an entry was not taken."""


class AwsDestination:
    """One queue, topic, stream or bus. `look` raises when it is not there."""

    def __init__(self, client: Any, put: Put, look: Callable[[Any], object]) -> None:
        self._client = client
        self._put = put
        self._look = look

    async def send(self, event: Event, now_s: float) -> Outcome:
        try:
            return Outcome(True, await asyncio.to_thread(self._put, self._client, event))
        except (ClientError, BotoCoreError, Refused) as error:
            return failed(error)

    async def reach(self) -> str | None:
        try:
            await asyncio.to_thread(self._look, self._client)
        except (ClientError, BotoCoreError) as error:
            return failed(error).answer
        return None

    async def close(self) -> None:
        self._client.close()


def open_aws(hook: Hook, service: str, *, shape: str, put: Put, look: Callable[[Any], object]) -> AwsDestination:
    """Open a client of `service`; raise InvalidSettings for a wrong URL, or when no region is known."""
    asked = parse_qs(hook.url.partition("?")[2])
    if set(asked) - {"region"} or not name_of(hook):
        raise wrong(hook, "url", repr(hook.url), f"{shape}?region=eu-west-1", "Mend it, or leave the region out.")
    config = Config(
        connect_timeout=5,
        read_timeout=hook.timeout_s,
        max_pool_connections=hook.concurrency,
        retries={"total_max_attempts": 1},  # the hook's schedule tries again
    )
    try:
        client = boto3.client(service, region_name=asked.get("region", [None])[0], config=config)
    except (BotoCoreError, ValueError) as error:
        remedy = "Give ?region=..., or set AWS_REGION."
        raise wrong(hook, "url", repr(hook.url), f"cannot be used: {error}", remedy) from error
    return AwsDestination(client, put, look)


def name_of(hook: Hook) -> str:
    """Return what the URL names."""
    return urlsplit(hook.url).netloc


def message_of(hook: Hook, event: Event) -> tuple[str, dict[str, dict[str, str]]]:
    """Return an event as the body and the attributes of an SQS or SNS message."""
    encoded = encode(event, hook.mode)
    attributes = {f"ce-{name}": value for name, value in encoded.attributes.items()}
    attributes |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
    typed = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
    return encoded.body.decode(), typed


def fifo_of(name: str, event: Event) -> dict[str, str]:
    """Return a FIFO queue's or topic's group and deduplication id: a task's events in order, an event once."""
    if not name.endswith(".fifo"):
        return {}
    return {"MessageGroupId": event.external_task_id, "MessageDeduplicationId": event.id}
