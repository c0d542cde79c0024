"""Conformance suite of leases that were taken while a clock was wrong; a part of the ledger protocol's."""

from collections.abc import Callable

from submitter.ledger.base import AHEAD_MAX_MS, Ledger, Settlement, Subscription
from submitter.ledger.observe import observe
from submitter.observation import Report
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Task, TaskStatus

NOW = 1_781_080_800_000
YEAR_MS = 365 * 86_400_000
Open = Callable[[], Ledger]
POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
HOOK = Subscription("hook", None, "fingerprint", 9)


class ClockSuite:
    """What `claim_polls` and `claim_deliveries` promise once a clock that was far ahead is right again."""

    async def test_a_poll_that_was_leased_a_year_ahead_is_claimed_again(self, opened: Open) -> None:
        ledger = opened()
        await ledger.reserve(Task("a", "kling", TaskStatus.SUBMITTED, NOW, NOW, POLICY, task_id="1", poll_at_ms=NOW))
        assert len((await ledger.claim_polls(NOW + YEAR_MS, 120_000, 9)).items) == 1
        await ledger.claim_polls(NOW, 120_000, 9)  # it may take a claim to notice
        claimed = await ledger.claim_polls(NOW + 1, 120_000, 9)
        again = await ledger.claim_polls(NOW + 120_002, 120_000, 9)
        assert {task.external_task_id for task in (*claimed.items, *again.items)} == {"a"}

    async def test_a_delivery_that_was_leased_a_year_ahead_is_claimed_again(self, opened: Open) -> None:
        ledger = opened()
        await ledger.reserve(Task("a", "kling", TaskStatus.CREATED, NOW, NOW, POLICY))
        await observe(ledger, "a", Report("callback", TaskStatus.SUBMITTED, "1"), NOW, source="callback")
        (first,) = (await ledger.claim_deliveries([HOOK], NOW + YEAR_MS, 30_000)).items
        claimed = [*(await ledger.claim_deliveries([HOOK], NOW, 30_000)).items]
        claimed += (await ledger.claim_deliveries([HOOK], NOW + 1, 30_000)).items
        assert [delivery.attempts for delivery in claimed] == [2]
        assert not await ledger.settle(first, Settlement("dead"))  # the earlier claim has ended
        assert await ledger.settle(claimed[0], Settlement("done"))

    async def test_what_is_due_within_a_month_is_not_claimed_early(self, opened: Open) -> None:
        ledger = opened()
        later = NOW + AHEAD_MAX_MS - 1
        await ledger.reserve(Task("a", "kling", TaskStatus.SUBMITTED, NOW, NOW, POLICY, task_id="1", poll_at_ms=later))
        for now_ms in (NOW, NOW + 1):
            assert (await ledger.claim_polls(now_ms, 120_000, 9)).items == []
