"""Asks vendors about the silent: a task whose callback is overdue, in as few requests as the vendor takes.

What a vendor says goes through the same `transition` as a callback. A task that is heard of by
its callbacks is never asked about.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import structlog

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import Unintelligible, VendorRefused
from submitter.http import VendorHttp
from submitter.ledger.base import Ledger, Quarantined
from submitter.settings import VendorSettings
from submitter.task import Observation, Task, Unheard, transition
from submitter.vendors.base import HttpAnswer, Query

LEASE_S = 120
BATCH = 200

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
        while queries:
            query = queries.pop()
            more = await self._run(settings, query)
            if more is not None:
                queries.append(more)

    async def _run(self, settings: VendorSettings, query: Query) -> Query | None:
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
            return None
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
                await self._observe(id, Unheard())
        return findings.more

    async def _unheard(self, tasks: Sequence[Task], message: str) -> None:
        for task in tasks:
            await self._observe(task.external_task_id, Unheard(message))

    async def _observe(self, external_task_id: str, observation: Observation) -> None:
        now_ms = self._clock.now_ms()
        applied = await self._ledger.apply(external_task_id, lambda task: transition(task, observation, now_ms))
        if applied.transition is not None and applied.transition.event_type is not None:
            log.info(
                "task.changed",
                vendor=applied.task.vendor,
                external_task_id=external_task_id,
                status=applied.task.status.value,
                source="poll",
            )

    def _count(self, vendor: str, result: str, query: Query) -> None:
        if self._metrics is not None:
            self._metrics.poll(vendor, result, len(query.tasks))
