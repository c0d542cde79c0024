"""Publishes events to an MQTT 5 topic: `mqtt://user:password@host:1883/topic/levels?qos=1`, or `mqtts://` for TLS.

Event: a PUBLISH in the CloudEvents MQTT binding. A topic level `*` is replaced by the event's type. Properties:
the content type, and the user properties `traceparent` and, in binary mode, the attributes under their own names.
Delivered: with `qos=1` (the default) or `qos=2` the broker acknowledged the event without an error reason code;
with `qos=0` the event was sent.
Order: one event is in flight at a time.
Sources: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/mqtt-protocol-binding.md,
https://docs.oasis-open.org/mqtt/mqtt/v5.0/mqtt-v5.0.html.
"""

import asyncio
import ssl
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from receiver.destinations.base import invalid_hook
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.connection import KeptConnection, race
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.egress import require_allowed
from submitter.event import Event

CONNECTION_ERRORS = (aiomqtt.MqttError, OSError)


class _Client(aiomqtt.Client):
    """An aiomqtt client that records refusals: aiomqtt treats an error reason code as an acknowledgement."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.refusals: list[str] = []

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any) -> None:
        if reason_code.is_failure:
            self.refusals.append(str(reason_code))
        super()._on_publish(client, userdata, mid, reason_code, properties)


class MqttDestination:
    """One topic, on one connection. One event is in flight at a time, so a refusal belongs to that event."""

    def __init__(self, hook: Hook, topic: str, qos: int, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._topic = topic
        self._qos = qos
        self._allow_hosts = allow_hosts
        self._password = urlsplit(hook.url).password
        self._kept = KeptConnection(self._connect, _disconnect)
        self._in_flight = asyncio.Lock()

    async def _connect(self) -> _Client:
        await require_allowed(self._hook.url, self._allow_hosts)
        parts = urlsplit(self._hook.url)
        is_tls = parts.scheme == "mqtts"
        client = _Client(
            parts.hostname or "",
            parts.port or (8883 if is_tls else 1883),
            username=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else unquote(parts.password),
            protocol=aiomqtt.ProtocolVersion.V5,
            tls_context=ssl.create_default_context() if is_tls else None,
            timeout=min(self._hook.timeout_s, 5),
        )
        await client.__aenter__()
        return client

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = encoded.content_type
        properties.UserProperty = [*encoded.attributes.items(), ("traceparent", traceparent(event))]
        topic = "/".join(event.type if level == "*" else level for level in self._topic.split("/"))
        client = None
        try:
            async with self._in_flight:
                client = await self._kept.get()
                publishing = client.publish(
                    topic, encoded.body, self._qos, properties=properties, timeout=self._hook.timeout_s
                )
                await race(_disconnected(client), publishing)
                if client.refusals:
                    return Outcome(False, client.refusals.pop())
        except CONNECTION_ERRORS as error:
            if client is not None:
                await self._kept.drop(client)
            return failed_outcome(error, self._password)
        except ValueError as error:  # refused by the client's own limits; the connection is still usable
            return failed_outcome(error, self._password)
        return Outcome(True, "acknowledged" if self._qos else "sent")

    async def reach(self) -> str | None:
        try:
            client = await self._kept.get()
            if client._disconnected.done():
                await self._kept.drop(client)
                await self._kept.get()
        except CONNECTION_ERRORS as error:
            return failed_outcome(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> MqttDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    topic = unquote(parts.path.strip("/"))
    levels = topic.split("/")
    if not parts.hostname or not topic or "#" in hook.url or any("+" in level for level in levels):
        found = f"{parts.scheme}://{parts.hostname or ''}/{topic}"
        remedy = "Name the host and the topic, without # and +."
        raise invalid_hook(hook, "url", found, "mqtt://host:1883/topic/levels", remedy)
    qos = options.get("qos", ["1"])[0]
    if qos not in ("0", "1", "2") or set(options) - {"qos"}:
        remedy = "Use only the option `qos`, with one of these values."
        raise invalid_hook(hook, "url", f"?{parts.query}", "?qos=0, 1 or 2", remedy)
    return MqttDestination(hook, topic, int(qos), allow_hosts)


async def _disconnected(client: _Client) -> None:
    """Return when the connection ends."""
    await asyncio.wait({client._disconnected})


async def _disconnect(client: _Client) -> None:
    if client._disconnected.done() and not client._disconnected.cancelled():
        client._disconnected.exception()  # mark as retrieved: the attempt's outcome reported it
    try:
        await client.__aexit__(None, None, None)
    except aiomqtt.MqttError:
        return  # the connection was lost already
