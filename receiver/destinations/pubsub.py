"""Publishes events to a Google Cloud Pub/Sub topic, over its REST API (projects.topics.publish).

URL: `pubsub://project/topic?endpoint=https://europe-west1-pubsub.googleapis.com`; `endpoint` is optional.
Credentials are Application Default Credentials. `PUBSUB_EMULATOR_HOST` names an emulator, which needs none.

Event: a message in Google's Pub/Sub binding for CloudEvents. Attributes: `content-type`, `traceparent` and, in
binary mode, the CloudEvent's attributes `ce-...`. The ordering key is the external_task_id.
Delivered: Pub/Sub returned a message id. One event per request, since all messages of a request must have the same
ordering key.
Order: kept by a subscription with message ordering.
Limits: 10 MB (7 MB before base64) per event.
Sources: https://cloud.google.com/pubsub/docs/reference/rest/v1/projects.topics/publish,
https://github.com/googleapis/google-cloudevents/blob/main/docs/spec/pubsub.md.
"""

import asyncio
import base64
import os
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import google.auth
import msgspec
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request
from requests import Session

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import size_of, too_large
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.http import open_client, post
from receiver.destinations.http_client import HttpClient
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.event import Event

ENDPOINT = "https://pubsub.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/pubsub"
PUBLISH_PERMISSION = "pubsub.topics.publish"
URL_FORMAT = "pubsub://project/topic"
EVENT_BYTES = 7_000_000  # 10 MB in base64


class _Answer(msgspec.Struct, rename="camel"):
    message_ids: list[str] = []
    permissions: list[str] = []


class PubsubDestination:
    """One topic."""

    def __init__(self, hook: Hook, client: HttpClient, topic_url: str, *, is_emulator: bool) -> None:
        self._hook = hook
        self._client = client
        self._topic_url = topic_url
        self._is_emulator = is_emulator
        self._credentials: Any = None
        self._refreshing = asyncio.Lock()

    async def send(self, event: Event, now_s: float) -> Outcome:
        if size_of(event) > EVENT_BYTES:
            return too_large(event, EVENT_BYTES)
        outcome, answer = await self._call("publish", {"messages": [self._message(event)]}, now_s)
        if not outcome.is_delivered:
            return outcome
        if len(answer.message_ids) != 1:
            return Outcome(False, f"{len(answer.message_ids)} ids for one message: {outcome.answer}")
        return Outcome(True, f"message {answer.message_ids[0]}")

    def _message(self, event: Event) -> dict[str, Any]:
        encoded = encode(event, self._hook.mode)
        attributes = {f"ce-{name}": value for name, value in encoded.attributes.items()}
        attributes |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
        data = base64.b64encode(encoded.body).decode()
        return {"data": data, "attributes": attributes, "orderingKey": event.external_task_id}

    async def _call(self, verb: str, body: object, now_s: float) -> tuple[Outcome, _Answer]:
        headers = {"content-type": "application/json"}
        try:
            if not self._is_emulator:
                headers["authorization"] = f"Bearer {await self._token()}"
            url = f"{self._topic_url}:{verb}"
            content = msgspec.json.encode(body)
            outcome, response_body = await post(
                self._client, url, content, headers, now_s, body_timeout_s=self._hook.timeout_s
            )
            answer = msgspec.json.decode(response_body, type=_Answer) if outcome.is_delivered else _Answer()
        except (GoogleAuthError, msgspec.DecodeError) as error:
            return failed_outcome(error), _Answer()
        return msgspec.structs.replace(outcome, is_gone=False), answer  # 410 does not mean that the topic is gone

    async def _token(self) -> str:
        """Return an access token, refreshed in a thread if it has expired or is about to."""
        async with self._refreshing:
            if self._credentials is None:
                self._credentials, _ = await asyncio.to_thread(google.auth.default, scopes=[SCOPE])
            if not self._credentials.valid:
                await asyncio.to_thread(_refresh, self._credentials)
        return str(self._credentials.token)

    async def reach(self) -> str | None:
        outcome, answer = await self._call("testIamPermissions", {"permissions": [PUBLISH_PERMISSION]}, 0)
        if not outcome.is_delivered:
            return outcome.answer
        if PUBLISH_PERMISSION not in answer.permissions:
            return f"the topic does not exist, or {PUBLISH_PERMISSION} is not granted"
        return None

    async def close(self) -> None:
        await self._client.close()


def _refresh(credentials: Any) -> None:
    with Session() as session:
        credentials.refresh(Request(session))


def open(hook: Hook, allow_hosts: frozenset[str]) -> PubsubDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    project, topic = parts.netloc, parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._~+%-]{2,254}", topic) or not project:
        raise invalid_hook(hook, "url", repr(hook.url), URL_FORMAT, "Name the project and the topic.")
    emulator = os.environ.get("PUBSUB_EMULATOR_HOST")
    endpoint = f"http://{emulator}" if emulator else options.get("endpoint", [ENDPOINT])[0]
    if set(options) - {"endpoint"} or urlsplit(endpoint).scheme not in ("https", "http"):
        remedy = "Use no option but `endpoint`, with an HTTP(S) URL."
        raise invalid_hook(hook, "url", f"?{parts.query}", "?endpoint=https://...", remedy)
    topic_url = f"{endpoint.rstrip('/')}/v1/projects/{project}/topics/{topic}"
    return PubsubDestination(hook, open_client(hook, allow_hosts), topic_url, is_emulator=bool(emulator))
