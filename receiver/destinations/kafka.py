"""Publishes events to a Kafka topic: `kafka://user:password@host:9092,host:9092/topic?sasl=SCRAM-SHA-512`.

`kafkas://` is TLS. A user and password in the URL authenticate with SASL PLAIN, unless `sasl` names another
mechanism.

Event: a record in the CloudEvents Kafka binding. The key is the external_task_id; headers are `content-type`,
`traceparent` and, in binary mode, the attributes `ce_...`.
Delivered: all in-sync replicas have the record (`acks=all`). The client batches concurrent events per broker.
Order: a task's events are sent one after the other to one partition, so they keep their order.
Limit: 1 MiB per request, a broker's usual `message.max.bytes`.
Sources: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md,
https://kafka.apache.org/documentation/#producerconfigs.
"""

import asyncio
import ssl
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordTooLargeError

from receiver.destinations.base import invalid_hook
from receiver.destinations.cloudevents import encode, traceparent
from receiver.destinations.connection import KeptConnection
from receiver.destinations.outcome import Outcome, failed_outcome
from receiver.hook import Hook
from submitter.egress import require_allowed
from submitter.event import Event

SASL = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
REQUEST_BYTES = 1024 * 1024
SEND_ERRORS = (KafkaError, OSError, TimeoutError)
URL_FORMAT = "kafka://host:9092/topic"


class KafkaDestination:
    """One topic, with one producer, which reconnects by itself."""

    def __init__(self, hook: Hook, servers: list[str], topic: str, sasl: str, allow_hosts: frozenset[str]) -> None:
        self._hook = hook
        self._servers = servers
        self._topic = topic
        self._sasl = sasl
        self._allow_hosts = allow_hosts
        self._password = urlsplit(hook.url).password
        self._kept = KeptConnection(self._connect, _disconnect)

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
            # The client can wait twice this long: it reports its own error before the hook's timeout ends the attempt.
            request_timeout_ms=max(500, int(self._hook.timeout_s * 400)),
            security_protocol=("SASL_" if is_sasl else "") + ("SSL" if is_tls else "PLAINTEXT"),
            ssl_context=ssl.create_default_context() if is_tls else None,
            sasl_mechanism=self._sasl,
            sasl_plain_username=unquote(parts.username) if parts.username is not None else None,
            sasl_plain_password=unquote(parts.password or "") if is_sasl else None,
        )
        try:
            await producer.start()
        except (KeyError, ValueError) as error:  # the client's errors for refused SCRAM credentials
            await producer.stop()
            raise ConnectionError("the broker refused the user or the password") from error
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
            return msgspec.structs.replace(failed_outcome(error), is_final=True)
        except SEND_ERRORS as error:
            return failed_outcome(error, self._password)
        return Outcome(True, f"partition {record.partition}, offset {record.offset}")

    async def reach(self) -> str | None:
        try:
            producer = await self._kept.get()
            async with asyncio.timeout(min(self._hook.timeout_s, 5)):
                if not await producer.client.force_metadata_update():
                    return f"none of the brokers {', '.join(self._servers)} answers"
                await producer.partitions_for(self._topic)
        except TimeoutError:
            return f"no broker returned metadata of the topic {self._topic!r}"
        except SEND_ERRORS as error:
            return failed_outcome(error, self._password).answer
        return None

    async def close(self) -> None:
        await self._kept.drop()


def open(hook: Hook, allow_hosts: frozenset[str]) -> KafkaDestination:
    """Return the destination of a hook; raise InvalidSettings for an invalid URL."""
    parts, options = urlsplit(hook.url), parse_qs(hook.url.partition("?")[2])
    servers = [server if ":" in server else f"{server}:9092" for server in parts.netloc.rpartition("@")[2].split(",")]
    topic = unquote(parts.path.strip("/"))
    if not topic or "/" in topic or not all(server.rpartition(":")[2].isdecimal() for server in servers):
        found = f"{parts.scheme}://{','.join(servers)}{parts.path}"
        raise invalid_hook(hook, "url", found, URL_FORMAT, "Name the brokers and the topic.")
    sasl = options.get("sasl", ["PLAIN"])[0]
    if sasl not in SASL or set(options) - {"sasl"}:
        limit, remedy = f"?sasl={', '.join(SASL)}", "Use only the option `sasl`, with one of these values."
        raise invalid_hook(hook, "url", f"?{parts.query}", limit, remedy)
    return KafkaDestination(hook, servers, topic, sasl, allow_hosts)


async def _disconnect(producer: AIOKafkaProducer) -> None:
    await producer.stop()
