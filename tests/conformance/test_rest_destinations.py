"""Pub/Sub, Event Grid and Service Bus pass the destinations' suite, against strict stand-ins of their HTTP APIs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
import pytest

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hooks import Hook
from submitter.errors import InvalidSettings
from submitter.sandbox.server import free_socket, listening
from tests.conformance.brokers import Proxy
from tests.conformance.destinations import NOW_S, DistantSuite, GuardedSuite, NamedSuite, event
from tests.conformance.strict_services import KEY, MockEventGrid, MockPubsub, MockServiceBus, StrictService

LOCAL = ("127.0.0.1",)
S = TypeVar("S", bound=StrictService)


class Served(Generic[S]):
    """A stand-in behind a proxy."""

    def __init__(self, service: S, port: int, url: str) -> None:
        self.service = service
        self.most_bytes = service.most_bytes
        self.proxy = Proxy(port)
        self.url = url

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    def open(self, *, allow: tuple[str, ...] = LOCAL, **settings: Any) -> Destination:
        url = settings.pop("url", self.url).replace("ADDRESS", self.address)
        return open_destination(Hook("bus", url, timeout_s=5, **settings), frozenset(allow))

    def open_missing(self) -> Destination:
        return self.open(url=self.url.replace("/orders", "/missing"))

    def open_stranger(self, secret: str) -> Destination:
        return self.open(url=self.url.replace(quote(KEY, safe=""), secret))

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message["body"])["id"] for message in self.service.got]

    async def refuse(self) -> None:
        self.service.is_there = False

    async def accept(self) -> None:
        self.service.is_there = True

    async def away(self) -> None:
        await self.proxy.cut()

    async def back(self) -> None:
        await self.proxy.open()


@asynccontextmanager
async def served(service: S, url: str) -> AsyncIterator[Served[S]]:
    bound, _ = free_socket()
    made = Served(service, bound.getsockname()[1], url)
    async with listening(service.app(), bound):
        await made.proxy.open()
        yield made
        await made.proxy.cut()


def identity(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Be a container of Azure's, whose identity endpoint gives tokens."""
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{address}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "identity-secret")


class TestPubsub(DistantSuite, NamedSuite):
    @pytest.fixture
    async def peer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served[MockPubsub]]:
        async with served(MockPubsub(), "pubsub://acme/orders?endpoint=ADDRESS") as made:
            account = tmp_path / "account.json"
            account.write_text(made.service.account(made.address))
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))
            yield made

    async def test_binary_mode_has_the_attributes_and_the_ordering_key_is_the_task(
        self, peer: Served[MockPubsub]
    ) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).answer == "message 0"
        (message,) = peer.service.got
        assert message["orderingKey"] == "order-1"
        assert message["attributes"]["ce-id"] == event().id
        assert message["attributes"]["content-type"] == "application/json"
        assert message["attributes"]["traceparent"].startswith("00-")
        assert peer.service.tokens == 1
        await destination.close()

    async def test_credentials_that_google_refuses_are_told(
        self, peer: Served[MockPubsub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = tmp_path / "other.json"
        other.write_text(MockPubsub().account(peer.address))  # signed by another key
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(other))
        destination = peer.open()
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert "invalid_grant" in outcome.answer
        await destination.close()

    async def test_an_emulator_is_asked_without_credentials(
        self, peer: Served[MockPubsub], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", peer.address.removeprefix("http://"))
        destination = peer.open(url="pubsub://acme/orders")
        outcome = await destination.send(event(), NOW_S)
        assert "UNAUTHENTICATED" in outcome.answer  # it was reached, and given no token
        await destination.close()


class TestEventGrid(DistantSuite, GuardedSuite):
    @pytest.fixture(params=["", "/topics/orders"])
    async def peer(self, request: pytest.FixtureRequest) -> AsyncIterator[Served[MockEventGrid]]:
        host = "acme.westeurope-1.eventgrid.azure.net"
        url = f"eventgrid://:{quote(KEY, safe='')}@{host}{request.param}?endpoint=ADDRESS"
        async with served(MockEventGrid(), url) as made:
            yield made

    async def test_without_a_key_the_containers_identity_gives_a_token(
        self, peer: Served[MockEventGrid], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity(monkeypatch, peer.address)
        destination = peer.open(url=peer.url.replace(f":{quote(KEY, safe='')}@", ""))
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        trace = msgspec.json.decode(peer.service.got[0]["body"])["traceparent"]
        assert trace.startswith("00-")
        await destination.close()


class TestServiceBus(DistantSuite, GuardedSuite):
    URL = f"servicebus://sender:{quote(KEY, safe='')}@acme/orders?endpoint=ADDRESS"

    @pytest.fixture
    async def peer(self) -> AsyncIterator[Served[MockServiceBus]]:
        async with served(MockServiceBus(NOW_S), self.URL) as made:
            yield made

    async def test_a_message_has_the_events_id_and_its_tasks_session(self, peer: Served[MockServiceBus]) -> None:
        destination = peer.open()
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.service.got
        assert (message["broker"]["MessageId"], message["broker"]["SessionId"]) == (event().id, "order-1")
        assert message["type"].startswith("application/cloudevents+json")
        await destination.close()

    async def test_binary_mode_has_the_attributes_as_application_properties(self, peer: Served[MockServiceBus]) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.service.got
        assert message["properties"]["cloudevents_id"] == event().id
        assert message["type"] == "application/json"
        await destination.close()

    async def test_without_a_key_the_containers_identity_gives_a_token(
        self, peer: Served[MockServiceBus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity(monkeypatch, peer.address)
        destination = peer.open(url="servicebus://acme/orders?endpoint=ADDRESS")
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        await destination.close()


@pytest.mark.parametrize(
    ("url", "mode", "says"),
    [
        ("pubsub://acme", "structured", "pubsub://project/topic"),
        ("pubsub://acme/orders?colour=1", "structured", "?endpoint=https"),
        ("eventgrid://:s3cret@acme.eventgrid.azure.net", "binary", "hook[bus].mode"),
        ("eventgrid://:s3cret@acme.eventgrid.azure.net/a/b/c", "structured", "Mend the path"),
        ("servicebus://me:s3cret@acme", "structured", "Name namespace and queue"),
        ("servicebus://me@acme/orders", "structured", "policy:key"),
        ("servicebus://acme/orders?endpoint=ftp://x", "structured", "?endpoint=https"),
        ("kafka://u:s3cret@host", "structured", "Name brokers"),
        ("kafka://u:s3cret@host:nine/topic", "structured", "Name brokers"),
        ("kafka://u:s3cret@host/topic?sasl=GSSAPI", "structured", "SCRAM-SHA-512"),
    ],
)
def test_a_hook_that_cannot_be_used_is_named_at_the_start_without_its_secret(url: str, mode: str, says: str) -> None:
    with pytest.raises(InvalidSettings) as wrong:
        open_destination(Hook("bus", url, mode=mode), frozenset())
    assert says in str(wrong.value)
    assert "s3cret" not in str(wrong.value)
