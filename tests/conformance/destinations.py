"""What every destination must do. An implementation's test is a subclass with one fixture, `peer`."""

from typing import Any, Protocol

from receiver.destinations.base import Destination
from submitter.event import Event, cloud_event, event_id
from submitter.schedule import Backoff, Patience
from submitter.task import Task, TaskStatus

NOW_S = 1_781_080_800.0


class Peer(Protocol):
    """The other side: opens our destination, and tells what arrived."""

    def open(self, **settings: Any) -> Destination: ...

    def arrived(self) -> list[str]:
        """Return the ids of the events that arrived."""
        ...

    def refuse(self, times: int) -> None:
        """Refuse the next events."""
        ...

    async def away(self) -> None:
        """Stop answering."""
        ...

    async def back(self) -> None:
        """Answer again, at the same address."""
        ...


def event(n: int = 1) -> Event:
    patience = Patience(Backoff(1, 1, 1), Backoff(1, 1, 1), 1)
    task = Task("order-1", "kling", TaskStatus.PROCESSING, 1000, 1000, patience, sequence=n, metadata={"a": "ü 猫"})
    id = event_id("kling", "order-1", n)
    body = cloud_event(id=id, type="task.processing", task=task, time_ms=1000)
    return Event(id, "task.processing", "order-1", n, 1000, body)


class DestinationSuite:
    """The promises of `receiver.destinations.base.Destination`."""

    async def test_an_event_is_delivered_and_acknowledged(self, peer: Peer) -> None:
        destination = peer.open()
        outcome = await destination.send(event(), NOW_S)
        assert outcome.is_delivered, outcome
        assert peer.arrived() == [event().id]
        assert await destination.reach() is None
        await destination.close()

    async def test_a_refusal_is_an_outcome_that_says_what_was_answered(self, peer: Peer) -> None:
        destination = peer.open()
        peer.refuse(1)
        outcome = await destination.send(event(), NOW_S)
        assert not outcome.is_delivered
        assert outcome.answer
        assert (await destination.send(event(), NOW_S)).is_delivered
        await destination.close()

    async def test_a_peer_that_goes_away_and_comes_back_is_reached_again(self, peer: Peer) -> None:
        destination = peer.open()
        assert (await destination.send(event(1), NOW_S)).is_delivered
        await peer.away()
        gone = await destination.send(event(2), NOW_S)
        assert not gone.is_delivered
        assert gone.answer
        assert await destination.reach()
        await peer.back()
        assert (await destination.send(event(2), NOW_S)).is_delivered
        assert peer.arrived()[-1] == event(2).id
        await destination.close()
