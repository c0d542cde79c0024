"""The buses pass the destinations' suite, each against its real server."""

import asyncio
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import aiomqtt
import msgspec
import nats
import pytest
from redis.asyncio import Redis

from receiver.cloudevents import traceparent
from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hooks import Hook
from submitter.errors import InvalidSettings
from tests.conformance.brokers import Proxy, is_listening
from tests.conformance.destinations import NOW_S, DestinationSuite, DistantSuite, GuardedSuite, NamedSuite, event
from tests.conftest import DESCRIBED, needs

LOCAL = ("127.0.0.1",)


class Broker(ABC):
    """A real server behind a proxy, and something on it of this test's own."""

    port: int
    what: str

    def __init__(self) -> None:
        self.proxy = Proxy(self.port)
        self.name = f"kling-relay-test-{uuid.uuid4().hex[:12]}"

    @property
    @abstractmethod
    def url(self) -> str: ...

    def open(self, *, allow: tuple[str, ...] = LOCAL, **settings: Any) -> Destination:
        return self.open_url(self.url, allow=allow, **settings)

    def open_url(self, url: str, *, allow: tuple[str, ...] = LOCAL, **settings: Any) -> Destination:
        return open_destination(Hook("bus", url, timeout_s=5, **settings), frozenset(allow))

    async def start(self) -> None:
        needs(self.what, is_there=is_listening(self.port))
        await self.proxy.open()

    async def stop(self) -> None:
        await self.proxy.cut()

    async def away(self) -> None:
        await self.proxy.cut()

    async def back(self) -> None:
        await self.proxy.open()


class RedisBroker(Broker):
    port, what = 6379, "Redis"

    def open_stranger(self, secret: str) -> Destination:
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
    port, what = 4222, "NATS with JetStream"
    most_bytes = 1024 * 1024

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
    port, what = 5672, "RabbitMQ"

    def open_missing(self) -> Destination:
        return self.open_url(f"{self.url}-missing")

    def open_stranger(self, secret: str) -> Destination:
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
    port, what = 1883, "Mosquitto"

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

    async def settled(self) -> None:
        """Return once the broker has passed on what it had."""
        await self.client.publish(f"{self.name}/end", b"{}", qos=1)
        async with asyncio.timeout(5):
            while f"{self.name}/end" not in [message.topic.value for message in self.messages]:
                await asyncio.sleep(0.005)
        self.messages = [message for message in self.messages if message.topic.value != f"{self.name}/end"]

    async def arrived(self) -> list[str]:
        await self.settled()
        return [msgspec.json.decode(bytes(message.payload))["id"] for message in self.messages]


async def started(broker: Broker) -> AsyncIterator[Broker]:
    await broker.start()
    yield broker
    await broker.stop()


