"""Conformance suite of the ledger protocol. To test an engine, subclass it and provide two fixtures.

`opened` returns a function that opens the same store once more, as another process does.
`empty` returns a function that opens a second, empty store.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from submitter.errors import TaskNotFound, UrlUnknown
from submitter.ledger.base import Delivery, Disabled, Ledger, Quarantined, Record, Settlement, Subscription
from submitter.observation import FailedOver, NoAnswer, Report, SendLease, Unconfirmed
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus
from submitter.transition import Transition, transition
from tests.conformance.ledger_clocks import ClockSuite
from tests.conformance.ledger_quarantine import QuarantineSuite

NOW = 1_781_080_800_000
POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
ALL = Subscription("all", None, "t1", 100)

Open = Callable[[], Ledger]


def task(id: str, **fields: Any) -> Task:
    created = Task(id, "kling", TaskStatus.CREATED, NOW, NOW, POLL_POLICY, poll_at_ms=NOW + 1000)
    return msgspec.structs.replace(created, **fields)


def report(status: TaskStatus) -> Callable[[Task], Transition | None]:
    return lambda current: transition(current, Report("callback", status, "893"), NOW)


async def succeed(ledger: Ledger, id: str) -> None:
    await ledger.reserve(task(id))
    for status in (TaskStatus.SUBMITTED, TaskStatus.SUCCEED):
        await ledger.apply(id, report(status))


class LedgerSuite(QuarantineSuite, ClockSuite):
    """What `submitter.ledger.base.Ledger` promises."""

    async def test_reserve_is_idempotent(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        results = await asyncio.gather(*(which.reserve(task("a")) for which in (ledger, other) for _ in range(10)))
        assert sum(result.is_new for result in results if result) == 1
        assert {result.task.external_task_id for result in results if result} == {"a"}

    async def test_reserve_never_exceeds_the_slots(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        reserve = (which.reserve(task(f"{n}-{i}"), 3) for n, which in enumerate((ledger, other)) for i in range(10))
        reserved = [result for result in await asyncio.gather(*reserve) if result is not None]
        assert len(reserved) == 3
        assert await ledger.open_tasks("kling") == 3
        id = reserved[0].task.external_task_id
        await ledger.apply(id, report(TaskStatus.FAILED))
        assert await other.reserve(task("next"), 3) is not None

    async def test_a_state_change_and_its_event_are_stored_together(self, opened: Open) -> None:
        ledger = opened()
        await succeed(ledger, "a")
        other = opened()
        assert (await other.get("a")).status is TaskStatus.SUCCEED
        events = await other.events("a")
        assert [event.type for event in events] == ["task.submitted", "task.succeed"]
        assert [event.sequence for event in events] == [1, 2]
        assert len({event.id for event in events}) == 2

    async def test_concurrent_applies_are_serialized_and_emit_one_event_each(self, opened: Open) -> None:
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

    async def test_an_exception_of_decide_is_raised_to_its_caller_only(self, opened: Open) -> None:
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

    async def test_a_missing_task_raises_task_not_found(self, opened: Open) -> None:
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
        with pytest.raises(TaskNotFound):
            await ledger.tasks(limit=9, before_id="missing")

    async def test_a_poll_is_leased_to_one_worker_until_the_lease_expires(self, opened: Open) -> None:
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

    async def test_apply_ends_a_poll_lease_and_an_unconfirmed_report_makes_the_poll_due(self, opened: Open) -> None:
        ledger = opened()
        await ledger.reserve(task("a", status=TaskStatus.SUBMITTED, poll_at_ms=NOW))
        await ledger.claim_polls(NOW, 120_000, 10)
        await ledger.apply("a", lambda current: transition(current, NoAnswer(), NOW))
        assert (await ledger.claim_polls(NOW + 121_000, 1000, 10)).items == []
        await ledger.apply("a", lambda current: transition(current, Unconfirmed(), NOW + 5))
        assert len((await ledger.claim_polls(NOW + 5, 1000, 10)).items) == 1

    async def test_a_task_is_found_by_its_vendor_task_id(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for id in ("a", "b"):
            await ledger.reserve(task(id))
        await ledger.reserve(task("known", task_id="7", status=TaskStatus.SUBMITTED))
        await ledger.apply("a", report(TaskStatus.SUBMITTED))  # reports the vendor's task id 893
        assert [found.external_task_id for found in await other.by_task_ids("kling", ["893", "1"])] == ["a"]
        assert [found.external_task_id for found in await other.by_task_ids("kling", ["7"])] == ["known"]
        assert await other.by_task_ids("oxen", ["893"]) == []

    async def test_failover_moves_a_task_to_the_slots_of_the_other_vendor(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"), 1)
        assert await other.reserve(task("b"), 1) is None
        await ledger.apply(
            "a", lambda current: transition(current, FailedOver("novita", POLL_POLICY, "no balance", None), NOW)
        )
        assert (await other.open_tasks("kling"), await other.open_tasks("novita")) == (0, 1)
        assert await other.reserve(task("b"), 1) is not None
        assert [found.external_task_id for found in await other.tasks(vendor="novita", limit=9)] == ["a"]
        assert await other.reserve(task("c", vendor="novita"), 1) is None

    async def test_make_due_makes_a_poll_due_for_each_open_task_of_a_vendor(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        later = {"status": TaskStatus.SUBMITTED, "poll_at_ms": NOW + 900_000}
        await ledger.reserve(task("a", vendor="oxen", task_id="1", **later))
        await ledger.reserve(task("other", task_id="2", **later))
        await ledger.reserve(task("ended", vendor="oxen", task_id="3", status=TaskStatus.SUCCEED, poll_at_ms=None))
        await ledger.reserve(task("unsent", vendor="oxen", poll_at_ms=NOW + 900_000))
        assert await other.make_due("oxen", NOW) == 1
        assert [found.external_task_id for found in (await ledger.claim_polls(NOW, 1000, 9)).items] == ["a"]

    async def test_each_subscribed_hook_gets_one_delivery_per_event(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for i in range(20):
            await succeed(ledger, f"t{i}")
        ends = Subscription("ends", frozenset({"task.succeed"}), "t2", 100)
        claims = await asyncio.gather(
            *(which.claim_deliveries([ALL, ends], NOW, 1000) for which in (ledger, other) * 3)
        )
        claimed = [(found.hook, found.event.id) for claim in claims for found in claim.items]
        assert len(claimed) == len(set(claimed)) == 60
        assert {found.event.type for claim in claims for found in claim.items if found.hook == "ends"} == {
            "task.succeed"
        }

    async def test_a_pause_is_visible_to_other_processes_until_it_ends(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.pause("all", NOW + 5000, "HTTP 500")
        (state,) = await other.hook_states([ALL])
        assert (state.paused, state.paused_until_ms) == ("HTTP 500", NOW + 5000)
        await other.pause("all", None)
        (state,) = await ledger.hook_states([ALL])
        assert state.paused is None

    async def test_an_ordered_hook_gets_the_events_of_a_task_one_at_a_time_in_sequence(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for id in ("a", "b"):
            await succeed(ledger, id)
        bus = Subscription("bus", None, "t1", 100, ordered=True)
        claims = await asyncio.gather(*(which.claim_deliveries([bus], NOW, 1000) for which in (ledger, other)))
        first = [found for claim in claims for found in claim.items]
        assert sorted((one.event.external_task_id, one.event.sequence) for one in first) == [("a", 1), ("b", 1)]
        blocked = await ledger.claim_deliveries([bus], NOW, 1000)
        assert (blocked.items, blocked.next_due_ms) == ([], NOW + 1000)  # when the leases expire
        by_task = {one.event.external_task_id: one for one in first}
        await ledger.settle(by_task["a"], Settlement("done"))
        await ledger.settle(by_task["b"], Settlement("due", due_at_ms=NOW + 60_000, error="HTTP 503"))
        second = await other.claim_deliveries([bus], NOW, 1000)
        assert [(one.event.external_task_id, one.event.sequence) for one in second.items] == [("a", 2)]
        assert second.next_due_ms == NOW + 1000
        third = await ledger.claim_deliveries([bus], NOW + 60_000, 1000)
        assert {(one.event.external_task_id, one.event.sequence) for one in third.items} == {("a", 2), ("b", 1)}

    async def test_a_hook_without_capacity_gets_nothing_and_delays_no_other(self, opened: Open) -> None:
        ledger = opened()
        for i in range(5):
            await succeed(ledger, f"t{i}")
        full, free = Subscription("full", None, "t1", 0), Subscription("free", None, "t2", 4)
        claim = await ledger.claim_deliveries([full, free], NOW, 1000)
        assert [found.hook for found in claim.items] == ["free"] * 4
        assert len((await ledger.claim_deliveries([full, free], NOW, 1000)).items) == 4

    async def test_an_expired_lease_is_claimed_again_and_a_late_settle_changes_nothing(self, opened: Open) -> None:
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

    async def test_dead_letters_are_listed_and_replayed(self, opened: Open) -> None:
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

    async def test_a_gone_hook_is_disabled_until_replay_or_a_new_endpoint(self, opened: Open) -> None:
        ledger = opened()
        for id in ("a", "b"):
            await ledger.reserve(task(id))
            await ledger.apply(id, report(TaskStatus.SUBMITTED))
        first = (await ledger.claim_deliveries([msgspec.structs.replace(ALL, capacity=1)], NOW, 1000)).items[0]
        await ledger.settle(first, Settlement("dead", error="HTTP 410", disable_endpoint="t1"))
        assert (await ledger.claim_deliveries([ALL], NOW, 1000)).items == []
        (state,) = await ledger.hook_states([ALL])
        assert (state.dead, state.disabled) == (2, "HTTP 410")
        await ledger.reserve(task("c"))
        await ledger.apply("c", report(TaskStatus.SUBMITTED))
        moved = msgspec.structs.replace(ALL, endpoint_fingerprint="elsewhere")
        assert len((await ledger.claim_deliveries([moved], NOW, 1000)).items) == 1
        assert await ledger.replay("all", NOW) == 2
        assert len((await ledger.claim_deliveries([ALL], NOW, 1000)).items) == 2

    async def test_a_write_can_be_checked_without_a_change(self, opened: Open) -> None:
        ledger = opened()
        await succeed(ledger, "a")
        await ledger.check_write()
        assert (await ledger.get("a")).status is TaskStatus.SUCCEED
        assert len(await ledger.ids(None, 10)) == 1

    async def test_records_are_paged_and_loaded_into_an_empty_ledger(
        self, opened: Open, empty: Callable[[], Ledger]
    ) -> None:
        ledger, other = opened(), empty()
        for i in range(5):
            await succeed(ledger, f"t{i}")
        await ledger.reserve(task("Unsent", metadata={"a": "ü 猫"}))
        ends = Subscription("ends", frozenset({"task.succeed"}), "t2", 100)
        claimed = (await ledger.claim_deliveries([ALL, ends], NOW, 1000)).items
        await ledger.settle(claimed[0], Settlement("done"))
        await ledger.settle(claimed[1], Settlement("dead", error="HTTP 500"))
        await ledger.claim_polls(NOW + 2000, 5000, 1)  # a poll lease is copied too
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
        assert len(again) == 13  # 15 without the done and the dead one: `load` leaves nothing in the outbox
        await other.apply("Unsent", report(TaskStatus.SUBMITTED))
        assert len((await other.claim_deliveries([ALL], NOW + 1000, 1000)).items) == 1

    async def test_disable_is_visible_to_other_processes(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        for reason in ("HTTP 410", "gone"):
            await ledger.disable(Disabled("all", "t1", reason))
        assert await other.disabled() == [Disabled("all", "t1", "gone")]
        assert (await other.hook_states([ALL]))[0].disabled == "gone"

    async def test_prune_deletes_old_ended_tasks_and_keeps_undelivered_ones(self, opened: Open) -> None:
        ledger = opened()
        for id in ("delivered", "due"):
            await succeed(ledger, id)
        await ledger.reserve(task("open"))
        await ledger.quarantine(Quarantined("delivered", "kling", NOW - 1, "unknown status", b"{}"))
        for found in (await ledger.claim_deliveries([ALL], NOW, 1000)).items:
            if found.event.external_task_id == "delivered":
                await ledger.settle(found, Settlement("done"))
        await succeed(ledger, "in_outbox")
        assert await ledger.prune(NOW, 10) == 0  # updated at NOW, not before it
        assert await ledger.prune(NOW + 1, 10) == 1
        assert sorted(await ledger.ids(None, 10)) == ["due", "in_outbox", "open"]
        assert await ledger.events("delivered") == []
        assert await ledger.quarantined(10) == []
        assert len(await ledger.deliveries(hook=None, state=None, limit=10)) == 2

    async def test_counts_leave_out_ended_tasks(self, opened: Open) -> None:
        ledger = opened()
        await succeed(ledger, "a")
        await ledger.reserve(task("b"))
        counts = await ledger.counts()
        assert counts["task.created"] == 1
        assert counts.get("task.succeed", 0) == 0
        assert (counts["delivery.due"], counts["delivery.dead"], counts["quarantine"]) == (0, 0, 0)

    async def test_wait_for_change_notices_another_process(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        version = ledger.version()
        waiting = asyncio.create_task(ledger.wait_for_change(version, 10))
        await other.reserve(task("a"))
        async with asyncio.timeout(5):
            await waiting
        assert ledger.version() != version

    async def test_a_send_lease_is_granted_to_one_submitter(self, opened: Open) -> None:
        ledger, other = opened(), opened()
        await ledger.reserve(task("a"))

        def send(lease_owner: str) -> Callable[[Task], Transition | None]:
            return lambda current: transition(current, SendLease(lease_owner, NOW + 1000), NOW)

        results = await asyncio.gather(
            *(which.apply("a", send(f"s{i}")) for i, which in enumerate((ledger, other) * 4))
        )
        assert sum(result.transition is not None for result in results) == 1

    async def test_two_workers_deliver_every_event_once(self, opened: Open) -> None:
        await self._work(opened, 2)

    async def test_eight_workers_deliver_every_event_once(self, opened: Open) -> None:
        await self._work(opened, 8)

    async def _work(self, opened: Open, workers: int) -> None:
        ledgers = [opened() for _ in range(workers)]
        for i in range(30):
            await ledgers[0].reserve(task(f"t{i}"))
        seen: list[str] = []

        async def work(ledger: Ledger, n: int) -> None:
            for i in range(n, 30, workers):
                await ledger.apply(f"t{i}", report(TaskStatus.SUBMITTED))
            empty_claims = 0
            while empty_claims < 3:
                found: list[Delivery] = (
                    await ledger.claim_deliveries([msgspec.structs.replace(ALL, capacity=4)], NOW, 60_000)
                ).items
                empty_claims = 0 if found else empty_claims + 1
                for delivery in found:
                    seen.append(delivery.event.id)
                    assert await ledger.settle(delivery, Settlement("done"))

        await asyncio.gather(*(work(ledger, n) for n, ledger in enumerate(ledgers)))
        assert len(seen) == len(set(seen)) == 30
