"""Shared by the AWS destinations: signed requests in a thread, in batches, an outcome for each entry.

For credentials and endpoints see `submitter.aws`. The region comes from `?region=eu-west-1`, AWS_REGION,
AWS_DEFAULT_REGION or the profile. Each destination's limits are the smallest that AWS documented in recent years. A
larger event is refused here, because it would fail its whole batch. Retries are left to the hook's schedule.
"""

import asyncio
import os
import re
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import Batches, BatchLimits
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.aws import Endpoint, NoCredentials, find_credentials, find_region
from submitter.clock import Clock
from submitter.event import Event

CONNECT_TIMEOUT_S = 5.0


class Refused(Exception):
    """An error response of AWS: its code and its message."""


FAILURES = (Refused, NoCredentials, ConnectionError, msgspec.DecodeError)


class Service(msgspec.Struct, frozen=True):
    """A service of AWS: its name in host names, in AWS_ENDPOINT_URL_<variable> and in X-Amz-Target (JSON protocols)."""

    name: str
    variable: str
    target: str = ""
    content_type: str = "application/x-amz-json-1.1"


class AwsClient:
    """Calls one service. Its methods block, and raise one of FAILURES."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self._service = service
        self._endpoint = endpoint

    def call(self, operation: str, **parameters: Any) -> Any:
        """Return the decoded response of an operation (AWS JSON protocols 1.0 and 1.1)."""
        headers = {"content-type": self._service.content_type, "x-amz-target": f"{self._service.target}.{operation}"}
        return msgspec.json.decode(self._post(headers, msgspec.json.encode(parameters)))

    def query(self, parameters: Mapping[str, str]) -> bytes:
        """Return the XML response to a form (AWS Query protocol)."""
        form = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
        return self._post(form, urlencode(parameters).encode())

    def _post(self, headers: Mapping[str, str], body: bytes) -> bytes:
        try:
            status, content = self._endpoint.post(headers, body)
        except (OSError, HTTPException) as error:
            raise ConnectionError(f"{self._endpoint.host}: {type(error).__name__}: {error}") from error
        if status == 200:
            return content
        raise Refused(read_error(status, content))

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()


def read_error(status: int, content: bytes) -> str:
    """Return the code and the message of an error response, in JSON or in XML."""
    try:
        error = msgspec.json.decode(content)
        code, message = str(error["__type"]).rpartition("#")[2], error.get("message") or error.get("Message")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        text = content.decode(errors="replace")
        found = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", text, re.DOTALL)
        code, message = (found[1], found[2]) if found else (f"HTTP {status}", text)
    return f"{code}: {message or ''}"[:500]


PutBatch = Callable[[AwsClient, Sequence[Event]], list[Outcome]]
"""Sends events as one request; returns their outcomes in the same order. Raises one of FAILURES."""


class AwsDestination:
    """One queue, topic, stream or event bus. `check` calls the API and raises if the resource does not exist."""

    def __init__(
        self, client: AwsClient, put: PutBatch, check: Callable[[AwsClient], object], limits: BatchLimits
    ) -> None:
        self._client = client
        self._put = put
        self._check = check
        self._batches = Batches(self._post, limits)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        try:
            return await asyncio.to_thread(self._put, self._client, events)
        except FAILURES as error:
            return [failed_outcome(error)] * len(events)

    async def reach(self) -> str | None:
        try:
            await asyncio.to_thread(self._check, self._client)
        except FAILURES as error:
            return failed_outcome(error).answer
        return None

    async def close(self) -> None:
        await self._batches.close()
        self._client.close()


def open_aws(
    hook: Hook,
    service: Service,
    *,
    url_format: str,
    put: PutBatch,
    check: Callable[[AwsClient], object],
    limits: BatchLimits,
) -> AwsDestination:
    """Return a destination with a client of `service`.

    Raises InvalidSettings for an invalid URL, without a region, and where no credentials can be found.
    """
    options = parse_qs(hook.url.partition("?")[2])
    if set(options) - {"region"} or not resource_name(hook):
        limit, remedy = f"{url_format}?region=eu-west-1", "Give the name, and no option but `region`."
        raise invalid_hook(hook, "url", repr(hook.url), limit, remedy)
    region = options.get("region", [None])[0] or find_region(os.environ)
    if region is None or not re.fullmatch(r"[a-z0-9-]{3,40}", region):
        remedy = "Add ?region=... to the URL, or set AWS_REGION."
        raise invalid_hook(hook, "url", repr(hook.url), f"needs an AWS region; {region!r} is none", remedy)
    try:
        credentials = find_credentials(os.environ)
    except NoCredentials as error:
        raise invalid_hook(hook, "url", hook.scheme, "needs AWS credentials", str(error)) from error
    endpoint = Endpoint(
        service.name,
        region,
        credentials,
        Clock(),
        variable=service.variable,
        connect_timeout_s=CONNECT_TIMEOUT_S,
        read_timeout_s=hook.timeout_s,
    )
    return AwsDestination(AwsClient(service, endpoint), put, check, limits)


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
    refused = {entry["Id"]: read_refusal(entry, "Code", "Message") for entry in response.get("Failed") or ()}
    missing = Outcome(False, "the response does not contain this entry")
    return [(accepted | refused).get(str(position), missing) for position in range(count)]


def read_refusal(entry: Mapping[str, Any], code: str, message: str) -> Outcome:
    """Return the outcome of an entry that was refused in an otherwise accepted batch."""
    return Outcome(False, f"{entry.get(code)}: {entry.get(message, '')}"[:500])
