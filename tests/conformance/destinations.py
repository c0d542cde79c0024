"""What every destination must do. An implementation's test is a subclass with one fixture, `peer`."""

import asyncio
from typing import Any, Protocol

import msgspec

from receiver.destinations.base import Destination
from submitter.event import Event, cloud_event, event_id
from submitter.schedule import Backoff, Patience
from submitter.task import Task, TaskStatus

NOW_S = 1_781_080_800.0


class Peer(Protocol):
    """The other side: opens our destination, and tells what arrived."""

    def open(self, **settings: Any) -> Destination: ...

    async def arrived(self) -> list[str]:
        """Return the ids of the events that arrived, in their order."""
        ...

    async def refuse(self) -> None:
        """Refuse every event."""
        ...

    async def accept(self) -> None:
        """Refuse nothing any more."""
        ...


class NamedPeer(Peer, Protocol):
    """One whose topic, queue or stream must exist before events are sent to it."""

    def open_missing(self) -> Destination:
        """Open a destination that leads to nothing."""
        ...


class GuardedPeer(Peer, Protocol):
    """One that asks for credentials."""

    def open_stranger(self, secret: str) -> Destination:
        """Open a destination with credentials that are wrong, `secret` among them."""
        ...


class DistantPeer(Peer, Protocol):
    """One that can go away."""

    async def away(self) -> None:
        """Stop answering."""
        ...

    async def back(self) -> None:
        """Answer again, at the same address."""
        ...


def event(n: int = 1, task: str = "order-1") -> Event:
    patience = Patience(Backoff(1, 1, 1), Backoff(1, 1, 1), 1)
    made = Task(task, "kling", TaskStatus.PROCESSING, 1000, 1000, patience, sequence=n, metadata={"a": "ü 猫"})
    id = event_id("kling", task, n)
    body = cloud_event(id=id, type="task.processing", task=made, time_ms=1000)
    return Event(id, "task.processing", task, n, 1000, body)


def large_event(body_bytes: int) -> Event:
    """Return an event whose body is of this size."""
    small = event(1, "order-large")
    padding = b'{"padding":"' + b"x" * (body_bytes - len(small.body) - 13) + b'",'
    return msgspec.structs.replace(small, body=padding + small.body[1:])


class DestinationSuite:
    """The promises of `receiver.destinations.base.Destination`."""

    async def test_an_event_is_delivered_and_acknowledged(self, peer: Peer) -> None:
        destination = peer.open()
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        assert await peer.arrived() == [event().id]
        assert await destination.reach() is None
        await destination.close()

    async def test_a_refusal_is_an_outcome_that_says_what_was_answered(self, peer: Peer) -> None:
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

    async def test_a_tasks_events_arrive_in_their_order(self, peer: Peer) -> None:
        destination = peer.open()
        for n in range(1, 6):
            assert (await destination.send(event(n), NOW_S)).is_delivered
        assert await peer.arrived() == [event(n).id for n in range(1, 6)]
        await destination.close()

    async def test_two_workers_at_once_lose_nothing(self, peer: Peer) -> None:
        workers = [peer.open(concurrency=5), peer.open(concurrency=5)]
        events = [event(1, f"order-{n}") for n in range(20)]
        sends = (workers[n % 2].send(one, NOW_S) for n, one in enumerate(events))
        outcomes = await asyncio.gather(*sends)
        assert all(outcome.is_delivered for outcome in outcomes), outcomes
        assert sorted(await peer.arrived()) == sorted(one.id for one in events)
        for worker in workers:
            await worker.close()

    async def test_many_at_once_have_each_an_outcome_of_its_own(self, peer: Peer) -> None:
        destination = peer.open(concurrency=100)
        events = [event(1, f"order-{n}") for n in range(64)]
        outcomes = await asyncio.gather(*(destination.send(one, NOW_S) for one in events))
        assert all(outcome.is_delivered for outcome in outcomes), outcomes
        assert sorted(await peer.arrived()) == sorted(one.id for one in events)
        await destination.close()

    async def test_an_event_that_is_too_large_is_refused_and_spoils_no_other(self, peer: Peer) -> None:
        """What has no such limit (`most_bytes` is None) takes it."""
        most = getattr(peer, "most_bytes", None)
        destination = peer.open()
        large = large_event(2_000_000 if most is None else most)
        outcome, other = await asyncio.gather(destination.send(large, NOW_S), destination.send(event(2), NOW_S))
        assert outcome.is_delivered is (most is None), outcome
        assert outcome.answer
        assert other.is_delivered, other
        assert (await destination.send(event(3), NOW_S)).is_delivered
        await destination.close()

    async def test_closing_what_was_never_used_is_well(self, peer: Peer) -> None:
        await peer.open().close()


class DistantSuite(DestinationSuite):
    """What is promised besides of a destination that can be away."""

    async def test_a_peer_that_goes_away_and_comes_back_is_reached_again(self, peer: DistantPeer) -> None:
        destination = peer.open()
        assert (await destination.send(event(1), NOW_S)).is_delivered
        await peer.away()
        gone = await destination.send(event(2), NOW_S)
        assert not gone.is_delivered
        assert gone.answer
        assert await destination.reach()
        await peer.back()
        assert (await destination.send(event(2), NOW_S)).is_delivered
        assert (await peer.arrived())[-1] == event(2).id
        assert await destination.reach() is None
        await destination.close()

    async def test_a_host_inside_the_network_must_be_allowed(self, peer: DistantPeer) -> None:
        destination = peer.open(allow=())
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert "KLING_RELAY_ALLOW_HOSTS" in outcome.answer
        assert "KLING_RELAY_ALLOW_HOSTS" in str(await destination.reach())
        assert await peer.arrived() == []
        await destination.close()


class NamedSuite:
    """What is promised of a destination that must be made before it is used."""

    async def test_what_is_not_there_is_told_and_does_not_disable_the_hook(self, peer: NamedPeer) -> None:
        destination = peer.open_missing()
        assert await destination.reach()
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        assert (outcome.is_gone, outcome.is_final) == (False, False)
        await destination.close()


class GuardedSuite:
    """What is promised of a destination that asks for credentials."""

    async def test_wrong_credentials_are_told_without_them(self, peer: GuardedPeer) -> None:
        destination = peer.open_stranger("s3cret")
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        assert "s3cret" not in outcome.answer
        assert not outcome.is_final
        await destination.close()
