"""Runs status queries to a vendor, a few at a time, until their answers ask for no more."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from submitter.http import NotSent, Unanswered, VendorHttp
from submitter.vendors.base import HttpAnswer, Query

MAX_CONCURRENT = 8
"""Concurrent queries to one vendor: some vendors take one task per query."""

QueryOutcome = HttpAnswer | NotSent | Unanswered
Handle = Callable[[Query, QueryOutcome], Awaitable[Sequence[Query]]]
"""Handles the outcome of a query as soon as it is there, and returns the queries that it leads to."""


async def run_queries(http: VendorHttp, queries: Iterable[Query], handle: Handle) -> None:
    """Run `queries`, and those that `handle` returns, MAX_CONCURRENT at a time."""
    waiting = list(queries)

    async def run() -> None:
        while waiting:
            query = waiting.pop()
            waiting.extend(await handle(query, await http.run(query.request)))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(MAX_CONCURRENT, len(waiting))):
            group.create_task(run())
