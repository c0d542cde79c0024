"""What is due in one queue of DynamoDB's index `due`, over all its shards."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
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

    async def claim(self, room: int, take: Take[T], hints: Iterable[Item] = ()) -> list[T]:
        """Take up to `room` of what is due, the longest overdue first; `hints` come before what the index shows."""
        got: list[T] = []
        tried: set[tuple[str, str]] = set()
        entries = list(hints)
        is_full = True
        while True:
            for entry in entries:  # of one look; each is tried once
                if entry["at"]["S"] > moment(self._now_ms):
                    self.note_due(int(entry["at"]["S"]))
            due = [entry for entry in entries if entry["at"]["S"] <= moment(self._now_ms) and _id(entry) not in tried]
            while due and len(got) < room:
                batch = [due.pop(0) for _ in range(min(len(due), room - len(got)))]
                tried.update(map(_id, batch))
                got.extend([taken for taken in await asyncio.gather(*map(take, batch)) if taken is not None])
            if due:
                self.note_due(self._now_ms)
            if len(got) == room or not is_full:
                return got
            entries, is_full = await self._look(room + len(tried))

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
