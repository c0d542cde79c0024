"""Asks vendors about the silent: a task whose callback is overdue, in as few requests as the vendor takes.

What a vendor says goes through the same `transition` as a callback. A task that is heard of by
its callbacks is never asked about.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import Unintelligible, VendorRefused
from submitter.http import VendorHttp
from submitter.ledger.base import Ledger, Quarantined
from submitter.observe import observe
from submitter.settings import VendorSettings
from submitter.task import Observation, Task, Unheard
from submitter.vendors.base import HttpAnswer, Query

LEASE_S = 120
BATCH = 200
AT_ONCE = 8
"""Queries under way at one vendor: some take one task a query."""

log = structlog.get_logger("poll")


class Metrics(Protocol):
    """What polls count."""

    def poll(self, vendor: str, result: str, tasks: int) -> None:
        """Count a query by its result, and the tasks that it asked about."""
        ...


class Poller:
    """Claims tasks that have been silent too long, and asks about them."""

    def __init__(
        self,
        ledger: Ledger,
        vendors: Mapping[str, VendorSettings],
        http: VendorHttp,
        clock: Clock,
        metrics: Metrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._vendors = vendors
        self._http = http
        self._clock = clock
        self._metrics = metrics
        self.asked = 0

    async def poll(self) -> float | None:
        """Ask about every task that is due; return the seconds until the next is, or None."""
        while True:
            claimed = await self._ledger.claim_polls(self._clock.now_ms(), LEASE_S * 1000, BATCH)
            by_vendor: dict[str, list[Task]] = {}
            for task in claimed.items:
                by_vendor.setdefault(task.vendor, []).append(task)
            for vendor, tasks in by_vendor.items():
                await self._ask(vendor, tasks)
            if len(claimed.items) < BATCH:
                break
        if claimed.next_due_ms is None:
            return None
        return max(0.0, (claimed.next_due_ms - self._clock.now_ms()) / 1000)

    async def _ask(self, name: str, tasks: Sequence[Task]) -> None:
        settings = self._vendors.get(name)
        if settings is None:
            log.warning("poll.impossible", vendor=name, tasks=len(tasks), reason="no credentials for this vendor")
            await self._unheard(tasks, "its vendor cannot be asked: no credentials")
            return
        queries = settings.vendor.queries(tasks, self._clock.now_s())
        asked = {task.external_task_id for query in queries for task in query.tasks}
        left = [task for task in tasks if task.external_task_id not in asked]
        await self._unheard(left, f"{name} gave it no id, and cannot be asked for a task by yours")

        async def work() -> None:
            while queries:
                queries.extend(await self._run(settings, queries.pop()))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(queries))):
                group.create_task(work())

    async def _run(self, settings: VendorSettings, query: Query) -> tuple[Query, ...]:
        name = settings.vendor.name
        outcome = await self._http.run(query.request)
        self.asked += len(query.tasks)
        try:
            if not isinstance(outcome, HttpAnswer):
                raise Unintelligible(outcome.reason)
            findings = settings.vendor.read_query(query, outcome, self._clock.now_s())
        except (VendorRefused, Unintelligible) as error:
            self._count(name, "failed", query)
            log.warning("poll.failed", vendor=name, tasks=len(query.tasks), reason=str(error))
            await self._unheard(query.tasks, "")
            return ()
        self._count(name, "answered", query)
        for task in query.tasks:
            id = task.external_task_id
            report = findings.reports.get(id)
            if report is not None:
                await self._observe(id, report)
            elif id in findings.unreadable:
                reason = findings.unreadable[id]
                log.warning("poll.unreadable", vendor=name, external_task_id=id, reason=reason)
                assert isinstance(outcome, HttpAnswer)
                body = redact_body(outcome.body)
                await self._ledger.quarantine(Quarantined(id, name, self._clock.now_ms(), reason, body))
                await self._observe(id, Unheard(f"the vendor says what we do not understand: {reason}"))
            elif id in findings.absent:
                await self._observe(id, Unheard(f"{name} does not know it, now or any more"))
        return findings.more

    async def _unheard(self, tasks: Sequence[Task], message: str) -> None:
        for task in tasks:
            await self._observe(task.external_task_id, Unheard(message))

    async def _observe(self, external_task_id: str, observation: Observation) -> None:
        await observe(self._ledger, external_task_id, observation, self._clock.now_ms(), source="poll")

    def _count(self, vendor: str, result: str, query: Query) -> None:
        if self._metrics is not None:
            self._metrics.poll(vendor, result, len(query.tasks))
