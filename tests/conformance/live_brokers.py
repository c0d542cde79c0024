"""The brokers on this machine as the destinations' suite needs them: connect, read, take away, bring back."""

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import aiomqtt
import msgspec
import nats
from redis.asyncio import Redis

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hook import Hook
from tests.conformance.brokers import Proxy, is_listening
from tests.conftest import needs

ALLOWED = ("127.0.0.1",)


class Broker(ABC):
    """A real server behind a proxy, with a stream, exchange or topic that only this test uses."""

    port: int
    product: str

    def __init__(self) -> None:
        self.proxy = Proxy(self.port)
        self.name = f"kling-relay-test-{uuid.uuid4().hex[:12]}"

    @property
    @abstractmethod
    def url(self) -> str: ...

    def open(self, *, allow: tuple[str, ...] = ALLOWED, **settings: Any) -> Destination:
        return self.open_url(self.url, allow=allow, **settings)

    def open_url(self, url: str, *, allow: tuple[str, ...] = ALLOWED, **settings: Any) -> Destination:
        return open_destination(Hook("bus", url, timeout_s=5, **settings), frozenset(allow))

    async def start(self) -> None:
        needs(self.product, is_there=is_listening(self.port))
        await self.proxy.open()

    async def stop(self) -> None:
        await self.proxy.cut()

    async def away(self) -> None:
        await self.proxy.cut()

    async def back(self) -> None:
        await self.proxy.open()


class RedisBroker(Broker):
    port, product = 6379, "Redis"

    def open_with_wrong_credentials(self, secret: str) -> Destination:
        return self.open_url(self.url.replace("redis://", f"redis://someone:{secret}@"))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}/{self.name}?maxlen=1000"

    async def start(self) -> None:
        await super().start()
        self.client = Redis()

    async def stop(self) -> None:
        await super().stop()
        await self.client.delete(self.name, f"{self.name}-aside")
        await self.client.aclose()

    async def entries(self) -> list[dict[bytes, bytes]]:
        found: Any = await self.client.xrange(self.name)
        return [fields for _, fields in found]

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(fields[b"event"])["id"] for fields in await self.entries()]

    async def refuse(self) -> None:
        await self.client.rename(self.name, f"{self.name}-aside")
        await self.client.set(self.name, "no stream")

    async def accept(self) -> None:
        await self.client.rename(f"{self.name}-aside", self.name)


class NatsBroker(Broker):
    port, product = 4222, "NATS with JetStream"
    too_large_bytes = 1024 * 1024

    def open_missing(self) -> Destination:
        return self.open_url(f"nats://127.0.0.1:{self.proxy.port}/missing-{self.name}?jetstream=true")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.proxy.port}/{self.name}.*?jetstream=true"

    async def start(self) -> None:
        await super().start()
        self.client = await nats.connect("nats://127.0.0.1:4222")
        await self.accept()

    async def stop(self) -> None:
        await super().stop()
        await self.refuse()
        await self.client.close()

    async def messages(self) -> list[Any]:
        stream = self.client.jetstream()
        state = (await stream.stream_info(self.name)).state
        return [await stream.get_msg(self.name, seq) for seq in range(max(1, state.first_seq), state.last_seq + 1)]

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message.data)["id"] for message in await self.messages()]

    async def refuse(self) -> None:
        await self.client.jetstream().delete_stream(self.name)

    async def accept(self) -> None:
        await self.client.jetstream().add_stream(name=self.name, subjects=[f"{self.name}.>"])


class AmqpBroker(Broker):
    port, product = 5672, "RabbitMQ"

    def open_missing(self) -> Destination:
        return self.open_url(f"{self.url}-missing")

    def open_with_wrong_credentials(self, secret: str) -> Destination:
        return self.open_url(self.url.replace("guest:guest", f"guest:{secret}"))

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.proxy.port}/{self.name}"

    async def start(self) -> None:
        await super().start()
        self.connection = await aio_pika.connect("amqp://guest:guest@127.0.0.1/")
        self.channel = await self.connection.channel()
        self.queue = await self.channel.declare_queue(self.name)
        await self.accept()

    async def stop(self) -> None:
        await super().stop()
        await self.refuse()
        await self.queue.delete(if_unused=False, if_empty=False)
        await self.connection.close()

    async def messages(self) -> list[Any]:
        found = []
        while (message := await self.queue.get(fail=False, no_ack=True)) is not None:
            found.append(message)
        return found

    async def arrived(self) -> list[str]:
        return [str(message.message_id) for message in await self.messages()]

    async def refuse(self) -> None:
        await self.channel.exchange_delete(self.name)

    async def accept(self) -> None:
        exchange = await self.channel.declare_exchange(self.name, aio_pika.ExchangeType.TOPIC)
        await self.queue.bind(exchange, "task.#")


class MqttBroker(Broker):
    port, product = 1883, "Mosquitto"

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.proxy.port}/{self.name}/*"

    async def start(self) -> None:
        await super().start()
        self.messages: list[aiomqtt.Message] = []
        self.client = aiomqtt.Client("127.0.0.1", protocol=aiomqtt.ProtocolVersion.V5)
        await self.client.__aenter__()
        await self.client.subscribe(f"{self.name}/#", qos=1)
        self.listening = asyncio.create_task(self.listen())

    async def listen(self) -> None:
        async for message in self.client.messages:
            self.messages.append(message)

    async def stop(self) -> None:
        await super().stop()
        self.listening.cancel()
        await asyncio.gather(self.listening, return_exceptions=True)
        await self.client.__aexit__(None, None, None)

    async def drain(self) -> None:
        """Return when the broker has forwarded every message that was published before."""
        await self.client.publish(f"{self.name}/end", b"{}", qos=1)
        async with asyncio.timeout(5):
            while f"{self.name}/end" not in [message.topic.value for message in self.messages]:
                await asyncio.sleep(0.005)
        self.messages = [message for message in self.messages if message.topic.value != f"{self.name}/end"]

    async def arrived(self) -> list[str]:
        await self.drain()
        return [msgspec.json.decode(bytes(message.payload))["id"] for message in self.messages]


async def started(broker: Broker) -> AsyncIterator[Broker]:
    await broker.start()
    yield broker
    await broker.stop()
