"""Sends a reserved task's create request until its outcome is known: retries, lookup, failover.

- Lookup: after a create without a clear answer, the vendor is queried by external_task_id, if its API
  allows it. The request is sent again only if the vendor definitely does not have the task. A task that the
  vendor created before the first send is someone else's: the id was used before, which is an IdConflict.
  So is a duplicate in answer to the first send.
- Failover: a definite refusal that may not apply to other vendors moves the request to the next one.
  An ambiguous outcome never does.
- Lease: the row holds a lease to send, renewed while this runs. Another submitter takes over an
  expired lease, and waits for a live one.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Protocol

import msgspec

from submitter.clock import Clock
from submitter.create_answer import limit_reached, read_create
from submitter.errors import IdConflict, LedgerUnavailable, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.http import NotSent, Unanswered, VendorHttp
from submitter.ledger.base import Tasks
from submitter.ledger.observe import observe
from submitter.log import Logger
from submitter.observation import (
    CreateRefused,
    CreateUnclear,
    FailedOver,
    Observation,
    OutcomeUnknown,
    Report,
    SendLease,
)
from submitter.schedule import LOOK_FOR_S, OUTAGE_BACKOFF, SLOT_BACKOFF, PollPolicy
from submitter.settings import VendorSettings
from submitter.task import NOT_ANSWERED, SENDABLE, Task, TaskStatus, refusals_of
from submitter.vendors.base import HttpRequest

SENDING_LEASE_S = 15.0
CONNECT_TRIES = 5
STORE_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 15.0)
SEND_TRIES = 3

BuildRequest = Callable[[str], Awaitable[HttpRequest]]
"""Builds the create request for a vendor; called before each send, since tokens expire and media may need uploading."""

log = Logger("submitter")


class CreateMetrics(Protocol):
    """The metrics of creates."""

    def refused(self, vendor: str, *, retryable: bool) -> None:
        """Count a request that no vendor took; `retryable`: the same request may succeed later."""
        ...


class Candidate(msgspec.Struct, frozen=True):
    """A vendor that a request may be sent to, and the poll policy of its task there."""

    settings: VendorSettings
    poll_policy: PollPolicy

    @property
    def name(self) -> str:
        """The vendor's name."""
        return self.settings.vendor.name


