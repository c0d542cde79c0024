"""The short form of `make torture PARTS=kills`, and the proof that its checks find what is broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import needs
from tests.torture.broken import acknowledge_before_the_commit
from tests.torture.check import Acknowledged, Received, Seen, VendorTask, check
from tests.torture.engines import has_postgres
from tests.torture.kills import storm
from tests.torture.store import Stored, StoredDelivery, StoredEvent, StoredTask


async def test_killed_processes_lose_nothing_and_create_nothing_twice(tmp_path: Path) -> None:
    result = await storm(1, tmp_path, "sqlite", 12)
    assert result.findings == []
    assert result.counts["kills"] >= 12
    assert result.counts["callbacks acknowledged"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "jumps"), [("postgres", False), ("two receivers", False), ("sqlite", True)])
async def test_killed_processes_lose_nothing_on_other_engines(tmp_path: Path, engine: Any, jumps: bool) -> None:
    if engine == "postgres":
        needs("PostgreSQL", is_there=has_postgres())
    result = await storm(2, tmp_path, engine, 12, jumps=jumps)
    assert result.findings == []


async def test_a_receiver_that_acknowledges_before_the_commit_is_found(tmp_path: Path) -> None:
    result = await storm(3, tmp_path, "sqlite", 8, sabotage=acknowledge_before_the_commit)
    assert any("was acknowledged" in finding for finding in result.findings)


EVENTS = [
    StoredEvent(1, "a", 1, "evt_1", "task.submitted", 10, '{"id":"evt_1","subject":"a","type":"task.submitted"}'),
    StoredEvent(2, "a", 2, "evt_2", "task.succeed", 20, '{"id":"evt_2","subject":"a","type":"task.succeed"}'),
]
STORED = Stored(
    {"a": StoredTask("a", "kling", "succeed", "1", {"videos": [{"archived": None}]})},
    EVENTS,
    [StoredDelivery(event.seq, "hook", "done", 1) for event in EVENTS],
    unrouted=0,
)
SEEN = Seen(
    [VendorTask("a", "1", "succeed")],
    [Acknowledged("a", "succeed", 20)],
    [Received("hook", event.id, event.body.encode()) for event in EVENTS],
    ["hook"],
)


def test_what_keeps_every_rule_is_no_finding() -> None:
    assert check(STORED, SEEN) == []


def task(**changes: Any) -> Callable[[], tuple[Stored, Seen]]:
    return lambda: (replace(STORED, tasks={"a": replace(STORED.tasks["a"], **changes)}), SEEN)


def event(**changes: Any) -> Callable[[], tuple[Stored, Seen]]:
    return lambda: (replace(STORED, events=[EVENTS[0], replace(EVENTS[1], **changes)]), SEEN)


def seen(**changes: Any) -> Callable[[], tuple[Stored, Seen]]:
    return lambda: (STORED, replace(SEEN, **changes))


replace = msgspec.structs.replace
DEAD = StoredDelivery(1, "hook", "dead", 9)
OTHER = '{"id":"evt_2","subject":"b","type":"task.succeed"}'


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (seen(vendor=[VendorTask("a", "1", "succeed"), VendorTask("a", "2", "succeed")]), "paid for more than once"),
        (seen(vendor=[*SEEN.vendor, VendorTask("b", "2", "succeed")]), "has no such task"),
        (seen(vendor=[]), "the vendor has no such task"),
        (task(status="failed"), "and at the vendor succeed"),
        (task(task_id="2"), "at the vendor succeed as 1"),
        (seen(archive={}), "is not archived"),
        (event(id="evt_1"), "2 events have the id"),
        (event(external_task_id="b"), "events of b, and no such task"),
        (event(sequence=3), "have the sequences [1, 3]"),
        (event(type="task.submitted"), "went through"),
        (event(type="task.failed"), "its last event is"),
        (event(body=OTHER), "speaks of task.succeed of b"),
        (event(time_ms=21), "was acknowledged at 20, and is lost"),
        (seen(received=SEEN.received[:1]), "never got event evt_2"),
        (seen(received=[*SEEN.received, Received("hook", "evt_9", b"{}")]), "which the ledger does not have"),
        (seen(received=[*SEEN.received, Received("hook", "evt_1", b"{}")]), "with another body"),
        (lambda: (replace(STORED, deliveries=STORED.deliveries[:1]), SEEN), "has 0 deliveries"),
        (lambda: (replace(STORED, deliveries=STORED.deliveries * 2), SEEN), "has 2 deliveries"),
        (
            lambda: (
                replace(STORED, deliveries=[replace(STORED.deliveries[0], state="dead"), STORED.deliveries[1]]),
                SEEN,
            ),
            "is dead",
        ),
    ],
)
def test_every_broken_rule_is_found(broken: Callable[[], tuple[Stored, Seen]], expected: str) -> None:
    assert any(expected in finding for finding in check(*broken()))
