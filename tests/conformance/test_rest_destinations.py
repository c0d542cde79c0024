"""Conformance of the Pub/Sub, Event Grid and Service Bus destinations, against strict stand-ins of their HTTP APIs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
import pytest

from receiver.destinations import open_destination
from receiver.destinations.base import Destination
from receiver.hook import Hook
from submitter.errors import InvalidSettings
from submitter.sandbox.server import free_socket, listening
from tests.conformance.brokers import Proxy
from tests.conformance.destinations import NOW_S, DistantSuite, GuardedSuite, NamedSuite, event
from tests.conformance.strict_services import KEY, MockEventGrid, MockPubsub, MockServiceBus, StrictService

ALLOWED = ("127.0.0.1",)
S = TypeVar("S", bound=StrictService)


class Served(Generic[S]):
    """A stand-in behind a proxy."""

    def __init__(self, service: S, port: int, url: str) -> None:
        self.service = service
        self.too_large_bytes = service.too_large_bytes
        self.proxy = Proxy(port)
        self.url = url

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    def open(self, *, allow: tuple[str, ...] = ALLOWED, **settings: Any) -> Destination:
        url = settings.pop("url", self.url).replace("ADDRESS", self.address)
        return open_destination(Hook("bus", url, timeout_s=5, **settings), frozenset(allow))

    def open_missing(self) -> Destination:
        return self.open(url=self.url.replace("/orders", "/missing"))

    def open_with_wrong_credentials(self, secret: str) -> Destination:
        return self.open(url=self.url.replace(quote(KEY, safe=""), secret))

    async def arrived(self) -> list[str]:
        return [msgspec.json.decode(message["body"])["id"] for message in self.service.received]

    async def refuse(self) -> None:
        self.service.exists = False

    async def accept(self) -> None:
        self.service.exists = True

    async def away(self) -> None:
        await self.proxy.cut()

    async def back(self) -> None:
        await self.proxy.open()


@asynccontextmanager
async def served(service: S, url: str) -> AsyncIterator[Served[S]]:
    bound, _ = free_socket()
    peer = Served(service, bound.getsockname()[1], url)
    async with listening(service.app(), bound):
        await peer.proxy.open()
        yield peer
        await peer.proxy.cut()


def set_managed_identity(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Set the environment of an Azure container whose managed identity endpoint is at `address`."""
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{address}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "identity-secret")


class TestPubsub(DistantSuite, NamedSuite):
    @pytest.fixture
    async def peer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served[MockPubsub]]:
        async with served(MockPubsub(), "pubsub://acme/orders?endpoint=ADDRESS") as peer:
            account = tmp_path / "account.json"
            account.write_text(peer.service.account(peer.address))
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account))
            yield peer

    async def test_binary_mode_sends_the_attributes_and_the_task_as_ordering_key(
        self, peer: Served[MockPubsub]
    ) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).answer == "message 0"
        (message,) = peer.service.received
        assert message["orderingKey"] == "order-1"
        assert message["attributes"]["ce-id"] == event().id
        assert message["attributes"]["content-type"] == "application/json"
        assert message["attributes"]["traceparent"].startswith("00-")
        assert peer.service.tokens == 1
        await destination.close()

    async def test_refused_google_credentials_are_a_failed_outcome(
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

    async def test_an_emulator_is_called_without_credentials(
        self, peer: Served[MockPubsub], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", peer.address.removeprefix("http://"))
        destination = peer.open(url="pubsub://acme/orders")
        outcome = await destination.send(event(), NOW_S)
        assert "UNAUTHENTICATED" in outcome.answer  # the request arrived without a token
        await destination.close()


class TestEventGrid(DistantSuite, GuardedSuite):
    @pytest.fixture(params=["", "/topics/orders"])
    async def peer(self, request: pytest.FixtureRequest) -> AsyncIterator[Served[MockEventGrid]]:
        host = "acme.westeurope-1.eventgrid.azure.net"
        url = f"eventgrid://:{quote(KEY, safe='')}@{host}{request.param}?endpoint=ADDRESS"
        async with served(MockEventGrid(), url) as peer:
            yield peer

    async def test_without_a_key_the_managed_identity_is_used(
        self, peer: Served[MockEventGrid], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_managed_identity(monkeypatch, peer.address)
        destination = peer.open(url=peer.url.replace(f":{quote(KEY, safe='')}@", ""))
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        trace = msgspec.json.decode(peer.service.received[0]["body"])["traceparent"]
        assert trace.startswith("00-")
        await destination.close()


class TestServiceBus(DistantSuite, GuardedSuite):
    URL = f"servicebus://sender:{quote(KEY, safe='')}@acme/orders?endpoint=ADDRESS"

    @pytest.fixture
    async def peer(self) -> AsyncIterator[Served[MockServiceBus]]:
        async with served(MockServiceBus(NOW_S), self.URL) as peer:
            yield peer

    async def test_the_message_id_is_the_event_and_the_session_is_the_task(self, peer: Served[MockServiceBus]) -> None:
        destination = peer.open()
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.service.received
        assert (message["broker"]["MessageId"], message["broker"]["SessionId"]) == (event().id, "order-1")
        assert message["type"].startswith("application/cloudevents+json")
        await destination.close()

    async def test_binary_mode_sends_the_attributes_as_application_properties(
        self, peer: Served[MockServiceBus]
    ) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = peer.service.received
        assert message["properties"]["cloudevents_id"] == event().id
        assert message["type"] == "application/json"
        await destination.close()

    async def test_without_a_key_the_managed_identity_is_used(
        self, peer: Served[MockServiceBus], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_managed_identity(monkeypatch, peer.address)
        destination = peer.open(url="servicebus://acme/orders?endpoint=ADDRESS")
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        await destination.close()


@pytest.mark.parametrize(
    ("url", "mode", "expected"),
    [
        ("pubsub://acme", "structured", "pubsub://project/topic"),
        ("pubsub://acme/orders?colour=1", "structured", "?endpoint=https"),
        ("eventgrid://:s3cret@acme.eventgrid.azure.net", "binary", "hook[bus].mode"),
        ("eventgrid://:s3cret@acme.eventgrid.azure.net/a/b/c", "structured", "Use no path, or /topics/name"),
        ("servicebus://me:s3cret@acme", "structured", "Name the namespace and the queue"),
        ("servicebus://me@acme/orders", "structured", "policy:key"),
        ("servicebus://acme/orders?endpoint=ftp://x", "structured", "?endpoint=https"),
        ("kafka://u:s3cret@host", "structured", "Name the brokers"),
        ("kafka://u:s3cret@host:nine/topic", "structured", "Name the brokers"),
        ("kafka://u:s3cret@host/topic?sasl=GSSAPI", "structured", "SCRAM-SHA-512"),
    ],
)
def test_an_invalid_hook_is_reported_without_its_secret(url: str, mode: str, expected: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        open_destination(Hook("bus", url, mode=mode), frozenset())
    assert expected in str(raised.value)
    assert "s3cret" not in str(raised.value)