class TestRedis(DistantSuite, GuardedSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[RedisBroker]:
        async for broker in started(RedisBroker()):
            assert isinstance(broker, RedisBroker)
            yield broker

    async def test_binary_mode_has_the_attributes_as_fields(self, peer: RedisBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (fields,) = await peer.entries()
        assert fields[b"ce-id"].decode() == event().id
        assert msgspec.json.decode(fields[b"data"])["external_task_id"] == "order-1"
        assert fields[b"content-type"] == b"application/json"
        await destination.close()


class TestJetStream(DistantSuite, NamedSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[NatsBroker]:
        async for broker in started(NatsBroker()):
            assert isinstance(broker, NatsBroker)
            yield broker

    async def test_a_repeated_event_is_stored_once(self, peer: NatsBroker) -> None:
        destination = peer.open()
        outcomes = [await destination.send(event(), NOW_S) for _ in range(2)]
        assert all(outcome.is_delivered for outcome in outcomes)
        assert "a duplicate" in outcomes[1].answer
        assert await peer.arrived() == [event().id]
        await destination.close()

    async def test_binary_mode_has_the_attributes_as_headers(self, peer: NatsBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await peer.messages()
        assert message.subject == f"{peer.name}.task.processing"
        assert message.headers["ce-id"] == event().id
        assert message.headers["traceparent"].startswith("00-")
        await destination.close()

    async def test_core_nats_is_acknowledged_by_the_server(self, peer: NatsBroker) -> None:
        subject = f"core-{peer.name}"
        waiting = await peer.client.subscribe(subject)
        await peer.client.flush()
        url = f"nats://127.0.0.1:{peer.proxy.port}/{subject}"
        destination = open_destination(Hook("bus", url), frozenset(LOCAL))
        assert (await destination.send(event(), NOW_S)).is_delivered
        assert msgspec.json.decode((await waiting.next_msg(5)).data)["id"] == event().id
        await peer.away()
        assert not (await destination.send(event(), NOW_S)).is_delivered
        await destination.close()


class TestAmqp(DistantSuite, NamedSuite, GuardedSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[AmqpBroker]:
        async for broker in started(AmqpBroker()):
            assert isinstance(broker, AmqpBroker)
            yield broker

    async def test_binary_mode_has_the_attributes_as_headers(self, peer: AmqpBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await peer.messages()
        assert message.headers["cloudEvents:id"] == event().id
        assert message.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
        assert message.routing_key == "task.processing"
        await destination.close()

    async def test_an_event_that_no_queue_takes_is_a_failure_when_it_must_be_taken(self, peer: AmqpBroker) -> None:
        url = f"{peer.url}?routing_key=elsewhere"
        for mandatory, delivered in (("false", True), ("true", False)):
            destination = open_destination(Hook("bus", f"{url}&mandatory={mandatory}"), frozenset(LOCAL))
            assert (await destination.send(event(), NOW_S)).is_delivered is delivered
            await destination.close()


class TestMqtt(DistantSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[MqttBroker]:
        async for broker in started(MqttBroker()):
            assert isinstance(broker, MqttBroker)
            yield broker

    async def test_a_refusal_is_an_outcome_that_says_what_was_answered(self, peer: MqttBroker) -> None:  # type: ignore[override]
        """Mosquitto refuses a topic that only it may write to."""
        destination = open_destination(Hook("bus", f"mqtt://127.0.0.1:{peer.proxy.port}/$SYS/broker"), frozenset(LOCAL))
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        await destination.close()

    async def test_binary_mode_has_the_attributes_as_user_properties(self, peer: MqttBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        await peer.settled()
        (message,) = peer.messages
        assert message.topic.value == f"{peer.name}/task.processing"
        properties: Any = message.properties
        assert dict(properties.UserProperty)["id"] == event().id
        assert properties.ContentType == "application/json"
        await destination.close()


class FilePeer:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "out" / "events.jsonl"
        self.path.parent.mkdir()

    def open(self, **settings: Any) -> Destination:
        return open_destination(Hook("log", f"file://{self.path}", **settings), frozenset())

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(line)["id"] for line in self.path.read_bytes().splitlines()]

    async def refuse(self) -> None:
        self.path.parent.rename(self.path.parent.with_name("aside"))

    async def accept(self) -> None:
        self.path.parent.with_name("aside").rename(self.path.parent)


class TestFile(DestinationSuite):
    @pytest.fixture
    def peer(self, tmp_path: Path) -> FilePeer:
        return FilePeer(tmp_path)

    async def test_it_is_rotated_and_nothing_is_lost(self, peer: FilePeer) -> None:
        destination = open_destination(Hook("log", f"file://{peer.path}?max_mb=1&keep=2"), frozenset())
        large = msgspec.structs.replace(event(), body=b'"' + b"x" * 600_000 + b'"')
        for _ in range(4):
            assert (await destination.send(large, NOW_S)).is_delivered
        names = sorted(path.name for path in peer.path.parent.iterdir())
        assert names == [".events.jsonl.lock", "events.jsonl", "events.jsonl.1", "events.jsonl.2"]

    async def test_a_line_is_an_event_as_asyncapi_describes_it_with_its_trace(self, peer: FilePeer) -> None:
        destination = peer.open()
        assert (await destination.send(event(), NOW_S)).is_delivered
        (line,) = peer.path.read_bytes().splitlines()
        written = msgspec.json.decode(line)
        assert list(DESCRIBED.iter_errors(written)) == []
        assert written.pop("traceparent") == traceparent(event())
        assert written == msgspec.json.decode(event().body)
        await destination.close()

    async def test_a_folder_that_is_not_there_is_told(self, peer: FilePeer) -> None:
        destination = peer.open()
        assert await destination.reach() is None
        await peer.refuse()
        assert "no folder" in str(await destination.reach())


MODULE = """
got, refusing = [], []

def note(event):
    if refusing:
        raise ValueError("not now")
    got.append(event["id"])

async def note_later(event):
    note(event)

number = 7
"""


class PythonPeer:
    def __init__(self, function: str) -> None:
        self.function = function
        self.module = __import__("users_hooks")

    def open(self, **settings: Any) -> Destination:
        return open_destination(Hook("own", f"python:users_hooks:{self.function}", **settings), frozenset())

    async def arrived(self) -> list[str]:
        return list(self.module.got)

    async def refuse(self) -> None:
        self.module.refusing.append(True)

    async def accept(self) -> None:
        self.module.refusing.clear()


class TestPython(DestinationSuite):
    @pytest.fixture(params=["note", "note_later"])
    def peer(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PythonPeer:
        (tmp_path / "users_hooks.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("users_hooks", None)
        return PythonPeer(request.param)

    @pytest.mark.parametrize("url", ["python:users_hooks", "python:users_hooks:missing", "python:users_hooks:number"])
    def test_a_function_that_is_not_there_is_named(self, peer: PythonPeer, url: str) -> None:
        with pytest.raises(InvalidSettings, match=r"hook\[own\].url"):
            open_destination(Hook("own", url), frozenset())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://127.0.0.1:6379", "redis://host:6379/stream"),
        ("redis://u:s3cret@127.0.0.1/stream?db=x", "db=0"),
        ("redis://127.0.0.1/stream?color=1", "maxlen"),
        ("nats://u:s3cret@127.0.0.1", "nats://host:4222/subject"),
        ("nats://127.0.0.1/subject?jetstream=maybe", "true or false"),
        ("amqp://u:s3cret@127.0.0.1", "amqp://host:5672/exchange"),
        ("amqp://127.0.0.1/exchange?mandatory=x", "mandatory=true"),
        ("mqtt://127.0.0.1/a/#", "without # and +"),
        ("mqtt://u:s3cret@127.0.0.1/a?qos=3", "0, 1 or 2"),
        ("file://relative.jsonl", "file:///an/absolute"),
        ("file:///tmp/x.jsonl?keep=-1", "keep=5"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_at_the_start_without_its_secret(url: str, says: str) -> None:
    with pytest.raises(InvalidSettings) as wrong:
        open_destination(Hook("bus", url), frozenset())
    assert "hook[bus]" in str(wrong.value)
    assert says in str(wrong.value)
    assert "s3cret" not in str(wrong.value)