class Creator:
    """Sends create requests. Requests that a vendor rate-limited (429) wait in one queue per vendor."""

    def __init__(
        self,
        ledger: Tasks,
        http: VendorHttp,
        clock: Clock,
        *,
        look_for_s: tuple[float, ...] = LOOK_FOR_S,
        sending_lease_s: float = SENDING_LEASE_S,
        metrics: CreateMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._ledger = ledger
        self.http = http
        self._clock = clock
        self._look_for_s = look_for_s
        self._lease_ms = int(sending_lease_s * 1000)
        self._queues: dict[str, asyncio.Lock] = {}

    def send_lease(
        self,
        lease_owner: str | None,
        *,
        begins: bool = False,
        renews: bool = False,
        refused: bool = False,
        absent_at_ms: int | None = None,
    ) -> SendLease:
        """Return a lease to send for `lease_owner`, from now on; for the rest see `SendLease`."""
        until_ms = self._clock.now_ms() + self._lease_ms
        return SendLease(lease_owner or "", until_ms, begins, renews, refused, absent_at_ms)

    async def create(self, task: Task, build: BuildRequest, candidates: Sequence[Candidate]) -> Task:
        """Send the create request until its outcome is known, and return the created task.

        The candidates are tried in order. If all definitely refuse, the first one with a temporary
        refusal is retried. Before the first send, a vendor that may have the task already is asked for it.
        Raises VendorRefused, SubmissionUnknown, and IdConflict if the id was used before at the vendor.
        """
        async with self._renewed_lease(task):
            if task.may_have_been_sent:
                found = await self._look_up(task, candidates[0].settings)
                if found is not None:
                    return found
            temporary: list[Candidate] = []
            reason = None
            for candidate in candidates:
                task = await self.move_to(task, candidate, reason)
                try:
                    return await self._create_at(candidate, task, build, retries_here=len(candidates) == 1)
                except VendorRefused as refused:
                    refusal = refused
                if not refusal.failover:
                    break
                if refusal.retryable:
                    temporary.append(candidate)
                reason = refusal.reason
            else:
                if temporary and len(candidates) > 1:
                    task = await self.move_to(task, temporary[0], reason)
                    try:
                        return await self._create_at(temporary[0], task, build, retries_here=True)
                    except VendorRefused as refused:
                        refusal = refused
            if self._metrics is not None:
                self._metrics.refused(refusal.vendor, retryable=refusal.retryable)
            await self._record_refusal(task, str(refusal))
            raise refusal.after(refusals_of(task)) if task.refused_by else refusal

    async def move_to(self, task: Task, candidate: Candidate, reason: str | None) -> Task:
        """Return the task at the candidate's vendor. `reason`: why the previous one refused; None on a new start."""
        if task.vendor == candidate.name:
            return task
        log.warning("create.diverted", external_task_id=task.external_task_id, to=candidate.name, reason=reason)
        failed_over = FailedOver(candidate.name, candidate.poll_policy, reason, task.lease_owner)
        moved = await self.observe(task.external_task_id, failed_over)
        if (moved.vendor, moved.lease_owner) != (candidate.name, task.lease_owner):
            raise _taken_over(task)
        return moved

    async def _create_at(self, candidate: Candidate, task: Task, build: BuildRequest, *, retries_here: bool) -> Task:
        """Return the task that this vendor created; raise VendorRefused if it definitely created none.

        `retries_here`: retry a temporary refusal here, even if another vendor may accept the request.
        """
        vendor = candidate.settings
        if not retries_here and vendor.parallel is not None:
            others = await self._ledger.open_tasks(candidate.name) - 1
            if others >= vendor.parallel:
                raise limit_reached(candidate.name, vendor.parallel)
        created: Task | VendorRefused | None = None
        for _ in range(SEND_TRIES):
            created = await self._send(task, build, vendor, retries_here=retries_here)
            if isinstance(created, Task):
                return created
            await self.observe(task.external_task_id, CreateUnclear(task.lease_owner))
            found = await self._look_up(task, vendor)
            if found is not None:
                return found
            if created is not None and created.failover and not retries_here:
                raise created  # the lookup has shown that the ambiguous answer was a refusal
        if isinstance(created, VendorRefused):  # an outage, which the last lookup has shown to be a refusal too
            raise created
        return await self._unknown(task, f"{task.vendor} answered none of {SEND_TRIES} creates, and has no such task")

    async def _send(
        self, task: Task, build: BuildRequest, vendor: VendorSettings, *, retries_here: bool
    ) -> Task | VendorRefused | None:
        """Send the request, and again after temporary refusals.

        Return the created task. If the outcome is unknown, return the vendor's error or None. A duplicate may be
        this task itself if an earlier create of it got no clear answer.
        """
        attempt = unreached = expired = 0
        queue = self._queues.setdefault(task.vendor, asyncio.Lock())
        async with AsyncExitStack() as stack:
            is_queued = queue.locked()  # requests that were rate-limited earlier go first
            if is_queued:
                await stack.enter_async_context(queue)
            while True:
                request = await self._build_or_refuse(task, build, vendor.vendor.name)
                # Before every send: a process that was suspended for longer than the lease has lost it.
                lease = self.send_lease(task.lease_owner, begins=True)
                current = await self.observe(task.external_task_id, lease)
                if current.status not in SENDABLE:
                    return current
                # A refused task has no owner.
                if (current.lease_owner, current.vendor) != (task.lease_owner, vendor.vendor.name):
                    raise _taken_over(task)
                result = read_create(vendor.vendor, await self.http.run(request, fresh=True))
                if isinstance(result, Report):
                    return await self._store_created(task, result)
                if isinstance(result, SubmissionUnknown):
                    log.warning("create.ambiguous", external_task_id=task.external_task_id, reason=str(result))
                    return result.refusal
                refusal = result
                if refusal.duplicate:
                    if task.vendor in current.unanswered_since_ms:
                        return refusal
                    raise await self._conflict(task)
                unreached += refusal.http_status == 0
                expired += refusal.http_status == 401
                is_last = unreached == CONNECT_TRIES or expired > 1 or (refusal.failover and not retries_here)
                if is_last or not refusal.retryable:
                    raise refusal
                if refusal.http_status == 429 and not is_queued:
                    is_queued = True
                    await stack.enter_async_context(queue)
                backoff = SLOT_BACKOFF if refusal.http_status == 429 else OUTAGE_BACKOFF
                delay_s = refusal.retry_after_s or backoff.delay_s(attempt, self._clock.chance())
                attempt += 1
                log.warning(
                    "create.waits",
                    external_task_id=task.external_task_id,
                    delay_s=round(delay_s, 1),
                    reason=str(refusal),
                )
                lease = self.send_lease(task.lease_owner, renews=True, refused=True)
                await self.observe(task.external_task_id, lease)
                await self._slot_or_delay(task.vendor, delay_s)

    async def _build_or_refuse(self, task: Task, build: BuildRequest, vendor: str) -> HttpRequest:
        """Return the request; if it cannot be built (media not readable, upload failed), record that none was sent."""
        try:
            return await build(vendor)
        except Exception as error:
            await self._record_refusal(task, f"the request was not sent: {error}")
            raise

    async def _record_refusal(self, task: Task, reason: str) -> None:
        """Record that the last create made no task; raise SubmissionUnknown if this submitter is not its owner."""
        observed = await self.observe(task.external_task_id, CreateRefused(reason, task.lease_owner))
        if observed.status is not TaskStatus.REFUSED:
            raise _taken_over(task)

    async def _store_created(self, task: Task, report: Report) -> Task:
        """Store the task that the vendor created: it is paid for, so a busy ledger is asked again for a while."""
        for delay_s in STORE_DELAYS_S:
            try:
                return await self.observe(task.external_task_id, report)
            except LedgerUnavailable as error:
                log.error(
                    "create.not_stored",
                    external_task_id=task.external_task_id,
                    vendor=task.vendor,
                    task_id=report.task_id,
                    reason=str(error),
                )
            await self._clock.sleep(delay_s)
        return await self.observe(task.external_task_id, report)

    async def _slot_or_delay(self, vendor: str, delay_s: float) -> None:
        """Return after `delay_s`, or as soon as one of the ledger's tasks at this vendor ends."""
        deadline_s = self._clock.monotonic_s() + delay_s
        before = await self._ledger.open_tasks(vendor)
        while (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            version = self._ledger.version()
            if await self._ledger.open_tasks(vendor) < before:
                return
            await self._clock.wait_for_change(self._ledger, version, left_s)

    async def _look_up(self, task: Task, vendor: VendorSettings) -> Task | None:
        """Query the vendor for a task whose create had no clear answer.

        Return it, or None if the vendor definitely does not have it. Record and raise SubmissionUnknown
        if the vendor cannot be queried.
        """
        if not vendor.vendor.limits.own_id:
            return await self._unknown(
                task, f"create got no clear answer, and {task.vendor} cannot be queried by external_task_id"
            )
        for pause_s in self._look_for_s:
            current = await self._pause(task.external_task_id, pause_s)
            if current.status not in NOT_ANSWERED:
                return current  # a callback or a poll came first
            now_s = self._clock.now_s()
            for query in vendor.vendor.queries([msgspec.structs.replace(task, task_id=None)], now_s):
                outcome = await self.http.run(query.request)
                if isinstance(outcome, NotSent | Unanswered):
                    return await self._unknown(
                        task, f"no response to create, and the follow-up query failed too: {outcome.reason}"
                    )
                try:
                    findings = vendor.vendor.read_query(query, outcome, now_s)
                except (VendorRefused, Unintelligible) as error:
                    return await self._unknown(task, f"no response to create, and the follow-up query failed: {error}")
                report = findings.reports.get(task.external_task_id)
                if report is not None:
                    return await self._adopt(task, report)
                if findings.unreadable:
                    return await self._unknown(task, next(iter(findings.unreadable.values())))
        return None

    async def _adopt(self, task: Task, report: Report) -> Task:
        """Record the vendor's task with our id as this one; raise IdConflict or SubmissionUnknown if it is not."""
        observed = await self.observe(task.external_task_id, report)
        if observed.status is TaskStatus.REFUSED:
            raise IdConflict(task.external_task_id, vendor=task.vendor)
        if observed.status in NOT_ANSWERED:
            reason = f"{task.vendor} has a task with this id, and does not state when it was created"
            return await self._unknown(task, reason)
        log.info("create.adopted", external_task_id=task.external_task_id, task_id=report.task_id)
        return observed

    async def _conflict(self, task: Task) -> IdConflict:
        """Record that no task was created, since the id was used before at the vendor; return the error."""
        conflict = IdConflict(task.external_task_id, vendor=task.vendor)
        await self._record_refusal(task, str(conflict))
        return conflict

    async def _pause(self, external_task_id: str, pause_s: float) -> Task:
        """Return the task after `pause_s`, or as soon as a callback or a poll reports it."""
        deadline_s = self._clock.monotonic_s() + pause_s
        while True:
            version = self._ledger.version()
            task = await self._ledger.get(external_task_id)
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or task.status not in NOT_ANSWERED:
                return task
            await self._clock.wait_for_change(self._ledger, version, left_s)

    async def _unknown(self, task: Task, reason: str) -> Task:
        observed = await self.observe(task.external_task_id, OutcomeUnknown(reason, task.lease_owner))
        if observed.status not in NOT_ANSWERED:
            return observed
        raise SubmissionUnknown(
            f"{task.external_task_id}: {reason}. The task may exist and be billed, so it is not sent again. "
            "A callback settles it. Without one, look for the task in the vendor's console. If it is there, run "
            f"`kling-relay tasks adopt {task.external_task_id} TASK_ID`. If it is not, run "
            f"`kling-relay tasks retry {task.external_task_id} --absent`."
        )

    async def observe(self, external_task_id: str, observation: Observation) -> Task:
        """Apply an observation to a task, and return the task afterwards."""
        return await observe(self._ledger, external_task_id, observation, self._clock.now_ms(), source="create")

    @asynccontextmanager
    async def _renewed_lease(self, task: Task) -> AsyncIterator[None]:
        """Renew the lease to send while the block runs."""

        async def renew() -> None:
            while True:
                await self._clock.sleep(self._lease_ms / 3000)
                with suppress(LedgerUnavailable):  # it is renewed next time; before a send it is taken again
                    await self.observe(task.external_task_id, self.send_lease(task.lease_owner, renews=True))

        renewal = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewal.cancel()
            with suppress(asyncio.CancelledError):
                await renewal


def _taken_over(task: Task) -> SubmissionUnknown:
    return SubmissionUnknown(
        f"{task.external_task_id}: this submitter was stopped for longer than its lease to send, and the task went on"
        f" without it. `kling-relay tasks show {task.external_task_id}` shows what becomes of it."
    )
