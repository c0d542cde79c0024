"""Real bus servers that a test can kill and restart: same port, same data directory."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aio_pika
import msgspec
import nats
import nats.errors
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from redis.asyncio import Redis

from tests.conformance.brokers import free_port, is_listening
from tests.conformance.kafka_broker import KafkaBroker
from tests.conftest import needs


class OwnBus(ABC):
    """A bus whose data is in a folder, and the events that arrived on it."""

    name: str
    hook_more = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    async def start(self) -> None:
        """Start it, and create the stream, queue or topic that receives events."""
        ...

    @abstractmethod
    async def kill(self) -> None: ...

    @abstractmethod
    async def restart(self) -> None: ...

    @abstractmethod
    async def arrived(self) -> list[str]:
        """Return the ids of all events that arrived, in order."""

    async def stop(self) -> None:
        """Stop it for good."""
        await self.kill()


class OwnServer(OwnBus):
    """A bus that is a process of this test."""

    binary: str
    kill_signal = signal.SIGKILL

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    def environ(self) -> Mapping[str, str]:
        return os.environ

    async def start(self) -> None:
        needs(self.binary, is_there=shutil.which(self.binary) is not None)
        await self.restart()
        await self.prepare()

    async def prepare(self) -> None:
        """Create the stream, queue or topic that receives events."""

    async def restart(self) -> None:
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            self.command(), env=self.environ(), stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        async with asyncio.timeout(60):
            while not is_listening(self.port):
                if self.process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text())
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself: its log says why
                os.killpg(self.process.pid, self.kill_signal)
            await asyncio.to_thread(self.process.wait)
            self.process = None


class OwnRedis(OwnServer):
    """Redis writes before it answers only with `appendfsync always`."""

    name, binary = "redis", "redis-server"

    def command(self) -> list[str]:
        return [
            "redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder),
            "--appendonly", "yes", "--appendfsync", "always", "--save", "",
        ]  # fmt: skip

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/events"

    async def arrived(self) -> list[str]:
        client = Redis(port=self.port)
        found: Any = await client.xrange("events")
        await client.aclose()
        return [msgspec.json.decode(fields[b"event"])["id"] for _, fields in found]


class OwnNats(OwnServer):
    name, binary = "nats", "nats-server"

    def command(self) -> list[str]:
        return ["nats-server", "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder / "store")]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}/events.*?jetstream=true"

    async def prepare(self) -> None:
        client = await nats.connect(f"nats://127.0.0.1:{self.port}")
        await client.jetstream().add_stream(name="events", subjects=["events.>"])
        await client.close()

    async def arrived(self) -> list[str]:
        client = await nats.connect(f"nats://127.0.0.1:{self.port}")
        stream = client.jetstream()
        stored = (await stream.stream_info("events")).state.messages
        pull = await stream.pull_subscribe("events.>", durable=None)
        ids: list[str] = []
        while len(ids) < stored:
            for message in await pull.fetch(min(500, stored - len(ids)), timeout=10):
                ids.append(msgspec.json.decode(message.data)["id"])
                await message.ack()
        await client.close()
        return ids


class OwnRabbit(OwnServer):
    name, binary = "amqp", "rabbitmq-server"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.distribution_port = free_port()

    def command(self) -> list[str]:
        script = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's command in PATH wraps it
        return [str(script) if script.exists() else "rabbitmq-server"]

    def environ(self) -> Mapping[str, str]:
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "rabbitmq-env.conf").touch()
        return {
            **os.environ,
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"relay{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "none"),
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/events"

    async def prepare(self) -> None:
        connection = await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{self.port}/")
        channel = await connection.channel()
        exchange = await channel.declare_exchange("events", aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue("events", durable=True)
        await queue.bind(exchange, "task.#")
        await connection.close()

    async def arrived(self) -> list[str]:
        connection = await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{self.port}/")
        channel = await connection.channel()
        queue = await channel.get_queue("events")
        ids = []
        while (message := await queue.get(fail=False, no_ack=True)) is not None:
            ids.append(str(message.message_id))
        await connection.close()
        return ids


class OwnMosquitto(OwnServer):
    """Mosquitto, read by a subscriber with a persistent session, which reconnects by itself.

    Mosquitto acknowledges before it writes. SIGKILL would lose acknowledged messages, so it is stopped with SIGTERM.
    """

    name, binary = "mqtt", "mosquitto"
    kill_signal = signal.SIGTERM
    END = b"end"

    def command(self) -> list[str]:
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {self.folder}/\n"
            f"max_queued_messages 0\nuser {os.environ.get('USER', 'root')}\n"
        )
        return ["mosquitto", "-c", str(config)]

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}/events/*"

    async def prepare(self) -> None:
        self.ids: list[str] = []
        self.subscribed, self.ended = threading.Event(), threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2, "reader", protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = self._on_message
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.reconnect_delay_set(1, 1)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        self.client.connect("127.0.0.1", self.port, clean_start=False, properties=properties)
        self.client.loop_start()
        self.client.subscribe("events/#", qos=1)
        assert await asyncio.to_thread(self.subscribed.wait, 10)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        if message.payload == self.END:
            self.ended.set()
        else:
            self.ids.append(msgspec.json.decode(message.payload)["id"])

    async def arrived(self) -> list[str]:
        self.client.publish("events/end", self.END, qos=1)
        assert await asyncio.to_thread(self.ended.wait, 60)
        return self.ids

    async def stop(self) -> None:
        if hasattr(self, "client"):
            self.client.disconnect()
            self.client.loop_stop()
        await super().stop()


class OwnKafka(OwnBus):
    """An in-memory broker. It is cut off instead of killed, which looks the same to a client."""

    name = "kafka"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.broker = KafkaBroker()

    @property
    def url(self) -> str:
        return self.broker.url

    async def start(self) -> None:
        await self.broker.start()

    async def kill(self) -> None:
        await self.broker.away()

    async def restart(self) -> None:
        await self.broker.back()

    async def arrived(self) -> list[str]:
        return await self.broker.arrived()

    async def stop(self) -> None:
        await self.broker.stop()


OWN_BUSES: dict[str, type[OwnBus]] = {
    kind.name: kind for kind in (OwnRedis, OwnNats, OwnRabbit, OwnMosquitto, OwnKafka)
}
