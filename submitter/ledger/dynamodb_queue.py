"""What is due in one queue of DynamoDB's index `due`, over all its shards."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from submitter.ledger.dynamodb_items import Item, moment
from submitter.ledger.dynamodb_table import Table

T = TypeVar("T")
Take = Callable[[Item], Awaitable[T | None]]
"""Claims the item of an entry, by a condition; None when somebody else was faster."""


class Queue:
    """One look at a queue. `next_due_ms` is when to look again, as far as is known."""

    def __init__(self, table: Table, name: str, shards: int, now_ms: int) -> None:
        self._table = table
        self._name = name
        self._shards = shards
        self._now_ms = now_ms
        self.next_due_ms: int | None = None

    def note_due(self, at_ms: int) -> None:
        """Note that something is due at a time."""
        self.next_due_ms = at_ms if self.next_due_ms is None else min(self.next_due_ms, at_ms)

    async def claim(self, room: int, take: Take[T], hints: Sequence[Item] = ()) -> tuple[list[T], list[Item]]:
        """Take up to `room` of what is due, the longest overdue first; `hints` come before what the index shows.

        Return what was taken, and the hints that there was no room to try.
        """
        got: list[T] = []
        tried: set[tuple[str, str]] = set()
        entries, may_be_more = list(hints), True
        while True:  # each look shows some entries, of which each is tried once
            due = {_id(entry): entry for entry in entries if entry["at"]["S"] <= moment(self._now_ms)}
            later = [entry for entry in entries if _id(entry) not in due]
            if later:
                self.note_due(min(int(entry["at"]["S"]) for entry in later))
            left = [entry for id, entry in due.items() if id not in tried]
            before = len(tried) - len(got)
            while left and len(got) < room:
                batch, left = left[: room - len(got)], left[room - len(got) :]
                tried.update(map(_id, batch))
                got.extend([taken for taken in await asyncio.gather(*map(take, batch)) if taken is not None])
            if left:
                self.note_due(self._now_ms)
            was_lost = len(tried) - len(got) > before  # it has another place now
            if len(got) == room or not (may_be_more or was_lost):
                return got, [hint for hint in hints if _id(hint) not in tried]
            entries, may_be_more = await self._look(room + len(tried))

    async def _look(self, limit: int) -> tuple[list[Item], bool]:
        """Return the first entries of all shards, and whether there may be more that are due."""
        queues = (f"{self._name}#{shard}" for shard in range(self._shards))
        found = await asyncio.gather(*(self._table.query("due", queue, limit) for queue in queues))
        now = moment(self._now_ms)
        is_full = any(len(entries) == limit and entries[-1]["at"]["S"] <= now for entries in found)
        entries = [entry for entries in found for entry in entries]
        return sorted(entries, key=lambda entry: (entry["at"]["S"], *_id(entry))), is_full


def _id(entry: Item) -> tuple[str, str]:
    return entry["pk"]["S"], entry["sk"]["S"]
