"""Copies a ledger into an empty one (migration between engines) and verifies the copy."""

from collections.abc import Callable, Sequence

import msgspec

from submitter.errors import LedgerUnavailable
from submitter.ledger.base import Ledger, Quarantined

PAGE = 200
QUARANTINE_MAX = 1_000_000
REMEDY = "empty the target, stop every process that uses either ledger, and copy again"


class CopyReport(msgspec.Struct, frozen=True):
    """How many tasks, events, deliveries and quarantined bodies were copied and verified."""

    tasks: int = 0
    events: int = 0
    deliveries: int = 0
    quarantined: int = 0


async def copy(source: Ledger, target: Ledger, on_page: Callable[[CopyReport], None] = lambda _: None) -> CopyReport:
    """Copy `source` into the empty `target`, read the copy back, and compare.

    No other process may use either ledger meanwhile, and the source's outbox must be empty.
    `on_page` gets the totals so far. Raises LedgerUnavailable when the copy differs.
    """
    copied = CopyReport()
    after: str | None = None
    while ids := await source.ids(after, PAGE):
        page = await source.records(ids)
        await target.load(page)
        if await target.records(ids) != page:
            raise LedgerUnavailable(f"the copy differs from its source after task {after!r}; {REMEDY}")
        after = ids[-1]
        copied = CopyReport(
            copied.tasks + len(page),
            copied.events + sum(len(record.events) for record in page),
            copied.deliveries + sum(len(record.deliveries) for record in page),
        )
        on_page(copied)
    count = await _count(target)
    if count != copied.tasks:
        raise LedgerUnavailable(
            f"the copy differs from its source: it has {count} tasks instead of {copied.tasks}; {REMEDY}"
        )
    for hook in await source.disabled():
        await target.disable(hook)
    quarantined = await source.quarantined(QUARANTINE_MAX)
    for entry in reversed(quarantined):  # the oldest first, so that a full quarantine keeps the newest
        await target.quarantine(entry)
    copied_quarantine = await target.quarantined(QUARANTINE_MAX)
    if await target.disabled() != await source.disabled() or not _same_quarantine(quarantined, copied_quarantine):
        raise LedgerUnavailable(f"the copy's disabled hooks or quarantine differ from the source's; {REMEDY}")
    return msgspec.structs.replace(copied, quarantined=len(quarantined))


def _same_quarantine(source: Sequence[Quarantined], copy: Sequence[Quarantined]) -> bool:
    """Return whether both have as many bodies of each task, counted with their repetitions."""
    return _times(source) == _times(copy)


def _times(entries: Sequence[Quarantined]) -> dict[str, int]:
    times: dict[str, int] = {}
    for entry in entries:
        times[entry.external_task_id] = times.get(entry.external_task_id, 0) + entry.times
    return times


async def _count(ledger: Ledger) -> int:
    count, after = 0, None
    while ids := await ledger.ids(after, PAGE):
        count, after = count + len(ids), ids[-1]
    return count
