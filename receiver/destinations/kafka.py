"""Publishes events to a Kafka topic: `kafka://user:password@host:9092,host:9092/topic?sasl=SCRAM-SHA-512`.

`kafkas://` goes over TLS. With user and password in the URL, SASL's PLAIN, unless `sasl` names
another. Headers follow CloudEvents' Kafka binding (`ce_` attributes in binary mode,
`content-type`); the key is the task, whose events so share a partition. An event is acknowledged
when every replica in sync has it (`acks=all`). The client sends what waits for a broker together.
"""

import asyncio
import ssl
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordTooLargeError

from receiver.cloudevents import encode, traceparent
from receiver.destinations.base import Kept, Outcome, failed, wrong
from receiver.hooks import Hook
from submitter.egress import AddressForbidden, require_allowed
from submitter.event import Event

SASL = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
REQUEST_BYTES = 1024 * 1024  # a broker's usual message.max.bytes
BROKEN = (KafkaError, OSError, AddressForbidden, TimeoutError)
SHAPE = "kafka://host:9092/topic"


class KafkaDestination:
    """One topic, over one producer, which opens its connections anew by itself."""

    def __init__(self, hook: Hook, servers: list[str], topic: str, sasl: str, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._servers = servers
        self._topic = topic
        self._sasl = sasl
        self._allow_hosts = allow_hosts
        self._password = urlsplit(hook.url).password
        self._kept = Kept(self._connect, _disconnect)

    async def _connect(self) -> AIOKafkaProducer:
        parts = urlsplit(self._hook.url)
        for server in self._servers:
            await require_allowed(f"kafka://{server}", self._allow_hosts)
        is_tls, is_sasl = parts.scheme == "kafkas", parts.username is not None
        producer = AIOKafkaProducer(
            bootstrap_servers=self._servers,
            client_id="kling-relay",
            acks="all",
            max_request_size=REQUEST_BYTES,
            # The client may wait twice as long: the attempt then ends by the client's word, not by ours.
            request_timeout_ms=max(500, int(self._hook.timeout_s * 400)),
            security_protocol=("SASL_" if is_sasl else "") + ("SSL" if is_tls else "PLAINTEXT"),
            ssl_context=ssl.create_default_context() if is_tls else None,
            sasl_mechanism=self._sasl,
            sasl_plain_username=unquote(parts.username) if parts.username is not None else None,
            sasl_plain_password=unquote(parts.password or "") if is_sasl else None,
        )
        try:
            await producer.start()
        except (KeyError, ValueError) as error:  # how the client ends when SCRAM's proof is refused
            await producer.stop()
            raise ConnectionError("the broker does not take this user and password") from error
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def send(self, event: Event, now_s: float) -> Outcome:
        encoded = encode(event, self._hook.mode)
        headers = {f"ce_{name}": value for name, value in encoded.attributes.items()}
        headers |= {"content-type": encoded.content_type, "traceparent": traceparent(event)}
        try:
            producer = await self._kept.get()
            record = await producer.send_and_wait(
                self._topic,
                encoded.body,
                key=event.external_task_id.encode(),
                headers=[(name, value.encode()) for name, value in headers.items()],
            )
        except (MessageSizeTooLargeError, RecordTooLargeError) as error:
            return msgspec.structs.replace(failed(error), is_final=True)
        except BROKEN as error:
            return failed(error, self._password)
        return Outcome(True, f"partition {record.partition}, offset {record.offset}")

    async def reach(self) -> str | None:
        try:
            producer = await self._kept.get()
            async with asyncio.timeout(min(self._hook.timeout_s, 5)):
                if not await producer.client.force_metadata_update():
                    return f"no broker of {', '.join(self._servers)} answers"
                await producer.partitions_for(self._topic)
        except TimeoutError:
            return f"no broker tells of the topic {self._topic!r}"
        except BROKEN as error:
            return failed(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> KafkaDestination:
    """Open a topic."""
    parts, asked = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    servers = [server if ":" in server else f"{server}:9092" for server in parts.netloc.rpartition("@")[2].split(",")]
    topic = unquote(parts.path.strip("/"))
    if not topic or "/" in topic or not all(server.rpartition(":")[2].isdecimal() for server in servers):
        found = f"{parts.scheme}://{','.join(servers)}{parts.path}"
        raise wrong(hook, "url", found, SHAPE, "Name brokers and topic.")
    sasl = asked.get("sasl", ["PLAIN"])[0]
    if sasl not in SASL or set(asked) - {"sasl"}:
        raise wrong(hook, "url", f"?{parts.query}", f"?sasl={', '.join(SASL)}", "Choose one of them.")
    return KafkaDestination(hook, servers, topic, sasl, allow_hosts)


async def _disconnect(producer: AIOKafkaProducer) -> None:
    await producer.stop()
