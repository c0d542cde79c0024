"""Publishes events to a NATS subject or a JetStream stream: `nats://user:password@host:4222/subject?jetstream=true`.

Event: a message in the CloudEvents NATS binding. A `*` in the subject is replaced by the event's type. Headers:
`content-type`, `traceparent` and, in binary mode, the attributes `ce-...`.
Delivered: with `jetstream=true` a stream stored the event; it drops repeats by `Nats-Msg-Id`, the event's id.
Core NATS (the default) stores nothing; there the server answered a PING that was sent after the event.
Order: a task's events are published one after the other, on one connection.
Limit: the server's `max_payload`.
Sources: https://github.com/cloudevents/spec/blob/main/cloudevents/bindings/nats-protocol-binding.md,
https://docs.nats.io/nats-concepts/jetstream/headers.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import nats.errors
import nats.js.errors
from nats.aio.client import Client

from receiver.destinations.base import invalid_hook
from receiver.destinations.batches import size_of, too_large
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.connection import KeptConnection, race
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.egress import require_allowed
from submitter.event import Event

T = TypeVar("T")


class _Link:
    """A connection that ends every wait for an answer when it is lost."""

    def __init__(self) -> None:
        self.client = Client()
        self._lost = asyncio.Event()

    async def on_closed(self) -> None:
        self._lost.set()

    async def answer(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`; raise ConnectionError if the connection is lost first."""
        return await race(self._lost.wait(), work)


class NatsDestination:
    """One subject, on one connection."""

    def __init__(self, hook: Hook, subject: str, *, jetstream: bool, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._subject = subject
        self._jetstream = jetstream
        self._allow_hosts = allow_hosts
        self._kept = KeptConnection(self._connect, _disconnect)
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
            allow_reconnect=False,  # the next attempt reconnects
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            closed_cb=link.on_closed,
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
            if size_of(event) > link.client.max_payload:  # the server counts headers too, and disconnects
                return too_large(event, link.client.max_payload)
            if self._jetstream:
                headers["Nats-Msg-Id"] = event.id
                stream = link.client.jetstream(timeout=self._hook.timeout_s)
                ack = await link.answer(stream.publish(subject, encoded.body, headers=headers))
                repeat = ", a duplicate" if ack.duplicate else ""
                return Outcome(True, f"stream {ack.stream}, sequence {ack.seq}{repeat}")
            await link.client.publish(subject, encoded.body, headers=headers)
            await link.answer(link.client.flush(timeout=max(1, int(self._hook.timeout_s))))
        except nats.js.errors.Error as error:  # answered by the server; the connection is still usable
            return failed_outcome(error, self._password)
        except (nats.errors.Error, OSError) as error:
            if link is not None:
                await self._kept.drop(link)
            return failed_outcome(error, self._password)
        return Outcome(True, "received by the server")

    async def reach(self) -> str | None:
        link = None
        try:
            link = await self._kept.get()
            await link.answer(link.client.flush(timeout=5))
            if self._jetstream:
                await link.answer(link.client.jetstream(timeout=5).find_stream_name_by_subject(self._subject))
        except nats.js.errors.NotFoundError:
            return f"no JetStream stream stores {self._subject!r}"
        except (nats.errors.Error, OSError) as error:
            if link is not None:
                await self._kept.drop(link)
            return failed_outcome(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> NatsDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    subject = unquote(parts.path.strip("/"))
    jetstream = options.get("jetstream", ["false"])[0]
    if not parts.hostname or not subject or any(letter in subject for letter in " >/"):
        found = f"nats://{parts.hostname or ''}/{subject}"
        raise invalid_hook(hook, "url", found, "nats://host:4222/subject", "Name the host and the subject.")
    if jetstream not in ("true", "false") or set(options) - {"jetstream"}:
        remedy = "Use only the option `jetstream`, with one of these values."
        raise invalid_hook(hook, "url", f"?{parts.query}", "?jetstream=true or false", remedy)
    return NatsDestination(hook, subject, jetstream=jetstream == "true", allow_hosts=allow_hosts)


async def _disconnect(link: _Link) -> None:
    await link.client.close()


async def _ignore(error: Exception) -> None:
    """Ignore an error that the client reports in the background: each attempt's outcome has its error."""
