"""Totals of task costs by day and vendor. Pure; amounts are exact decimals, as vendors report them."""

from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

import msgspec

from submitter.event import timestamp
from submitter.task import Task, TaskStatus


class Total(msgspec.Struct, frozen=True):
    """The total cost of one vendor's tasks of one day (UTC, by submission) in one currency or unit.

    `tasks` counts the tasks in the total. An `amount` of None: these tasks succeeded, and the vendor
    reported no cost.
    """

    day: str
    vendor: str
    tasks: int
    amount: str | None
    unit: str


def totals(tasks: Iterable[Task]) -> list[Total]:
    """Return the totals, newest day first."""
    sums: dict[tuple[str, str, str], Decimal | None] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for task in tasks:
        day = timestamp(task.created_at_ms)[:10]
        stated = [(charge.currency or charge.kind, _decimal(charge.amount)) for charge in task.cost]
        known = [(unit, amount) for unit, amount in stated if amount is not None]
        for unit in {unit for unit, _ in known}:
            key = (day, task.vendor, unit)
            counts[key] = counts.get(key, 0) + 1
        for unit, amount in known:
            key = (day, task.vendor, unit)
            sums[key] = (sums.get(key) or Decimal(0)) + amount
        if not known and task.status is TaskStatus.SUCCEED:
            key = (day, task.vendor, "not said")
            sums[key], counts[key] = None, counts.get(key, 0) + 1
    ordered = sorted(sums.items(), key=lambda item: item[0][1:])
    ordered.sort(key=lambda item: item[0][0], reverse=True)
    return [
        Total(day, vendor, counts[day, vendor, unit], None if amount is None else f"{amount:f}", unit)
        for (day, vendor, unit), amount in ordered
    ]


def _decimal(amount: str) -> Decimal | None:
    try:
        value = Decimal(amount)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
