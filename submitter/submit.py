"""The submitter: checks a request, reserves its task, sends the create request.

`external_task_id` is the idempotency key. The task's row is stored before the request is sent: if this
process is killed at any point, submitting again with the same id creates no second task.
"""

import asyncio
from types import TracebackType
from typing import Self

from submitter.callback_expectation import RECENT_SUCCESSES, poll_policy_for
from submitter.clock import Clock
from submitter.create import SENDING_LEASE_S, Candidate, CreateMetrics, Creator
from submitter.errors import IdConflict, InvalidRequest, Problem, SubmissionUnknown
from submitter.guarded_http import guarded_client
from submitter.http import VendorHttp
from submitter.ledger import Ledger, open_ledger
from submitter.log import Logger
from submitter.media.store import MediaStore
from submitter.preflight import Prepared, preflight
from submitter.refresh import Refreshed, Refresher
from submitter.request import MotionControl, retry_id
from submitter.reserve import Reservations
from submitter.schedule import LOOK_FOR_S
from submitter.settings import Settings, load_settings
from submitter.stored_request import to_request
from submitter.submitted_task import SubmittedTask, Watch
from submitter.task import NOT_ANSWERED, SENDABLE, Task, TaskStatus
from submitter.transition import is_about
from submitter.vendor_request import VendorRequests
from submitter.vendors.base import HttpRequest

PREFLIGHTS_MAX = 16
"""Requests whose media are checked at once: each of them may read 8 MiB of a stranger's server."""

log = Logger("submitter")


