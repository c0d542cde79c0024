"""Asks vendors about tasks now, for a person: brings a task to its truth, renews a result's URLs, adopts a task.

A task that certainly was not sent is not asked for, nor one that a submitter is sending at the moment.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from submitter.callback_url import redact_body
from submitter.clock import Clock
from submitter.errors import Unintelligible, VendorRefused
from submitter.http import Outcome, VendorHttp
from submitter.ledger.base import Quarantined, Tasks
from submitter.ledger.observe import observe
from submitter.observation import Adopted, Observation, Report
from submitter.queries import run_queries
from submitter.settings import VendorSettings
from submitter.task import Task, is_leased
from submitter.vendors.base import Findings, HttpAnswer, Query


class Refreshed(msgspec.Struct, frozen=True):
    """What asking a vendor about a task led to: the task as it is now, and what the vendor said.

    `outcome`: the vendor `answered`, gave `no_answer`, or was `not_asked`. `report` is what it reported;
    None together with `answered` means that it does not know the task. `message` says it in words.
    """

    task: Task
    outcome: Literal["answered", "no_answer", "not_asked"]
    message: str
    report: Report | None = None


def why_not_asked(task: Task, settings: VendorSettings | None, now_ms: int) -> str | None:
    """Return why a vendor is not asked about a task; None if it is."""
    if settings is None:
        return f"no credentials for {task.vendor} are configured"
    if is_leased(task, now_ms):
        return "a submitter is sending it at the moment"
    if task.task_id is not None:
        return None
    if not task.may_have_been_sent:
        return "nothing was sent to the vendor"
    if not settings.vendor.limits.own_id:
        return f"{task.vendor} returned no task_id, and supports no query by external_task_id"
    return None


class Refresher:
    """Asks the vendors of a ledger's tasks."""

    def __init__(self, ledger: Tasks, vendors: Mapping[str, VendorSettings], http: VendorHttp, clock: Clock) -> None:
        self._ledger = ledger
        self._vendors = vendors
        self._http = http
        self._clock = clock

    async def refresh(self, tasks: Sequence[Task]) -> list[Refreshed]:
        """Ask about each task and apply what the vendors report; return the results in the same order."""
        results: dict[str, Refreshed] = {}
        by_vendor: dict[str, list[Task]] = {}
        for task in tasks:
            reason = why_not_asked(task, self._vendors.get(task.vendor), self._clock.now_ms())
            if reason is None:
                by_vendor.setdefault(task.vendor, []).append(task)
            else:
                results[task.external_task_id] = Refreshed(task, "not_asked", reason)
        for vendor, asked in by_vendor.items():
            for found in await self._ask(self._vendors[vendor], asked):
                results[found.task.external_task_id] = found
        return [results[task.external_task_id] for task in tasks]

    async def look_at(self, task: Task, task_id: str) -> Refreshed:
        """Ask the vendor for its task `task_id`, as if it were this task; change nothing."""
        settings = self._vendors.get(task.vendor)
        asked = replace(task, task_id=task_id)
        reason = why_not_asked(asked, settings, self._clock.now_ms())
        if reason is not None or settings is None:
            return Refreshed(task, "not_asked", str(reason))
        (found,) = await self._ask(settings, [asked], is_applied=False)
        return found

    async def adopt(self, task: Task, report: Report) -> Task:
        """Record the vendor's task in a report as this one."""
        return await self._observe(task, Adopted(replace(report, source="refresh")))

    async def _ask(
        self, settings: VendorSettings, tasks: Sequence[Task], *, is_applied: bool = True
    ) -> list[Refreshed]:
        results: dict[str, Refreshed] = {}

        def note(task: Task, outcome: Literal["answered", "no_answer"], message: str) -> None:
            results[task.external_task_id] = Refreshed(task, outcome, message)

        async def handle(query: Query, outcome: Outcome) -> Sequence[Query]:
            try:
                findings = self._read(settings, query, outcome)
            except (VendorRefused, Unintelligible) as error:
                for task in query.tasks:
                    note(task, "no_answer", str(error))
                return ()
            for task in query.tasks:
                id = task.external_task_id
                if id in findings.reports:
                    report = replace(findings.reports[id], source="refresh")
                    now = await self._observe(task, report) if is_applied else task
                    results[id] = Refreshed(now, "answered", _words(settings, report), report)
                elif id in findings.unreadable:
                    note(task, "no_answer", f"could not parse the vendor's answer: {findings.unreadable[id]}")
                    assert isinstance(outcome, HttpAnswer)
                    entry = Quarantined(
                        id, task.vendor, self._clock.now_ms(), findings.unreadable[id], redact_body(outcome.body)
                    )
                    await self._ledger.quarantine(entry)
                elif id in findings.absent:
                    note(task, "answered", f"{task.vendor} does not know this task, or no longer keeps it")
            return findings.more

        await run_queries(self._http, settings.vendor.queries(tasks, self._clock.now_s()), handle)
        missing = Refreshed(tasks[0], "no_answer", "the vendor's answer does not mention it")
        return [results.get(task.external_task_id, replace(missing, task=task)) for task in tasks]

    def _read(self, settings: VendorSettings, query: Query, outcome: Outcome) -> Findings:
        if not isinstance(outcome, HttpAnswer):
            raise Unintelligible(f"no answer from {settings.vendor.name}: {outcome.reason}")
        return settings.vendor.read_query(query, outcome, self._clock.now_s())

    async def _observe(self, task: Task, observation: Observation) -> Task:
        now_ms = self._clock.now_ms()
        return await observe(self._ledger, task.external_task_id, observation, now_ms, source="refresh")


def _words(settings: VendorSettings, report: Report) -> str:
    reason = f": {report.message}" if report.message else ""
    return f"{settings.vendor.name} says {report.status.value}{reason}"
