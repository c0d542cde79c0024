"""Publishes events to an MQTT 5 broker: `mqtt://user:password@host:1883/topic/levels?qos=1`.

User properties follow CloudEvents' MQTT binding (the attributes by their own names in binary
mode); the content type is MQTT 5's property. With `qos=1` (the default) or 2 an event is
acknowledged when the broker has said so. A `*` as a level becomes the event's type.
"""

import asyncio
import ssl
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Kept, Outcome, failed, unless, wrong
from receiver.hooks import Hook
from submitter.egress import AddressForbidden, require_allowed
from submitter.event import Event

BROKEN = (aiomqtt.MqttError, OSError, AddressForbidden)


class _Client(aiomqtt.Client):
    """aiomqtt's client, which takes a refusal of the broker for an acknowledgement: this one does not."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.refusals: list[str] = []

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any) -> None:
        if reason_code.is_failure:
            self.refusals.append(str(reason_code))
        super()._on_publish(client, userdata, mid, reason_code, properties)


class MqttDestination:
    """One topic, over one connection; one event at a time, so that an answer is surely its own."""

    def __init__(self, hook: Hook, topic: str, qos: int, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._topic = topic
        self._qos = qos
        self._allow_hosts = allow_hosts
        self._password = urlsplit(hook.url).password
        self._kept = Kept(self._connect, _disconnect)
        self._turn = asyncio.Lock()

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
            async with self._turn:
                client = await self._kept.get()
                publishing = client.publish(
                    topic, encoded.body, self._qos, properties=properties, timeout=self._hook.timeout_s
                )
                await unless(_end(client), publishing)
                if client.refusals:
                    return Outcome(False, client.refusals.pop())
        except BROKEN as error:
            if client is not None:
                await self._kept.drop(client)
            return failed(error, self._password)
        except ValueError as error:  # the client's own limits: the connection is well
            return failed(error, self._password)
        return Outcome(True, "acknowledged" if self._qos else "sent")

    async def reach(self) -> str | None:
        try:
            client = await self._kept.get()
            if client._disconnected.done():
                await self._kept.drop(client)
                await self._kept.get()
        except BROKEN as error:
            return failed(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> MqttDestination:
    """Open a topic."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    topic = unquote(parts.path.strip("/"))
    levels = topic.split("/")
    if not parts.hostname or not topic or "#" in hook.url or any("+" in level for level in levels):
        found = f"{parts.scheme}://{parts.hostname or ''}/{topic}"
        raise wrong(hook, "url", found, "mqtt://host:1883/topic/levels", "Name host and topic, without # and +.")
    qos = asked.get("qos", ["1"])[0]
    if qos not in ("0", "1", "2") or set(asked) - {"qos"}:
        raise wrong(hook, "url", f"?{parts.query}", "?qos=0, 1 or 2", "Choose one of them.")
    return MqttDestination(hook, topic, int(qos), allow_hosts)


async def _end(client: _Client) -> None:
    """Return once the connection has ended."""
    await asyncio.wait({client._disconnected})


async def _disconnect(client: _Client) -> None:
    if client._disconnected.done() and not client._disconnected.cancelled():
        client._disconnected.exception()  # it was told by the attempt's outcome
    try:
        await client.__aexit__(None, None, None)
    except aiomqtt.MqttError:
        return  # it was broken already
