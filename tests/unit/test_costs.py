"""Cost totals: exact decimals; tasks without a reported cost are listed separately."""

from submitter.costs import Total, totals
from submitter.schedule import Backoff, PollPolicy
from submitter.task import Charge, Task, TaskStatus

POLL_POLICY = PollPolicy(Backoff(900, 1.5, 3600), Backoff(10, 1.5, 60), 86400)
DAY = 86_400_000
MONDAY = 1_781_049_600_000  # 2026-06-10T00:00:00Z


def task(vendor: str, at_ms: int, *cost: Charge, status: TaskStatus = TaskStatus.SUCCEED) -> Task:
    return Task("a", vendor, status, at_ms, at_ms, POLL_POLICY, cost=cost)


def test_totals_are_exact_by_day_vendor_and_unit_newest_day_first() -> None:
    found = totals(
        [
            task("kling", MONDAY, Charge("unit", "0.1")),
            task("kling", MONDAY + DAY - 1, Charge("unit", "0.2"), Charge("cash", "0.63", "USD")),
            task("kling", MONDAY + DAY, Charge("unit", "1")),
            task("aihubmax", MONDAY, Charge("credit", "12.50")),
            task("novita", MONDAY),
            task("novita", MONDAY, status=TaskStatus.FAILED),
            task("novita", MONDAY, Charge("credit", "many")),
        ]
    )
    assert found == [
        Total("2026-06-11", "kling", 1, "1", "unit"),
        Total("2026-06-10", "aihubmax", 1, "12.50", "credit"),
        Total("2026-06-10", "kling", 1, "0.63", "USD"),
        Total("2026-06-10", "kling", 2, "0.3", "unit"),
        Total("2026-06-10", "novita", 2, None, "not said"),
    ]
    assert totals([]) == []
