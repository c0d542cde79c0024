"""A short simulated day: it has no findings, it repeats exactly, and it finds a product that is broken."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from receiver import verification
from receiver.callbacks import CallbackEndpoint
from receiver.dispatcher import Dispatcher
from receiver.poller import Poller
from submitter import transition
from submitter.create import Creator
from submitter.event import Event, event_of
from submitter.ledger import decide
from submitter.ledger.base import Delivery, Settlement
from submitter.task import Task
from tests.torture import day_plan
from tests.torture.day import run_day

TASKS = 50


def test_a_day_keeps_every_promise(tmp_path: Path) -> None:
    done, _ = run_day(1, tmp_path, 200)
    assert done.findings == []
    assert done.counts["tasks succeed"] > 150
    for what in ("fault kill", "fault clock jump", "polls", "callbacks forged", "deliveries dead", "submit stopped"):
        assert done.counts[what] > 0, what


def test_the_same_seed_is_the_same_day(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("first", 2), ("second", 2), ("third", 3)):
        folder = tmp_path / name
        folder.mkdir()
        digests.append(run_day(seed, folder, 20)[1])
    assert digests[0] == digests[1] != digests[2]


def forget_polls(patch: pytest.MonkeyPatch) -> None:
    async def forget(self: Poller, name: str, tasks: object) -> None:
        """Send no query."""

    patch.setattr(Poller, "_poll_vendor", forget)


def settle_before_sending(patch: pytest.MonkeyPatch) -> None:
    attempt = Dispatcher._attempt

    async def settle_first(self: Dispatcher, delivery: Delivery) -> None:
        await self._ledger.settle(delivery, Settlement("done"))
        await attempt(self, delivery)

    patch.setattr(Dispatcher, "_attempt", settle_first)


def lose_some_events(patch: pytest.MonkeyPatch) -> None:
    def lossy(change: transition.Transition) -> Event | None:
        event = event_of(change)
        return None if event is not None and event.id.endswith("0") else event

    patch.setattr(decide, "event_of", lossy)


def send_again_without_asking(patch: pytest.MonkeyPatch) -> None:
    async def find_nothing(self: Creator, task: Task, vendor: object) -> None:
        """Return that the vendor has no such task."""

    patch.setattr(Creator, "_look_up", find_nothing)
    patch.setattr(day_plan, "VENDORS", {"novita": 1.0})


def acknowledge_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    accept = CallbackEndpoint._accept
    later: list[asyncio.Task[str]] = []

    async def hasty(self: CallbackEndpoint, vendor: str, id: str, headers: Mapping[bytes, bytes], body: bytes) -> str:
        async def accept_later() -> str:
            await asyncio.sleep(0.5)
            return await accept(self, vendor, id, headers, body)

        later.append(asyncio.create_task(accept_later()))
        return "applied"

    patch.setattr(CallbackEndpoint, "_accept", hasty)


def believe_forgeries(patch: pytest.MonkeyPatch) -> None:
    def believe(*_: Any) -> None:
        """Verify nothing."""

    patch.setattr(verification, "verify", believe)


def poll_soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transition, "next_poll_ms", lambda task, now_ms: now_ms + 60_000)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (forget_polls, "open 1"),
        (settle_before_sending, "the hook never accepted it"),
        (lose_some_events, "and its events are"),
        (send_again_without_asking, "times at novita"),
        (acknowledge_before_the_commit, "was acknowledged, and the ledger has"),
        (believe_forgeries, "a forged callback"),
        (poll_soon, "had its callbacks, and was polled"),
    ],
)
def test_a_broken_product_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    break_it(monkeypatch)
    done, _ = run_day(1, tmp_path, TASKS)
    assert any(words in finding for finding in done.findings), done.findings
