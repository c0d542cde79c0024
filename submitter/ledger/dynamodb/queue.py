"""A sharded queue in DynamoDB's index `due`: claims the entries that are due, over all shards."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from submitter.ledger.base import AHEAD_MAX_MS
from submitter.ledger.dynamodb.items import Item, sortable, text
from submitter.ledger.dynamodb.table import Table

T = TypeVar("T")
Claim = Callable[[Item], Awaitable[T | None]]
"""Claims an entry's item by a conditional write; returns None if another worker was faster."""

IS_DUE = "#queue = :queue AND (#at <= :now OR #at > :ahead)"
"""The condition of a claim; `due_at` returns its times."""


def due_at(now_ms: int) -> dict[str, Item]:
    """Return until when, and from when, an entry's time makes it due."""
    return {"now": text(sortable(now_ms)), "ahead": text(sortable(now_ms + AHEAD_MAX_MS))}


class Queue:
    """One pass over a queue at `now_ms`. `next_due_ms` is when to look again (None: no later entry is known)."""

    def __init__(self, table: Table, name: str, shards: int, now_ms: int) -> None:
        self._table = table
        self._name = name
        self._shards = shards
        self._now_ms = now_ms
        self.next_due_ms: int | None = None

    def note_due(self, at_ms: int) -> None:
        """Lower `next_due_ms` to `at_ms`."""
        self.next_due_ms = at_ms if self.next_due_ms is None else min(self.next_due_ms, at_ms)

    def is_due(self, at: str) -> bool:
        """Return whether an entry is due: its time has come, or was written while a clock was far ahead."""
        return at <= sortable(self._now_ms) or at > sortable(self._now_ms + AHEAD_MAX_MS)

    async def claim(self, capacity: int, claim: Claim[T], recent: Sequence[Item] = ()) -> tuple[list[T], list[Item]]:
        """Claim up to `capacity` due entries, the longest overdue first.

        `recent` are entries that this process wrote; they are tried before the index, which may lag.
        Returns the claimed items, and the recent entries that were not tried.
        """
        claimed: list[T] = []
        tried: set[tuple[str, str]] = set()
        entries, may_be_more = list(recent), True
        while True:  # each round tries each entry once
            due = {_id(entry): entry for entry in entries if self.is_due(entry["at"]["S"])}
            later = [entry for entry in entries if _id(entry) not in due]
            if later:
                self.note_due(min(int(entry["at"]["S"]) for entry in later))
            left = [entry for id, entry in due.items() if id not in tried]
            lost_before = len(tried) - len(claimed)
            while left and len(claimed) < capacity:
                batch, left = left[: capacity - len(claimed)], left[capacity - len(claimed) :]
                tried.update(map(_id, batch))
                claimed.extend([item for item in await asyncio.gather(*map(claim, batch)) if item is not None])
            if left:
                self.note_due(self._now_ms)
            any_lost = len(tried) - len(claimed) > lost_before  # a lost entry has a new position in the index
            if len(claimed) == capacity or not (may_be_more or any_lost):
                return claimed, [entry for entry in recent if _id(entry) not in tried]
            entries, may_be_more = await self._first_entries(capacity + len(tried))

    async def _first_entries(self, limit: int) -> tuple[list[Item], bool]:
        """Return the first `limit` entries of each shard, and whether more entries may be due."""
        queues = (f"{self._name}#{shard}" for shard in range(self._shards))
        found = await asyncio.gather(*(self._table.query("due", queue, limit) for queue in queues))
        now = sortable(self._now_ms)
        may_be_more = any(len(entries) == limit and entries[-1]["at"]["S"] <= now for entries in found)
        entries = [entry for entries in found for entry in entries]
        return sorted(entries, key=lambda entry: (entry["at"]["S"], *_id(entry))), may_be_more


def _id(entry: Item) -> tuple[str, str]:
    return entry["pk"]["S"], entry["sk"]["S"]
