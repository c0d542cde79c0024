"""Runs status queries to a vendor, a few at a time, until their answers ask for no more."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from submitter.http import Outcome, VendorHttp
from submitter.vendors.base import Query

MAX_CONCURRENT = 8
"""Concurrent queries to one vendor: some vendors take one task per query."""

Handle = Callable[[Query, Outcome], Awaitable[Sequence[Query]]]
"""Handles the outcome of a query as soon as it is there, and returns the queries that it leads to."""


async def run_queries(http: VendorHttp, queries: Iterable[Query], handle: Handle) -> None:
    """Run `queries`, and those that `handle` returns, MAX_CONCURRENT at a time; raise what `handle` raises first."""
    waiting = list(queries)

    async def run() -> None:
        while waiting:
            query = waiting.pop()
            waiting.extend(await handle(query, await http.run(query.request)))

    runs = [asyncio.create_task(run()) for _ in range(min(MAX_CONCURRENT, len(waiting)))]
    try:
        await asyncio.gather(*runs)
    finally:
        for running in runs:
            running.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
