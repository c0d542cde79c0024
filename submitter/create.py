"""Sends one reserved task's create request until its outcome is known.

A create that got no clear answer is looked for under its external_task_id, and sent again only
when the vendor surely does not have it. The right to send is a lease in the row, renewed while
this runs: a submitter that died is taken over from, one that lives is waited for.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import structlog

from submitter.clock import Clock
from submitter.errors import SubmissionUnknown, Unintelligible, VendorRefused
from submitter.http import NotSent, Unanswered, VendorHttp
from submitter.ledger import Ledger
from submitter.schedule import LOOK_FOR_S, OUTAGE_BACKOFF, SLOT_BACKOFF
from submitter.settings import VendorSettings
from submitter.task import NOT_ANSWERED, Observation, OutcomeUnknown, Refused, Sending, Task, transition
from submitter.vendors.base import HttpRequest

SENDING_LEASE_S = 15.0
CONNECT_TRIES = 5
SEND_TRIES = 3

MakeRequest = Callable[[], Awaitable[HttpRequest]]
"""Makes the create request anew: its token has a time, and its media may have to be uploaded."""

log = structlog.get_logger("submitter")


class Creator:
    """What creating needs, and the line of those who were told that all slots are taken."""

    def __init__(
        self,
        ledger: Ledger,
        http: VendorHttp,
        clock: Clock,
        *,
        look_for_s: tuple[float, ...] = LOOK_FOR_S,
        sending_lease_s: float = SENDING_LEASE_S,
    ) -> None:
        self._ledger = ledger
        self.http = http
        self._clock = clock
        self._look_for_s = look_for_s
        self._lease_ms = int(sending_lease_s * 1000)
        self._line: dict[str, asyncio.Lock] = {}

    def sending(self, sender: str) -> Sending:
        """Return the observation that `sender` holds the right to send from now on."""
        return Sending(sender, self._clock.now_ms() + self._lease_ms)

    async def create(self, task: Task, make: MakeRequest, vendor: VendorSettings, *, may_exist: bool) -> Task:
        """Send the create request until its outcome is known, and return the task that it made."""
        async with self._keep_sending(task):
            if may_exist:
                found = await self._look(task, vendor)
                if found is not None:
                    return found
            for _ in range(SEND_TRIES):
                created = await self._send(task, make, vendor)
                if created is not None:
                    return created
                found = await self._look(task, vendor)
                if found is not None:
                    return found
            return await self._unknown(
                task, f"{task.vendor} answered none of {SEND_TRIES} creates, and has no such task"
            )

    async def _send(self, task: Task, make: MakeRequest, vendor: VendorSettings) -> Task | None:
        """Return the created task, or None when nobody knows whether there is one; wait out what passes."""
        attempt = unreached = expired = 0
        line = self._line.setdefault(task.vendor, asyncio.Lock())
        async with AsyncExitStack() as place:
            in_line = line.locked()  # others were told to come back later: nobody overtakes them
            if in_line:
                await place.enter_async_context(line)
            while True:
                request = await self._request_or_refusal(task, make)
                # Asked anew before every send: whoever was asleep for longer than the lease has lost it.
                current = await self.observe(task.external_task_id, self.sending(task.sender or ""))
                if current.status not in NOT_ANSWERED:
                    return current
                if current.sender != task.sender:
                    return None
                outcome = await self.http.run(request, fresh=True)
                match outcome:
                    case Unanswered(reason):
                        log.warning("create.unanswered", external_task_id=task.external_task_id, reason=reason)
                        return None
                    case NotSent(reason):
                        unreached += 1
                        refusal = _unreachable(task.vendor, reason, retryable=unreached < CONNECT_TRIES)
                    case _:
                        try:
                            report = vendor.vendor.read_create(outcome)
                        except SubmissionUnknown as unknown:
                            log.warning("create.ambiguous", external_task_id=task.external_task_id, reason=str(unknown))
                            return None
                        except VendorRefused as error:
                            refusal = error
                            expired += error.http_status == 401
                        else:
                            return await self.observe(task.external_task_id, report)
                if not refusal.retryable or expired > 1:
                    await self.observe(task.external_task_id, Refused(str(refusal)))
                    raise refusal
                if refusal.http_status == 429 and not in_line:
                    in_line = True
                    await place.enter_async_context(line)
                backoff = SLOT_BACKOFF if refusal.http_status == 429 else OUTAGE_BACKOFF
                delay_s = refusal.retry_after_s or backoff.delay_s(attempt, self._clock.chance())
                attempt += 1
                log.warning(
                    "create.waits",
                    external_task_id=task.external_task_id,
                    delay_s=round(delay_s, 1),
                    reason=str(refusal),
                )
                await self._slot_or_delay(task.vendor, delay_s)

    async def _request_or_refusal(self, task: Task, make: MakeRequest) -> HttpRequest:
        try:
            return await make()
        except Exception as error:  # media that could not be read or uploaded: nothing was sent
            await self.observe(task.external_task_id, Refused(f"it was not sent: {error}"))
            raise

    async def _slot_or_delay(self, vendor: str, delay_s: float) -> None:
        """Return after `delay_s`, or as soon as one of our tasks at this vendor ends."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + delay_s
        before = await self._ledger.open_tasks(vendor)
        while (left_s := deadline - loop.time()) > 0:
            mark = self._ledger.mark()
            if await self._ledger.open_tasks(vendor) < before:
                return
            await self._ledger.changed(mark, left_s)

    async def _look(self, task: Task, vendor: VendorSettings) -> Task | None:
        """Look for a task whose create may have worked: return it, or None when it is surely absent.

        Raises SubmissionUnknown when the vendor cannot be asked, and after recording so.
        """
        for pause_s in self._look_for_s:
            current = await self._pause(task.external_task_id, pause_s)
            if current.status not in NOT_ANSWERED:
                return current  # a callback, or a poll, was quicker
            now_s = self._clock.now_s()
            for query in vendor.vendor.queries([msgspec.structs.replace(task, task_id=None)], now_s):
                outcome = await self.http.run(query.request)
                if isinstance(outcome, NotSent | Unanswered):
                    return await self._unknown(
                        task, f"create got no answer, nor did the question for it: {outcome.reason}"
                    )
                try:
                    findings = vendor.vendor.read_query(query, outcome, now_s)
                except (VendorRefused, Unintelligible) as error:
                    return await self._unknown(task, f"create got no answer, and {error}")
                report = findings.reports.get(task.external_task_id)
                if report is not None:
                    log.info("create.adopted", external_task_id=task.external_task_id, task_id=report.task_id)
                    return await self.observe(task.external_task_id, report)
                if findings.unreadable:
                    return await self._unknown(task, next(iter(findings.unreadable.values())))
        return None

    async def _pause(self, external_task_id: str, pause_s: float) -> Task:
        """Return the task after `pause_s`, or as soon as its create is answered by other means."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + pause_s
        while True:
            mark = self._ledger.mark()
            task = await self._ledger.get(external_task_id)
            left_s = deadline - loop.time()
            if left_s <= 0 or task.status not in NOT_ANSWERED:
                return task
            await self._ledger.changed(mark, left_s)

    async def _unknown(self, task: Task, reason: str) -> Task:
        observed = await self.observe(task.external_task_id, OutcomeUnknown(reason))
        if observed.status not in NOT_ANSWERED:
            return observed
        raise SubmissionUnknown(
            f"{task.external_task_id}: {reason}. It may exist and be billed, so it is not sent again: its callback, "
            f"or a poll, settles it; or run the same command with --external-task-id {task.external_task_id} later"
        )

    async def observe(self, external_task_id: str, observation: Observation) -> Task:
        """Apply an observation to a task, and return the task as it is now."""
        now_ms = self._clock.now_ms()
        applied = await self._ledger.apply(external_task_id, lambda task: transition(task, observation, now_ms))
        if applied.transition is not None and applied.transition.event_type is not None:
            task = applied.task
            log.info("task.changed", external_task_id=external_task_id, status=task.status.value, task_id=task.task_id)
        return applied.task

    @asynccontextmanager
    async def _keep_sending(self, task: Task) -> AsyncIterator[None]:
        """Hold the right to send while the block runs."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease_ms / 3000)
                await self.observe(task.external_task_id, self.sending(task.sender or ""))

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing


def _unreachable(vendor: str, reason: str, *, retryable: bool) -> VendorRefused:
    return VendorRefused(
        vendor,
        http_status=0,
        code="unreachable",
        message=reason,
        remedy="Nothing was sent. Check the network and the base URL, and submit again.",
        retryable=retryable,
    )
