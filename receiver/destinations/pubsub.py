"""Publishes events to a Google Pub/Sub topic: `pubsub://project/topic?endpoint=https://europe-west1-pubsub.googleapis.com`.

Attributes follow Google's Pub/Sub binding for CloudEvents (`ce-` in binary mode, `content-type`);
the ordering key is the task, which a subscription with ordering heeds. An event is acknowledged
when Pub/Sub has given it an id; what is sent at once shares a request. Credentials are Google's
application default ones; `PUBSUB_EMULATOR_HOST` names an emulator, which needs none.
"""

import asyncio
import base64
import os
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import google.auth
import httpx
import msgspec
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import Request
from requests import Session

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Outcome, failed, wrong
from receiver.destinations.batches import Batches, Limits
from receiver.destinations.http import open_client, post
from receiver.hooks import Hook
from submitter.event import Event

ENDPOINT = "https://pubsub.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/pubsub"
PUBLISH = "pubsub.topics.publish"
SHAPE = "pubsub://project/topic"
LIMITS = Limits(event_bytes=7_000_000, events=1000, request_bytes=7_000_000)  # of 10 MB as base64


class _Answer(msgspec.Struct, rename="camel"):
    message_ids: list[str] = []
    permissions: list[str] = []


class PubsubDestination:
    """One topic, over the REST API."""

    def __init__(self, hook: Hook, client: httpx.AsyncClient, topic_url: str, *, is_emulator: bool) -> None:
        self._hook = hook
        self._client = client
        self._topic_url = topic_url
        self._is_emulator = is_emulator
        self._credentials: Any = None
        self._refreshing = asyncio.Lock()
        self._batches = Batches(self._post, LIMITS)

    async def send(self, event: Event, now_s: float) -> Outcome:
        return await self._batches.send(event, now_s)

    async def _post(self, events: list[Event], now_s: float) -> list[Outcome]:
        messages = {"messages": [self._message(event) for event in events]}
        outcome, answer = await self._call("publish", messages, now_s)
        if not outcome.is_delivered:
            return [outcome] * len(events)
        ids = answer.message_ids
        if len(ids) != len(events):
            return [Outcome(False, f"{len(ids)} ids for {len(events)} messages: {outcome.answer}")] * len(events)
        return [Outcome(True, f"message {id}") for id in ids]

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
            outcome, said = await post(self._client, url, content, headers, now_s, patience_s=self._hook.timeout_s)
            answer = msgspec.json.decode(said, type=_Answer) if outcome.is_delivered else _Answer()
        except (GoogleAuthError, msgspec.DecodeError) as error:
            return failed(error), _Answer()
        return msgspec.structs.replace(outcome, is_gone=False), answer  # 410 is no word of a topic's

    async def _token(self) -> str:
        """Return an access token, refreshed in a thread when it is about to end."""
        async with self._refreshing:
            if self._credentials is None:
                self._credentials, _ = await asyncio.to_thread(google.auth.default, scopes=[SCOPE])
            if not self._credentials.valid:
                await asyncio.to_thread(_refresh, self._credentials)
        return str(self._credentials.token)

    async def reach(self) -> str | None:
        outcome, answer = await self._call("testIamPermissions", {"permissions": [PUBLISH]}, 0)
        if not outcome.is_delivered:
            return outcome.answer
        return None if PUBLISH in answer.permissions else f"the topic is not there, or {PUBLISH} is not permitted"

    async def close(self) -> None:
        await self._batches.close()
        await self._client.aclose()


def _refresh(credentials: Any) -> None:
    with Session() as session:
        credentials.refresh(Request(session))


def open(hook: Hook, allow_hosts: frozenset[str]) -> PubsubDestination:
    """Open a topic."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    project, topic = parts.netloc, parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._~+%-]{2,254}", topic) or not project:
        raise wrong(hook, "url", repr(hook.url), SHAPE, "Name project and topic.")
    emulator = os.environ.get("PUBSUB_EMULATOR_HOST")
    endpoint = f"http://{emulator}" if emulator else asked.get("endpoint", [ENDPOINT])[0]
    if set(asked) - {"endpoint"} or urlsplit(endpoint).scheme not in ("https", "http"):
        raise wrong(hook, "url", f"?{parts.query}", "?endpoint=https://...", "Mend it, or leave it out.")
    topic_url = f"{endpoint.rstrip('/')}/v1/projects/{project}/topics/{topic}"
    return PubsubDestination(hook, open_client(hook, allow_hosts), topic_url, is_emulator=bool(emulator))
