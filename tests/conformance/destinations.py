"""Conformance suites for destinations. An implementation's test subclasses them and defines the fixture `peer`."""

import asyncio
from typing import Any, Protocol

import msgspec

from receiver.destinations.base import Destination
from submitter.event import Event, cloud_event, event_id
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus

NOW_S = 1_781_080_800.0


class Peer(Protocol):
    """The receiving end: opens a destination that leads to it, and returns the events that arrived.

    A peer with a size limit also has `too_large_bytes`, the size of an event body that it refuses.
    """

    def open(self, **settings: Any) -> Destination: ...

    async def arrived(self) -> list[str]:
        """Return the ids of the events that arrived, in order."""
        ...

    async def refuse(self) -> None:
        """Refuse every event from now on."""
        ...

    async def accept(self) -> None:
        """Accept every event again."""
        ...


class NamedPeer(Peer, Protocol):
    """A peer whose topic, queue or stream must be created before events are sent to it."""

    def open_missing(self) -> Destination:
        """Open a destination whose topic, queue or stream does not exist."""
        ...


class GuardedPeer(Peer, Protocol):
    """A peer that requires credentials."""

    def open_with_wrong_credentials(self, secret: str) -> Destination:
        """Open a destination with wrong credentials that contain `secret`."""
        ...


class DistantPeer(Peer, Protocol):
    """A peer that is reached over a network and can become unavailable."""

    async def away(self) -> None:
        """Stop answering."""
        ...

    async def back(self) -> None:
        """Answer again, at the same address."""
        ...


def event(n: int = 1, task: str = "order-1") -> Event:
    poll_policy = PollPolicy(Backoff(1, 1, 1), Backoff(1, 1, 1), 1)
    current = Task(task, "kling", TaskStatus.PROCESSING, 1000, 1000, poll_policy, sequence=n, metadata={"a": "ü 猫"})
    id = event_id("kling", task, n)
    body = cloud_event(id=id, type="task.processing", task=current, time_ms=1000)
    return Event(id, "task.processing", task, n, 1000, body)


def large_event(body_bytes: int) -> Event:
    """Return an event with a body of this size."""
    small = event(1, "order-large")
    padding = b'{"padding":"' + b"x" * (body_bytes - len(small.body) - 13) + b'",'
    return msgspec.structs.replace(small, body=padding + small.body[1:])


class DestinationSuite:
    """The contract of `receiver.destinations.base.Destination`."""

    async def test_an_event_is_delivered_and_acknowledged(self, peer: Peer) -> None:
        destination = peer.open()
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        assert await peer.arrived() == [event().id]
        assert await destination.reach() is None
        await destination.close()

    async def test_a_refused_event_is_a_failed_outcome_with_the_answer(self, peer: Peer) -> None:
        destination = peer.open()
        assert (await destination.send(event(1), NOW_S)).is_delivered
        await peer.refuse()
        outcome = await destination.send(event(2), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        await peer.accept()
        assert (await destination.send(event(2), NOW_S)).is_delivered
        assert (await peer.arrived())[-1] == event(2).id
        await destination.close()

    async def test_a_tasks_events_arrive_in_order(self, peer: Peer) -> None:
        destination = peer.open()
        for n in range(1, 6):
            assert (await destination.send(event(n), NOW_S)).is_delivered
        assert await peer.arrived() == [event(n).id for n in range(1, 6)]
        await destination.close()

    async def test_two_concurrent_workers_lose_no_event(self, peer: Peer) -> None:
        workers = [peer.open(concurrency=5), peer.open(concurrency=5)]
        events = [event(1, f"order-{n}") for n in range(20)]
        sends = (workers[n % 2].send(one, NOW_S) for n, one in enumerate(events))
        outcomes = await asyncio.gather(*sends)
        assert all(outcome.is_delivered for outcome in outcomes), outcomes
        assert sorted(await peer.arrived()) == sorted(one.id for one in events)
        for worker in workers:
            await worker.close()

    async def test_each_of_many_concurrent_events_gets_its_own_outcome(self, peer: Peer) -> None:
        destination = peer.open(concurrency=100)
        events = [event(1, f"order-{n}") for n in range(64)]
        outcomes = await asyncio.gather(*(destination.send(one, NOW_S) for one in events))
        assert all(outcome.is_delivered for outcome in outcomes), outcomes
        assert sorted(await peer.arrived()) == sorted(one.id for one in events)
        await destination.close()

    async def test_an_oversized_event_is_refused_and_does_not_fail_its_batch(self, peer: Peer) -> None:
        """A peer without a size limit accepts the event."""
        too_large_bytes = getattr(peer, "too_large_bytes", None)
        destination = peer.open()
        large = large_event(too_large_bytes or 2_000_000)
        outcome, other = await asyncio.gather(destination.send(large, NOW_S), destination.send(event(2), NOW_S))
        assert outcome.is_delivered is (too_large_bytes is None), outcome
        assert outcome.answer
        assert other.is_delivered, other
        assert (await destination.send(event(3), NOW_S)).is_delivered
        await destination.close()

    async def test_a_destination_that_was_never_used_can_be_closed(self, peer: Peer) -> None:
        await peer.open().close()


class DistantSuite(DestinationSuite):
    """The contract of a destination that is reached over a network."""

    async def test_delivery_resumes_after_an_outage(self, peer: DistantPeer) -> None:
        destination = peer.open()
        assert (await destination.send(event(1), NOW_S)).is_delivered
        await peer.away()
        during_outage = await destination.send(event(2), NOW_S)
        assert not during_outage.is_delivered
        assert during_outage.answer
        assert await destination.reach()
        await peer.back()
        assert (await destination.send(event(2), NOW_S)).is_delivered
        assert (await peer.arrived())[-1] == event(2).id
        assert await destination.reach() is None
        await destination.close()

    async def test_a_private_address_is_refused_unless_it_is_allowed(self, peer: DistantPeer) -> None:
        destination = peer.open(allow=())
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert "KLING_RELAY_ALLOW_HOSTS" in outcome.answer
        assert "KLING_RELAY_ALLOW_HOSTS" in str(await destination.reach())
        assert await peer.arrived() == []
        await destination.close()


class NamedSuite:
    """The contract of a destination whose topic, queue or stream must be created first."""

    async def test_a_missing_topic_is_a_failure_that_does_not_disable_the_hook(self, peer: NamedPeer) -> None:
        destination = peer.open_missing()
        assert await destination.reach()
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        assert (outcome.is_gone, outcome.is_final) == (False, False)
        await destination.close()


class GuardedSuite:
    """The contract of a destination that requires credentials."""

    async def test_wrong_credentials_are_a_failure_whose_answer_hides_them(self, peer: GuardedPeer) -> None:
        destination = peer.open_with_wrong_credentials("s3cret")
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        assert "s3cret" not in outcome.answer
        assert not outcome.is_final
        await destination.close()
