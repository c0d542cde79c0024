"""Moving everything from one ledger to another, and making sure of it."""

from collections.abc import Callable

import msgspec

from submitter.errors import LedgerUnavailable
from submitter.ledger.base import Ledger

PAGE = 200
QUARANTINE_MAX = 1_000_000
REMEDY = "empty it, see that nobody uses either, and try again"


class Copied(msgspec.Struct, frozen=True):
    """How much was copied, and found again in the other ledger."""

    tasks: int = 0
    events: int = 0
    deliveries: int = 0
    quarantined: int = 0


async def copy(source: Ledger, target: Ledger, tell: Callable[[Copied], None] = lambda _: None) -> Copied:
    """Copy everything of `source` into the empty `target`, then read it there and compare; return how much it was.

    Nobody else may use them meanwhile, and every event must have been given to its hooks. Raises
    LedgerUnavailable where the two differ.
    """
    copied = Copied()
    after: str | None = None
    while ids := await source.ids(after, PAGE):
        page = await source.records(ids)
        await target.load(page)
        if await target.records(ids) != page:
            raise LedgerUnavailable(f"the copy differs from its source behind the task {after!r}; {REMEDY}")
        after = ids[-1]
        copied = Copied(
            copied.tasks + len(page),
            copied.events + sum(len(record.events) for record in page),
            copied.deliveries + sum(len(record.deliveries) for record in page),
        )
        tell(copied)
    if await _count(target) != copied.tasks:
        raise LedgerUnavailable(f"the copy differs from its source: it has {await _count(target)} tasks; {REMEDY}")
    for hook in await source.disabled():
        await target.disable(hook)
    kept = await source.quarantined(QUARANTINE_MAX)
    for entry in kept:
        await target.quarantine(entry)
    if await target.disabled() != await source.disabled() or len(await target.quarantined(QUARANTINE_MAX)) != len(kept):
        raise LedgerUnavailable(f"the copy's disabled hooks or quarantine differ from the source's; {REMEDY}")
    return msgspec.structs.replace(copied, quarantined=len(kept))


async def _count(ledger: Ledger) -> int:
    count, after = 0, None
    while ids := await ledger.ids(after, PAGE):
        count, after = count + len(ids), ids[-1]
    return count
