"""Conformance of the Kafka destination, against a real broker of the Kafka protocol."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from receiver.destinations import open_destination
from receiver.hook import Hook
from tests.conformance.destinations import NOW_S, DistantSuite, event
from tests.conformance.kafka_broker import KafkaBroker

ALLOWED = ("127.0.0.1",)


class TestKafka(DistantSuite):
    @pytest.fixture
    async def peer(self) -> AsyncIterator[KafkaBroker]:
        broker = KafkaBroker()
        await broker.start()
        yield broker
        await broker.stop()

    async def test_a_refused_event_is_a_failed_outcome_with_the_answer(self, peer: KafkaBroker) -> None:  # type: ignore[override]
        """The broker accepts every topic, so a broker that requires credentials refuses missing and wrong ones."""
        strict = KafkaBroker()
        await strict.start(authentication=True)
        for credentials, sasl in (("", "PLAIN"), ("me:s3cret@", "PLAIN"), ("me:s3cret@", "SCRAM-SHA-512")):
            url = strict.url.replace("://", f"://{credentials}") + f"?sasl={sasl}"
            destination = open_destination(Hook("bus", url, timeout_s=5), frozenset(ALLOWED))
            outcome = await destination.send(event(), NOW_S)
            assert not outcome.is_delivered
            assert outcome.answer
            assert "s3cret" not in outcome.answer
            await destination.close()
        await strict.stop()

    async def test_binary_mode_sends_the_attributes_as_headers_and_the_task_as_key(self, peer: KafkaBroker) -> None:
        destination = peer.open(mode="binary")
        assert (await destination.send(event(), NOW_S)).is_delivered
        (message,) = await asyncio.to_thread(peer.messages)
        headers = dict(message.headers())
        assert headers["ce_id"].decode() == event().id
        assert headers["content-type"] == b"application/json"
        assert headers["traceparent"].startswith(b"00-")
        assert message.key() == b"order-1"
        await destination.close()