class Submitter:
    """Submits Motion Control requests. Use it as an async context manager; an application needs one."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        *,
        clock: Clock | None = None,
        http: VendorHttp | None = None,
        media_store: MediaStore | None = None,
        look_for_s: tuple[float, ...] = LOOK_FOR_S,
        sending_lease_s: float = SENDING_LEASE_S,
        metrics: CreateMetrics | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._clock = clock or Clock()
        self._http = http or VendorHttp()
        self.creator = Creator(
            ledger, self._http, self._clock, look_for_s=look_for_s, sending_lease_s=sending_lease_s, metrics=metrics
        )
        self._refresher = Refresher(ledger, settings.vendors, self._http, self._clock)
        self._reservations = Reservations(ledger, self.creator, self._clock)
        self._requests = VendorRequests(settings, self._clock, media_store)
        self._media = guarded_client(settings.allow_hosts, timeout_s=15)
        self._preflights = asyncio.Semaphore(PREFLIGHTS_MAX)
        self._watch = Watch(ledger, self._clock)

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> "Submitter":
        """Create a submitter from the environment and relay.toml; raise InvalidSettings."""
        settings = settings or load_settings()
        return cls(settings, open_ledger(settings.ledger))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections and the ledger."""
        await self._watch.close()
        await self._http.close()
        await self._media.aclose()
        await self._ledger.close()

    # -- public API ---------------------------------------------------------------------------

    async def submit(self, request: MotionControl, *, callback: bool = True) -> SubmittedTask:
        """Create a task from `request` and return it; wait for a free slot first.

        Idempotent by `external_task_id`: if a task with this id and the same request exists, it is
        returned; a refused one is sent again. Raises InvalidRequest and InvalidSettings (nothing was
        sent), IdConflict and VendorRefused (no task was created) and SubmissionUnknown (a task may have
        been created; it is looked up and never blindly sent again).
        """
        prepared = await self.prepare(request)
        for warning in prepared.warnings:
            log.warning("request.not_checked", external_task_id=prepared.external_task_id, reason=warning)
        return await self.submit_prepared(prepared, callback=callback)

    async def prepare(self, request: MotionControl) -> Prepared:
        """Run preflight: check a request and its media; raise InvalidRequest with every problem."""
        async with self._preflights:
            return await preflight(request, self._settings, self._media, self._clock)

    async def submit_prepared(
        self, prepared: Prepared, *, callback: bool = True, absent_at_ms: int | None = None
    ) -> SubmittedTask:
        """Do as `submit` does, with a request from `prepare`.

        `absent_at_ms`: the caller has found, when the row was last updated at this time, that no vendor has a task
        of this request: it is sent without a lookup, unless a create was sent since.
        """
        candidates = [await self._candidate(name) for name in prepared.vendors]
        if callback and any(candidate.settings.callbacks for candidate in candidates):
            self._settings.require_callbacks()
        task = await self._reservations.reserve(prepared, candidates, callback=callback, absent_at_ms=absent_at_ms)
        if task.status in NOT_ANSWERED:
            names = [candidate.name for candidate in candidates]
            if task.vendor not in names:  # that vendor no longer passes preflight
                limit = f"the create was started there, but now only {' and '.join(names)} can take the request"
                raise InvalidRequest([Problem("vendor", task.vendor, limit, "Submit it with a new id.")])
            rest = candidates[names.index(task.vendor) :]
            if task.status is TaskStatus.SUBMISSION_UNKNOWN:  # an ambiguous create never fails over
                rest = rest[:1]
            task = await self.creator.create(
                task,
                lambda vendor: self._requests.build(prepared, vendor, callback=task.expects_callback),
                rest,
            )
        elif task.status is TaskStatus.REFUSED:
            reason = f"it was refused, and then reported as {task.vendor}'s task {task.task_id}, which is being asked"
            raise SubmissionUnknown(f"{task.external_task_id}: {reason}. Nothing was sent. Try again in ten minutes.")
        return SubmittedTask(task, self._watch)

    async def _candidate(self, name: str) -> Candidate:
        settings = self._settings.require_vendor(name)
        successes: list[Task] = []
        if settings.callbacks == "auto":
            successes = await self._ledger.tasks(status=TaskStatus.SUCCEED, vendor=name, limit=RECENT_SUCCESSES)
        return Candidate(settings, poll_policy_for(settings, successes))

    async def request_of(
        self, prepared: Prepared, vendor: str | None = None, *, callback: bool = True, publish: bool = True
    ) -> HttpRequest:
        """Return the create request for `vendor` (default: the first that passed preflight), without sending it.

        Without `publish`, local media are not uploaded to the media store.
        """
        return await self._requests.build(prepared, vendor or prepared.vendors[0], callback=callback, publish=publish)

    async def refresh(self, *external_task_ids: str) -> list[Refreshed]:
        """Ask the vendors about these tasks now, and apply what they report; return the results in this order.

        It brings an `abandoned` or `submission_unknown` task to its truth, and renews the URLs of a `succeed`
        one where the vendor gives new ones (then without an event). Raises TaskNotFound.
        """
        return await self._refresher.refresh([await self._ledger.get(id) for id in external_task_ids])

    async def retry(self, external_task_id: str, *, new_id: str | None = None, absent: bool = False) -> SubmittedTask:
        """Submit a task's request again.

        A `failed` task is submitted with a new id, `retry_id` of the old one, so that a repeated retry pays once;
        an `abandoned` one too, if its vendor says now that it failed or does not exist. A task that was refused,
        or whose create has no answer, keeps its id: the vendor is queried for the latter, and the request is sent
        only if the vendor does not have the task. `absent` states so for a vendor that cannot be asked. Raises
        InvalidRequest for any other status.
        """
        task = await self._ledger.get(external_task_id)
        absent_at_ms = None
        if task.status is TaskStatus.ABANDONED:
            task = await self._without_a_result(task, absent=absent)
        if task.status in (TaskStatus.FAILED, TaskStatus.ABANDONED):
            metadata = task.metadata | {"retry_of": external_task_id}
            request = to_request(task, new_id or retry_id(external_task_id), metadata)
        elif task.status in SENDABLE:
            request = to_request(task, external_task_id, task.metadata)
            absent_at_ms = task.updated_at_ms if absent else None
        else:
            limit = "refused, failed, abandoned, created or submission_unknown"
            raise _wrong_status(task, limit, "Only these can be retried. Submit a new task for another result.")
        prepared = await self.prepare(request)
        try:
            return await self.submit_prepared(prepared, callback=task.expects_callback, absent_at_ms=absent_at_ms)
        except IdConflict as error:
            if new_id is not None or prepared.external_task_id == external_task_id:
                raise
            limit = f"an id that is not used, which {prepared.external_task_id} is"
            remedy = "Choose one: `tasks retry --external-task-id NEW_ID`, or `retry(..., new_id=...)` in Python."
            raise InvalidRequest([Problem("external_task_id", external_task_id, limit, remedy)]) from error

    async def _without_a_result(self, task: Task, *, absent: bool) -> Task:
        """Return an abandoned task once it is certain that its vendor has no result of it, and works on none."""
        (found,) = await self._refresher.refresh([task])
        limit = "without a result at the vendor"
        if found.outcome == "not_asked" and not absent:
            remedy = "If the vendor's console shows no such task, or a failed one, state so with --absent."
            raise _wrong_status(found.task, limit, f"The vendor cannot be asked ({found.message}). {remedy}")
        if found.outcome == "no_answer":
            raise SubmissionUnknown(f"{task.external_task_id} is abandoned, and {found.message}. Nothing was sent.")
        if found.task.status is TaskStatus.ABANDONED and found.report is not None and is_about(task, found.report):
            remedy = "It is not sent again while the vendor has it. Ask again later with `tasks refresh`."
            raise _wrong_status(found.task, f"{limit}, but {found.message}", remedy)
        return found.task

    async def adopt(self, external_task_id: str, task_id: str) -> SubmittedTask:
        """Assign the vendor's task `task_id` to a task whose create had no answer, or that is not followed any more.

        The vendor is asked for it first. Raises InvalidRequest if it has none, if it is another task's, or if
        this one has a vendor's task already; SubmissionUnknown if the vendor does not answer.
        """
        task = await self._ledger.get(external_task_id)
        if task.status not in ADOPTABLE or task.task_id not in (None, task_id):
            known = f", as the vendor's task {task.task_id}" if task.task_id else ""
            limit = f"{', '.join(sorted(ADOPTABLE))}{known}"
            raise _wrong_status(task, limit, "There is nothing to adopt. `tasks refresh` asks the vendor about it.")
        for other in await self._ledger.by_task_ids(task.vendor, [task_id]):
            if other.external_task_id != external_task_id:
                remedy = "Copy the id of the task that the vendor's console shows for this request."
                raise InvalidRequest([Problem("task_id", task_id, f"not that of {other.external_task_id}", remedy)])
        found = await self._refresher.look_at(task, task_id)
        if found.outcome == "no_answer":
            raise SubmissionUnknown(f"{task_id} was not adopted: {found.message}. Nothing was changed.")
        theirs = None if found.report is None else found.report.external_task_id
        if found.report is None or theirs not in (None, external_task_id):
            reason = f"the vendor has it as {theirs}" if theirs else found.message
            raise InvalidRequest([Problem("task_id", task_id, reason, "Check it in the vendor's console.")])
        adopted = await self._refresher.adopt(task, found.report)
        if adopted.task_id != task_id:
            raise _wrong_status(adopted, "not changed by another process meanwhile", "Look at it, then try again.")
        return SubmittedTask(adopted, self._watch)

    async def task(self, external_task_id: str) -> SubmittedTask:
        """Return a task that was submitted earlier, to wait for its result; raise TaskNotFound."""
        return SubmittedTask(await self._ledger.get(external_task_id), self._watch)


ADOPTABLE = SENDABLE | {TaskStatus.ABANDONED}


def _wrong_status(task: Task, limit: str, remedy: str) -> InvalidRequest:
    value = f"{task.external_task_id} is {task.status.value}"
    return InvalidRequest([Problem("external_task_id", value, limit, remedy)])
