"""Kafka passes the destinations' suite, against a real broker of its protocol, and another producer's mock of one."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from receiver.destinations import open_destination
from receiver.hooks import Hook
from tests.conformance.destinations import NOW_S, DistantSuite, event
from tests.conformance.kafka_broker import KafkaBroker

LOCAL = ("127.0.0.1",)


class TestKafka(DistantSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[KafkaBroker]:
        broker = KafkaBroker()
        await broker.start()
        yield broker
        await broker.stop()

    async def test_a_refusal_is_an_outcome_that_says_what_was_answered(self, peer: KafkaBroker) -> None:  # type: ignore[override]
        """The broker takes every topic; one that asks for credentials refuses who has none, and who has wrong ones."""
        strict = KafkaBroker()
        await strict.start(authentication=True)
        for credentials, sasl in (("", "PLAIN"), ("me:s3cret@", "PLAIN"), ("me:s3cret@", "SCRAM-SHA-512")):
            url = strict.url.replace("://", f"://{credentials}") + f"?sasl={sasl}"
            destination = open_destination(Hook("bus", url, timeout_s=5), frozenset(LOCAL))
            outcome = await destination.send(event(), NOW_S)
            assert not outcome.is_delivered
            assert outcome.answer
            assert "s3cret" not in outcome.answer
            await destination.close()
        await strict.stop()

    async def test_binary_mode_has_the_attributes_as_headers_and_the_key_is_the_task(self, peer: KafkaBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await asyncio.to_thread(peer.messages)
        headers = dict(message.headers())
        assert headers["ce_id"].decode() == event().id
        assert headers["content-type"] == b"application/json"
        assert headers["traceparent"].startswith(b"00-")
        assert message.key() == b"order-1"
        await destination.close()
