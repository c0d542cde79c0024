"""Polls vendors for tasks whose callback is overdue, in as few requests as the vendor allows.

A vendor's answer goes through the same `transition` as a callback. A task whose callbacks arrive is
never polled.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import Unintelligible, VendorRefused
from submitter.http import Outcome, VendorHttp
from submitter.ledger.base import Quarantined, Tasks
from submitter.ledger.observe import observe
from submitter.log import Logger
from submitter.observation import NoAnswer, Observation
from submitter.queries import run_queries
from submitter.settings import VendorSettings
from submitter.task import Task
from submitter.vendors.base import HttpAnswer, Query

LEASE_S = 120
BATCH = 200

log = Logger("poll")


class PollMetrics(Protocol):
    """The metrics of polls."""

    def poll(self, vendor: str, result: str, tasks: int) -> None:
        """Count a query by its result, and the tasks in it."""
        ...


class Poller:
    """Claims tasks that are due for a poll, and queries their vendors."""

    def __init__(
        self,
        ledger: Tasks,
        vendors: Mapping[str, VendorSettings],
        http: VendorHttp,
        clock: Clock,
        metrics: PollMetrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._vendors = vendors
        self._http = http
        self._clock = clock
        self._metrics = metrics
        self.polled = 0

    async def poll(self) -> float | None:
        """Poll every due task; return the seconds until the next is due, or None."""
        while True:
            claimed = await self._ledger.claim_polls(self._clock.now_ms(), LEASE_S * 1000, BATCH)
            by_vendor: dict[str, list[Task]] = {}
            for task in claimed.items:
                by_vendor.setdefault(task.vendor, []).append(task)
            for vendor, tasks in by_vendor.items():
                await self._poll_vendor(vendor, tasks)
            if len(claimed.items) < BATCH:
                break
        if claimed.next_due_ms is None:
            return None
        return max(0.0, (claimed.next_due_ms - self._clock.now_ms()) / 1000)

    async def _poll_vendor(self, name: str, tasks: Sequence[Task]) -> None:
        settings = self._vendors.get(name)
        if settings is None:
            log.warning("poll.impossible", vendor=name, tasks=len(tasks), reason="no credentials for this vendor")
            await self._record_no_answer(tasks, f"cannot poll {name}: no credentials are configured")
            return
        queries = settings.vendor.queries(tasks, self._clock.now_s())
        queried = {task.external_task_id for query in queries for task in query.tasks}
        unqueried = [task for task in tasks if task.external_task_id not in queried]
        reason = f"cannot poll {name}: it returned no task_id, and supports no query by external_task_id"
        await self._record_no_answer(unqueried, reason)

        await run_queries(self._http, queries, partial(self._apply_answer, settings))

    async def _apply_answer(self, settings: VendorSettings, query: Query, outcome: Outcome) -> tuple[Query, ...]:
        name = settings.vendor.name
        self.polled += len(query.tasks)
        try:
            if not isinstance(outcome, HttpAnswer):
                raise Unintelligible(outcome.reason)
            findings = settings.vendor.read_query(query, outcome, self._clock.now_s())
        except (VendorRefused, Unintelligible) as error:
            self._count(name, "failed", query)
            log.warning("poll.failed", vendor=name, tasks=len(query.tasks), reason=str(error))
            await self._record_no_answer(query.tasks, "")
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
                await self._observe(id, NoAnswer(f"could not parse the vendor's answer: {reason}"))
            elif id in findings.absent:
                reason = f"{name} does not know this task, or no longer keeps it"
                await self._observe(id, NoAnswer(reason, is_absent=True))
        return findings.more

    async def _record_no_answer(self, tasks: Sequence[Task], message: str) -> None:
        for task in tasks:
            await self._observe(task.external_task_id, NoAnswer(message))

    async def _observe(self, external_task_id: str, observation: Observation) -> None:
        await observe(self._ledger, external_task_id, observation, self._clock.now_ms(), source="poll")

    def _count(self, vendor: str, result: str, query: Query) -> None:
        if self._metrics is not None:
            self._metrics.poll(vendor, result, len(query.tasks))
