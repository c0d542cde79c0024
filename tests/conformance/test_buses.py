"""Conformance of the Redis, NATS, AMQP, MQTT, file and Python destinations, against real servers."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import msgspec
import pytest

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.destinations.cloudevents import traceparent
from receiver.hook import Hook
from submitter.errors import InvalidSettings
from tests.conformance.destinations import NOW_S, DestinationSuite, DistantSuite, GuardedSuite, NamedSuite, event
from tests.conformance.live_brokers import AmqpBroker, MqttBroker, NatsBroker, RedisBroker, started
from tests.world import DESCRIBED

ALLOWED = ("127.0.0.1",)


class TestRedis(DistantSuite, GuardedSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[RedisBroker]:
        async for broker in started(RedisBroker()):
            assert isinstance(broker, RedisBroker)
            yield broker

    async def test_binary_mode_sends_the_attributes_as_fields(self, peer: RedisBroker) -> None:
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

    async def test_binary_mode_sends_the_attributes_as_headers(self, peer: NatsBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await peer.messages()
        assert message.subject == f"{peer.name}.task.processing"
        assert message.headers["ce-id"] == event().id
        assert message.headers["traceparent"].startswith("00-")
        await destination.close()

    async def test_core_nats_publish_is_confirmed_by_the_server(self, peer: NatsBroker) -> None:
        subject = f"core-{peer.name}"
        subscription = await peer.client.subscribe(subject)
        await peer.client.flush()
        url = f"nats://127.0.0.1:{peer.proxy.port}/{subject}"
        destination = open_destination(Hook("bus", url), frozenset(ALLOWED))
        assert (await destination.send(event(), NOW_S)).is_delivered
        assert msgspec.json.decode((await subscription.next_msg(5)).data)["id"] == event().id
        await peer.away()
        assert not (await destination.send(event(), NOW_S)).is_delivered
        await destination.close()


class TestAmqp(DistantSuite, NamedSuite, GuardedSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[AmqpBroker]:
        async for broker in started(AmqpBroker()):
            assert isinstance(broker, AmqpBroker)
            yield broker

    async def test_binary_mode_sends_the_attributes_as_headers(self, peer: AmqpBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await peer.messages()
        assert message.headers["cloudEvents:id"] == event().id
        assert message.delivery_mode is aio_pika.DeliveryMode.PERSISTENT
        assert message.routing_key == "task.processing"
        await destination.close()

    async def test_an_unroutable_event_is_a_failure_only_when_mandatory(self, peer: AmqpBroker) -> None:
        url = f"{peer.url}?routing_key=elsewhere"
        for mandatory, delivered in (("false", True), ("true", False)):
            destination = open_destination(Hook("bus", f"{url}&mandatory={mandatory}"), frozenset(ALLOWED))
            assert (await destination.send(event(), NOW_S)).is_delivered is delivered
            await destination.close()


class TestMqtt(DistantSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[MqttBroker]:
        async for broker in started(MqttBroker()):
            assert isinstance(broker, MqttBroker)
            yield broker

    async def test_a_refused_event_is_a_failed_outcome_with_the_answer(self, peer: MqttBroker) -> None:  # type: ignore[override]
        """Mosquitto refuses a publish to `$SYS`, which only the broker may write."""
        destination = open_destination(
            Hook("bus", f"mqtt://127.0.0.1:{peer.proxy.port}/$SYS/broker"), frozenset(ALLOWED)
        )
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        await destination.close()

    async def test_binary_mode_sends_the_attributes_as_user_properties(self, peer: MqttBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        await peer.drain()
        (message,) = peer.messages
        assert message.topic.value == f"{peer.name}/task.processing"
        properties: Any = message.properties
        assert dict(properties.UserProperty)["id"] == event().id
        assert properties.ContentType == "application/json"
        await destination.close()


class FilePeer:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "out" / "events.jsonl"
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

    async def test_rotation_keeps_as_many_files_as_configured(self, peer: FilePeer) -> None:
        destination = open_destination(Hook("log", f"file://{peer.path}?max_mb=1&keep=2"), frozenset())
        large = msgspec.structs.replace(event(), body=b'"' + b"x" * 600_000 + b'"')
        for _ in range(4):
            assert (await destination.send(large, NOW_S)).is_delivered
        names = sorted(path.name for path in peer.path.parent.iterdir())
        assert names == [".events.jsonl.lock", "events.jsonl", "events.jsonl.1", "events.jsonl.2"]

    async def test_a_line_is_an_event_that_matches_the_asyncapi_schema_plus_traceparent(self, peer: FilePeer) -> None:
        destination = peer.open()
        assert (await destination.send(event(), NOW_S)).is_delivered
        (line,) = peer.path.read_bytes().splitlines()
        written = msgspec.json.decode(line)
        assert list(DESCRIBED.iter_errors(written)) == []
        assert written.pop("traceparent") == traceparent(event())
        assert written == msgspec.json.decode(event().body)
        await destination.close()

    async def test_reach_reports_a_missing_directory(self, peer: FilePeer) -> None:
        destination = peer.open()
        assert await destination.reach() is None
        await peer.refuse()
        assert "not a writable directory" in str(await destination.reach())


MODULE = """
received, refusing = [], []

def note(event):
    if refusing:
        raise ValueError("not now")
    received.append(event["id"])

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
        return list(self.module.received)

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
    def test_a_function_that_cannot_be_imported_is_an_invalid_setting(self, peer: PythonPeer, url: str) -> None:
        with pytest.raises(InvalidSettings, match=r"hook\[own\].url"):
            open_destination(Hook("own", url), frozenset())


@pytest.mark.parametrize(
    ("url", "expected"),
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
def test_an_invalid_url_is_reported_without_its_secret(url: str, expected: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        open_destination(Hook("bus", url), frozenset())
    assert "hook[bus]" in str(raised.value)
    assert expected in str(raised.value)
    assert "s3cret" not in str(raised.value)
