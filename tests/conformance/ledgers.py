"""What every ledger must do. An implementation's test is a subclass with two fixtures, `opened` and `empty`.

`opened` returns a function that opens the ledger again: another process's view of the same store.
`empty` returns one that opens another store.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from submitter.errors import TaskNotFound, UrlUnknown
from submitter.ledger.base import Delivery, Disabled, Ledger, Quarantined, Record, Route, Settlement
from submitter.schedule import Backoff, Patience
from submitter.task import Diverted, Doubted, Report, Sending, Task, TaskStatus, Transition, Unheard, transition

NOW = 1_781_080_800_000
PATIENCE = Patience(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
ALL = Route("all", None, "t1", 100)

Open = Callable[[], Ledger]


def task(id: str, **fields: Any) -> Task:
    made = Task(id, "kling", TaskStatus.CREATED, NOW, NOW, PATIENCE, poll_at_ms=NOW + 1000)
    return msgspec.structs.replace(made, **fields)


def report(status: TaskStatus) -> Callable[[Task], Transition | None]:
    return lambda current: transition(current, Report("callback", status, "893"), NOW)


async def succeed(ledger: Ledger, id: str) -> None:
    await ledger.reserve(task(id))
    for status in (TaskStatus.SUBMITTED, TaskStatus.SUCCEED):
        await ledger.apply(id, report(status))


class LedgerSuite:
    """The promises of `submitter.ledger.base.Ledger`."""

    async def test_a_reservation_is_made_once(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        answers = await asyncio.gather(*(which.reserve(task("a")) for which in (ledger, other) for _ in range(10)))
        assert sum(answer.is_new for answer in answers if answer) == 1
        assert {answer.task.external_task_id for answer in answers if answer} == {"a"}

    async def test_slots_are_never_overbooked(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        reserve = (which.reserve(task(f"{n}-{i}"), 3) for n, which in enumerate((ledger, other)) for i in range(10))
        made = [answer for answer in await asyncio.gather(*reserve) if answer is not None]
        assert len(made) == 3
        assert await ledger.open_tasks("kling") == 3
        id = made[0].task.external_task_id
        await ledger.apply(id, report(TaskStatus.FAILED))
        assert await other.reserve(task("next"), 3) is not None

    async def test_state_and_event_are_one(self, opened: Open) -> None:
        ledger = opened()
        await succeed(ledger, "a")
        other = opened()
        assert (await other.get("a")).status is TaskStatus.SUCCEED
        events = await other.events("a")
        assert [event.type for event in events] == ["task.submitted", "task.succeed"]
        assert [event.sequence for event in events] == [1, 2]
        assert len({event.id for event in events}) == 2

    async def test_concurrent_reports_are_one_event_each(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"))
        statuses = [TaskStatus.SUBMITTED, TaskStatus.PROCESSING, TaskStatus.SUCCEED] * 10
        await asyncio.gather(
            *(which.apply("a", report(s)) for which, s in zip(itertools.cycle((ledger, other)), statuses, strict=False))
        )
        current = await ledger.get("a")
        assert current.status is TaskStatus.SUCCEED
        events = await ledger.events("a")
        assert [event.sequence for event in events] == list(range(1, current.sequence + 1))
        assert [event.type for event in events][-1] == "task.succeed"

    async def test_what_decide_raises_reaches_its_caller_alone(self, opened: Open) -> None:
        ledger = opened()
        await ledger.reserve(task("a"))
        await ledger.reserve(task("b"))

        def refuse(current: Task) -> Transition | None:
            raise UrlUnknown("no")

        results = await asyncio.gather(
            ledger.apply("a", refuse),
            ledger.apply("missing", report(TaskStatus.SUBMITTED)),
            ledger.apply("b", report(TaskStatus.SUBMITTED)),
            return_exceptions=True,
        )
        assert isinstance(results[0], UrlUnknown)
        assert isinstance(results[1], TaskNotFound)
        assert (await ledger.get("a")).status is TaskStatus.CREATED
        assert (await ledger.get("b")).status is TaskStatus.SUBMITTED

    async def test_a_task_that_is_not_there_is_task_not_found(self, opened: Open) -> None:
        with pytest.raises(TaskNotFound, match="tasks list"):
            await opened().get("missing")

    async def test_tasks_are_paged_newest_first(self, opened: Open) -> None:
        ledger = opened()
        for i in range(7):
            await ledger.reserve(task(f"t{i}", created_at_ms=NOW + i // 2))
        pages, before = [], None
        while page := await ledger.tasks(limit=3, before_id=before):
            pages.append([found.external_task_id for found in page])
            before = page[-1].external_task_id
        assert pages == [["t6", "t5", "t4"], ["t3", "t2", "t1"], ["t0"]]
        await ledger.apply("t3", report(TaskStatus.FAILED))
        failed = await ledger.tasks(status=TaskStatus.FAILED, vendor="kling", limit=9)
        assert [found.external_task_id for found in failed] == ["t3"]
        assert await ledger.tasks(vendor="novita", limit=9) == []

    async def test_a_poll_is_claimed_by_one_until_its_lease_ends(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for i in range(5):
            await ledger.reserve(task(f"t{i}", poll_at_ms=NOW + i))
        early = await ledger.claim_polls(NOW - 1, 1000, 10)
        assert (early.items, early.next_due_ms) == ([], NOW)
        claims = await asyncio.gather(ledger.claim_polls(NOW + 9, 1000, 3), other.claim_polls(NOW + 9, 1000, 3))
        ids = [found.external_task_id for claim in claims for found in claim.items]
        assert sorted(ids) == ["t0", "t1", "t2", "t3", "t4"]
        assert (await other.claim_polls(NOW + 1008, 1000, 10)).items == []
        assert len((await other.claim_polls(NOW + 1009, 1000, 10)).items) == 5

    async def test_an_answer_settles_the_poll_and_a_doubt_makes_it_due(self, opened: Open) -> None:
        ledger = opened()
        await ledger.reserve(task("a", status=TaskStatus.SUBMITTED, poll_at_ms=NOW))
        await ledger.claim_polls(NOW, 120_000, 10)
        await ledger.apply("a", lambda current: transition(current, Unheard(), NOW))
        assert (await ledger.claim_polls(NOW + 121_000, 1000, 10)).items == []
        await ledger.apply("a", lambda current: transition(current, Doubted(), NOW + 5))
        assert len((await ledger.claim_polls(NOW + 5, 1000, 10)).items) == 1

    async def test_a_task_is_found_by_the_vendors_id_for_it(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for id in ("a", "b"):
            await ledger.reserve(task(id))
        await ledger.reserve(task("known", task_id="7", status=TaskStatus.SUBMITTED))
        await ledger.apply("a", report(TaskStatus.SUBMITTED))  # the vendor's 893
        assert [found.external_task_id for found in await other.by_task_ids("kling", ["893", "1"])] == ["a"]
        assert [found.external_task_id for found in await other.by_task_ids("kling", ["7"])] == ["known"]
        assert await other.by_task_ids("oxen", ["893"]) == []

    async def test_a_task_that_goes_to_another_vendor_counts_there(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"), 1)
        assert await other.reserve(task("b"), 1) is None
        await ledger.apply("a", lambda current: transition(current, Diverted("novita", PATIENCE, "no balance"), NOW))
        assert (await other.open_tasks("kling"), await other.open_tasks("novita")) == (0, 1)
        assert await other.reserve(task("b"), 1) is not None
        assert [found.external_task_id for found in await other.tasks(vendor="novita", limit=9)] == ["a"]
        assert await other.reserve(task("c", vendor="novita"), 1) is None

    async def test_a_vendors_open_tasks_can_all_be_made_due(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        later = {"status": TaskStatus.SUBMITTED, "poll_at_ms": NOW + 900_000}
        await ledger.reserve(task("a", vendor="oxen", task_id="1", **later))
        await ledger.reserve(task("other", task_id="2", **later))
        await ledger.reserve(task("ended", vendor="oxen", task_id="3", status=TaskStatus.SUCCEED, poll_at_ms=None))
        await ledger.reserve(task("unsent", vendor="oxen", poll_at_ms=NOW + 900_000))
        assert await other.hasten("oxen", NOW) == 1
        assert [found.external_task_id for found in (await ledger.claim_polls(NOW, 1000, 9)).items] == ["a"]

    async def test_an_event_goes_once_to_each_hook_that_wants_it(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for i in range(20):
            await succeed(ledger, f"t{i}")
        ends = Route("ends", frozenset({"task.succeed"}), "t2", 100)
        claims = await asyncio.gather(
            *(which.claim_deliveries([ALL, ends], NOW, 1000) for which in (ledger, other) * 3)
        )
        got = [(found.hook, found.event.id) for claim in claims for found in claim.items]
        assert len(got) == len(set(got)) == 60
        assert {found.event.type for claim in claims for found in claim.items if found.hook == "ends"} == {
            "task.succeed"
        }

    async def test_a_pause_is_seen_until_it_ends(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.pause("all", NOW + 5000, "HTTP 500")
        (state,) = await other.hook_states([ALL])
        assert (state.paused, state.paused_until_ms) == ("HTTP 500", NOW + 5000)
        await other.pause("all", None)
        (state,) = await ledger.hook_states([ALL])
        assert state.paused is None

    async def test_an_ordered_hook_gets_a_tasks_events_one_after_the_other(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for id in ("a", "b"):
            await succeed(ledger, id)
        bus = Route("bus", None, "t1", 100, ordered=True)
        claims = await asyncio.gather(*(which.claim_deliveries([bus], NOW, 1000) for which in (ledger, other)))
        first = [found for claim in claims for found in claim.items]
        assert sorted((one.event.external_task_id, one.event.sequence) for one in first) == [("a", 1), ("b", 1)]
        blocked = await ledger.claim_deliveries([bus], NOW, 1000)
        assert (blocked.items, blocked.next_due_ms) == ([], NOW + 1000)  # when the leases end
        by_task = {one.event.external_task_id: one for one in first}
        await ledger.settle(by_task["a"], Settlement("done"))
        await ledger.settle(by_task["b"], Settlement("due", due_at_ms=NOW + 60_000, error="away"))
        second = await other.claim_deliveries([bus], NOW, 1000)
        assert [(one.event.external_task_id, one.event.sequence) for one in second.items] == [("a", 2)]
        assert second.next_due_ms == NOW + 1000
        third = await ledger.claim_deliveries([bus], NOW + 60_000, 1000)
        assert {(one.event.external_task_id, one.event.sequence) for one in third.items} == {("a", 2), ("b", 1)}

    async def test_a_hook_without_room_gets_nothing_and_delays_no_other(self, opened: Open) -> None:
        ledger = opened()
        for i in range(5):
            await succeed(ledger, f"t{i}")
        full, free = Route("full", None, "t1", 0), Route("free", None, "t2", 4)
        claim = await ledger.claim_deliveries([full, free], NOW, 1000)
        assert [found.hook for found in claim.items] == ["free"] * 4
        assert len((await ledger.claim_deliveries([full, free], NOW, 1000)).items) == 4

    async def test_a_lost_delivery_is_claimed_again_and_the_late_end_of_the_first_counts_for_nothing(
        self, opened: Open
    ) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"))
        await ledger.apply("a", report(TaskStatus.SUBMITTED))
        (first,) = (await ledger.claim_deliveries([ALL], NOW, 1000)).items
        claim = await other.claim_deliveries([ALL], NOW + 999, 1000)
        assert (claim.items, claim.next_due_ms) == ([], NOW + 1000)
        (second,) = (await other.claim_deliveries([ALL], NOW + 1000, 1000)).items
        assert (first.attempts, second.attempts) == (1, 2)
        assert first.event.body == second.event.body
        assert not await ledger.settle(first, Settlement("dead", error="late"))
        assert await other.settle(second, Settlement("done"))
        assert (await ledger.claim_deliveries([ALL], NOW + 99_000, 1000)).items == []

    async def test_dead_letters_are_kept_listed_and_replayed(self, opened: Open) -> None:
        ledger = opened()
        for id in ("a", "b"):
            await ledger.reserve(task(id))
            await ledger.apply(id, report(TaskStatus.SUBMITTED))
        for found in (await ledger.claim_deliveries([ALL], NOW, 1000)).items:
            await ledger.settle(found, Settlement("dead", error="HTTP 500"))
        dead = await ledger.deliveries(hook="all", state="dead", limit=9)
        assert [(letter.event.external_task_id, letter.last_error) for letter in dead] == [
            ("b", "HTTP 500"),
            ("a", "HTTP 500"),
        ]
        assert await ledger.replay("all", NOW + 5, external_task_id="b") == 1
        assert await ledger.replay("all", NOW + 5) == 1
        again = (await ledger.claim_deliveries([ALL], NOW + 5, 1000)).items
        assert [found.attempts for found in again] == [1, 1]

    async def test_a_hook_that_is_gone_is_disabled_until_it_is_replayed_or_moved(self, opened: Open) -> None:
        ledger = opened()
        for id in ("a", "b"):
            await ledger.reserve(task(id))
            await ledger.apply(id, report(TaskStatus.SUBMITTED))
        first = (await ledger.claim_deliveries([msgspec.structs.replace(ALL, room=1)], NOW, 1000)).items[0]
        await ledger.settle(first, Settlement("dead", error="HTTP 410", disable_target="t1"))
        assert (await ledger.claim_deliveries([ALL], NOW, 1000)).items == []
        (state,) = await ledger.hook_states([ALL])
        assert (state.dead, state.disabled) == (2, "HTTP 410")
        await ledger.reserve(task("c"))
        await ledger.apply("c", report(TaskStatus.SUBMITTED))
        moved = msgspec.structs.replace(ALL, target="elsewhere")
        assert len((await ledger.claim_deliveries([moved], NOW, 1000)).items) == 1
        assert await ledger.replay("all", NOW) == 2
        assert len((await ledger.claim_deliveries([ALL], NOW, 1000)).items) == 2

    async def test_a_body_in_quarantine_is_kept_once_and_counted(self, opened: Open) -> None:
        ledger = opened()
        for body in (b"\xff\x00", b"{}", b"{}"):
            await ledger.quarantine(Quarantined("a", "kling", NOW, "unknown status", body))
        kept = {entry.body: entry.times for entry in await ledger.quarantined(10)}
        assert kept == {b"\xff\x00": 1, b"{}": 2}

    async def test_whole_records_are_paged_and_loaded_into_an_empty_ledger(
        self, opened: Open, empty: Callable[[], Ledger]
    ) -> None:
        ledger, other = opened(), empty()
        for i in range(5):
            await succeed(ledger, f"t{i}")
        await ledger.reserve(task("Unsent", metadata={"a": "ü 猫"}))
        ends = Route("ends", frozenset({"task.succeed"}), "t2", 100)
        claimed = (await ledger.claim_deliveries([ALL, ends], NOW, 1000)).items
        await ledger.settle(claimed[0], Settlement("done"))
        await ledger.settle(claimed[1], Settlement("dead", error="HTTP 500"))
        await ledger.claim_polls(NOW + 2000, 5000, 1)  # a lease moves too
        pages: list[Record] = []
        while ids := await ledger.ids(pages[-1].task.external_task_id if pages else None, 4):
            page = await ledger.records(ids)
            assert [record.task.external_task_id for record in page] == ids
            pages.extend(page)
            await other.load(page)
        copied = [record.task.external_task_id for record in pages]
        assert sorted(copied) == ["Unsent", "t0", "t1", "t2", "t3", "t4"]
        assert sorted(await other.ids(None, 100)) == sorted(copied)
        assert await other.records(copied) == pages
        assert sum(len(record.deliveries) for record in pages) == 15
        again = (await other.claim_deliveries([ALL, ends], NOW + 1000, 1000)).items
        assert len(again) == 13  # without the one that is done and the one that is dead; none is made anew
        await other.apply("Unsent", report(TaskStatus.SUBMITTED))
        assert len((await other.claim_deliveries([ALL], NOW + 1000, 1000)).items) == 1

    async def test_a_disabled_hook_can_be_noted(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for reason in ("HTTP 410", "gone"):
            await ledger.disable(Disabled("all", "t1", reason))
        assert await other.disabled() == [Disabled("all", "t1", "gone")]
        assert (await other.hook_states([ALL]))[0].disabled == "gone"

    async def test_pruning_takes_what_ended_long_ago_and_nothing_that_is_on_its_way(self, opened: Open) -> None:
        ledger = opened()
        for id in ("told", "telling"):
            await succeed(ledger, id)
        await ledger.reserve(task("open"))
        await ledger.quarantine(Quarantined("told", "kling", NOW - 1, "unknown status", b"{}"))
        for found in (await ledger.claim_deliveries([ALL], NOW, 1000)).items:
            if found.event.external_task_id == "told":
                await ledger.settle(found, Settlement("done"))
        await succeed(ledger, "unrouted")
        assert await ledger.prune(NOW, 10) == 0  # updated at NOW, and not before
        assert await ledger.prune(NOW + 1, 10) == 1
        assert sorted(await ledger.ids(None, 10)) == ["open", "telling", "unrouted"]
        assert await ledger.events("told") == []
        assert await ledger.quarantined(10) == []
        assert len(await ledger.deliveries(hook=None, state=None, limit=10)) == 2

    async def test_counts_are_of_what_is_open(self, opened: Open) -> None:
        ledger = opened()
        await succeed(ledger, "a")
        await ledger.reserve(task("b"))
        counts = await ledger.counts()
        assert counts["task.created"] == 1
        assert counts.get("task.succeed", 0) == 0
        assert (counts["delivery.due"], counts["delivery.dead"], counts["quarantine"]) == (0, 0, 0)

    async def test_a_change_by_another_process_is_seen(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        mark = ledger.mark()
        waiting = asyncio.create_task(ledger.changed(mark, 10))
        await other.reserve(task("a"))
        async with asyncio.timeout(5):
            await waiting
        assert ledger.mark() != mark

    async def test_a_lease_to_send_is_held_by_one(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"))

        def send(sender: str) -> Callable[[Task], Transition | None]:
            return lambda current: transition(current, Sending(sender, NOW + 1000), NOW)

        answers = await asyncio.gather(
            *(which.apply("a", send(f"s{i}")) for i, which in enumerate((ledger, other) * 4))
        )
        assert sum(answer.transition is not None for answer in answers) == 1

    async def test_two_workers_deliver_everything_at_least_once(self, opened: Open) -> None:
        await self._work(opened, 2)

    async def test_eight_workers_deliver_everything_at_least_once(self, opened: Open) -> None:
        await self._work(opened, 8)

    async def _work(self, opened: Open, workers: int) -> None:
        ledgers = [opened() for _ in range(workers)]
        for i in range(30):
            await ledgers[0].reserve(task(f"t{i}"))
        seen: list[str] = []

        async def work(ledger: Ledger, n: int) -> None:
            for i in range(n, 30, workers):
                await ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED))
            quiet = 0
            while quiet < 3:
                found: list[Delivery] = (
                    await ledger.claim_deliveries([msgspec.structs.replace(ALL, room=4)], NOW, 60_000)
                ).items
                quiet = 0 if found else quiet + 1
                for delivery in found:
                    seen.append(delivery.event.id)
                    assert await ledger.settle(delivery, Settlement("done"))

        await asyncio.gather(*(work(ledger, n) for n, ledger in enumerate(ledgers)))
        assert len(seen) == len(set(seen)) == 30
