"""Publishes events to NATS: `nats://user:password@host:4222/subject?jetstream=true`.

Headers follow CloudEvents' NATS binding (`ce-` attributes in binary mode, `content-type`). Core
NATS keeps nothing: an event is acknowledged when the server has answered a ping behind it. With
`jetstream=true` it is acknowledged when a stream has stored it, which drops duplicates by
`Nats-Msg-Id` (the event's id). A `*` in the subject becomes the event's type.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Kept, Outcome, failed, unless, wrong
from receiver.destinations.batches import size_of, too_large
from receiver.hooks import Hook
from submitter.egress import AddressForbidden, require_allowed
from submitter.event import Event

T = TypeVar("T")


class _Link:
    """A connection, and the moment when it broke: what waits for an answer then need not go on."""

    def __init__(self) -> None:
        self.client = Client()
        self._broken = asyncio.Event()

    async def broke(self) -> None:
        self._broken.set()

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; raise ConnectionError once the connection broke."""
        return await unless(self._broken.wait(), work)


class NatsDestination:
    """One subject, over one connection."""

    def __init__(self, hook: Hook, subject: str, *, jetstream: bool, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._subject = subject
        self._jetstream = jetstream
        self._allow_hosts = allow_hosts
        self._kept = Kept(self._connect, _disconnect)
        self._password = urlsplit(hook.url).password

    async def _connect(self) -> _Link:
        parts = urlsplit(self._hook.url)
        await require_allowed(self._hook.url, self._allow_hosts)
        link = _Link()
        await link.client.connect(
            f"{parts.scheme}://{parts.hostname}:{parts.port or 4222}",
            user=unquote(parts.username) if parts.username and parts.password is not None else None,
            password=unquote(parts.password) if parts.password is not None else None,
            token=unquote(parts.username) if parts.username and parts.password is None else None,
            allow_reconnect=False,  # a connection that broke is opened anew by the next attempt
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            closed_cb=link.broke,
            connect_timeout=max(1, int(min(self._hook.timeout_s, 5))),
            error_cb=_ignore,
            name="kling-relay",
        )
        return link

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        headers = {f"ce-{name}": value for name, value in encoded.attributes.items()}
        headers |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
        subject = self._subject.replace("*", event.type)
        link = None
        try:
            link = await self._kept.get()
            if size_of(event) > link.client.max_payload:  # the server counts headers too, and would hang up
                return too_large(event, link.client.max_payload)
            if self._jetstream:
                headers["Nats-Msg-Id"] = event.id
                stream = link.client.jetstream(timeout=self._hook.timeout_s)
                ack = await link.answer(stream.publish(subject, encoded.body, headers=headers))
                again = ", a duplicate" if ack.duplicate else ""
                return Outcome(True, f"stream {ack.stream}, sequence {ack.seq}{again}")
            await link.client.publish(subject, encoded.body, headers=headers)
            await link.answer(link.client.flush(timeout=max(1, int(self._hook.timeout_s))))
        except nats.js.errors.Error as error:  # the server's answer: the connection is well
            return failed(error, self._password)
        except (nats.errors.Error, OSError, AddressForbidden) as error:
            if link is not None:
                await self._kept.drop(link)
            return failed(error, self._password)
        return Outcome(True, "the server has it")

    async def reach(self) -> str | None:
        link = None
        try:
            link = await self._kept.get()
            await link.answer(link.client.flush(timeout=5))
            if self._jetstream:
                await link.answer(link.client.jetstream(timeout=5).find_stream_name_by_subject(self._subject))
        except nats.js.errors.NotFoundError:
            return f"no stream takes {self._subject!r}"
        except (nats.errors.Error, OSError, AddressForbidden) as error:
            if link is not None:
                await self._kept.drop(link)
            return failed(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> NatsDestination:
    """Open a subject."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    subject = unquote(parts.path.strip("/"))
    jetstream = asked.get("jetstream", ["false"])[0]
    if not parts.hostname or not subject or any(letter in subject for letter in " >/"):
        found = f"nats://{parts.hostname or ''}/{subject}"
        raise wrong(hook, "url", found, "nats://host:4222/subject", "Name host and subject.")
    if jetstream not in ("true", "false") or set(asked) - {"jetstream"}:
        raise wrong(hook, "url", f"?{parts.query}", "?jetstream=true or false", "Choose one of them.")
    return NatsDestination(hook, subject, jetstream=jetstream == "true", allow_hosts=allow_hosts)


async def _disconnect(link: _Link) -> None:
    await link.client.close()


async def _ignore(error: Exception) -> None:
    """Say nothing: each attempt's outcome says what went wrong."""
