"""Sends one reserved task's create request until its outcome is known.

A create that got no clear answer is looked for under its external_task_id, where the vendor can
be asked by it, and sent again only when the vendor surely does not have it. A sure refusal that
another vendor may not share sends the request to the next one; what is ambiguous never does. The
right to send is a lease in the row, renewed while this runs: a submitter that died is taken over
from, one that lives is waited for.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import structlog

from submitter.clock import Clock
from submitter.errors import SubmissionUnknown, Unintelligible, VendorRefused
from submitter.http import NotSent, Unanswered, VendorHttp
from submitter.ledger import Ledger
from submitter.observe import observe
from submitter.schedule import LOOK_FOR_S, OUTAGE_BACKOFF, SLOT_BACKOFF, Patience
from submitter.settings import VendorSettings
from submitter.task import NOT_ANSWERED, Diverted, Observation, OutcomeUnknown, Refused, Sending, Task, refusals_of
from submitter.vendors.base import HttpRequest

SENDING_LEASE_S = 15.0
CONNECT_TRIES = 5
SEND_TRIES = 3

MakeRequest = Callable[[str], Awaitable[HttpRequest]]
"""Makes the create request for a vendor anew: its token has a time, and its media may have to be uploaded."""

log = structlog.get_logger("submitter")


class Candidate(msgspec.Struct, frozen=True):
    """A vendor that may be sent a request, and how long its task may then be silent."""

    settings: VendorSettings
    patience: Patience

    @property
    def name(self) -> str:
        """The vendor's name."""
        return self.settings.vendor.name


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

    def sending(self, sender: str, *, begins: bool = False, renews: bool = False) -> Sending:
        """Return the observation that `sender` holds the right to send from now on."""
        return Sending(sender, self._clock.now_ms() + self._lease_ms, begins, renews)

    async def create(self, task: Task, make: MakeRequest, candidates: Sequence[Candidate], *, may_exist: bool) -> Task:
        """Send the create request until its outcome is known, and return the task that it made.

        The candidates are tried in their order. When all surely refused, the first whose refusal
        will pass is waited for. `may_exist`: the first may have the task already.
        """
        async with self._keep_sending(task):
            if may_exist:
                found = await self._look(task, candidates[0].settings)
                if found is not None:
                    return found
            waiting: list[tuple[Candidate, VendorRefused]] = []
            reason = None
            for candidate in candidates:
                task = await self.divert(task, candidate, reason)
                try:
                    return await self._create_at(candidate, task, make, waits=len(candidates) == 1)
                except VendorRefused as refused:
                    refusal = refused
                if not refusal.elsewhere:
                    break
                if refusal.retryable:
                    waiting.append((candidate, refusal))
                reason = f"{refusal.message or 'no reason given'} (HTTP {refusal.http_status}, code {refusal.code})"
            else:
                if waiting and len(candidates) > 1:
                    task = await self.divert(task, waiting[0][0], reason)
                    try:
                        return await self._create_at(waiting[0][0], task, make, waits=True)
                    except VendorRefused as refused:
                        refusal = refused
            await self.observe(task.external_task_id, Refused(str(refusal)))
            raise refusal.after(refusals_of(task)) if task.tried else refusal

    async def divert(self, task: Task, candidate: Candidate, reason: str | None) -> Task:
        """Return the task at the candidate, whichever vendor it was meant for before."""
        if task.vendor == candidate.name:
            return task
        log.warning("create.diverted", external_task_id=task.external_task_id, to=candidate.name, reason=reason)
        return await self.observe(task.external_task_id, Diverted(candidate.name, candidate.patience, reason))

    async def _create_at(self, candidate: Candidate, task: Task, make: MakeRequest, *, waits: bool) -> Task:
        """Return the task that this vendor made; raise VendorRefused when it surely made none.

        With `waits`, a refusal that will pass is waited out, even when another vendor might help.
        """
        vendor = candidate.settings
        if not waits and vendor.parallel is not None:
            others = await self._ledger.open_tasks(candidate.name) - 1
            if others >= vendor.parallel:
                raise _full(candidate.name, vendor.parallel)
        for _ in range(SEND_TRIES):
            created = await self._send(task, make, vendor, waits=waits)
            if isinstance(created, Task):
                return created
            found = await self._look(task, vendor)
            if found is not None:
                return found
            if created is not None and created.elsewhere and not waits:
                raise created  # it was refused, and looked for: it is surely not there
        return await self._unknown(task, f"{task.vendor} answered none of {SEND_TRIES} creates, and has no such task")

    async def _send(
        self, task: Task, make: MakeRequest, vendor: VendorSettings, *, waits: bool
    ) -> Task | VendorRefused | None:
        """Return the created task, or, when nobody knows whether there is one, the vendor's answer or
        None; wait out what passes.
        """
        attempt = unreached = expired = 0
        line = self._line.setdefault(task.vendor, asyncio.Lock())
        async with AsyncExitStack() as place:
            in_line = line.locked()  # others were told to come back later: nobody overtakes them
            if in_line:
                await place.enter_async_context(line)
            while True:
                request = await self._request_or_refusal(task, make, vendor.vendor.name)
                # Asked anew before every send: whoever was asleep for longer than the lease has lost it.
                current = await self.observe(task.external_task_id, self.sending(task.sender or "", begins=True))
                if current.status not in NOT_ANSWERED:
                    return current
                if current.sender != task.sender or current.vendor != vendor.vendor.name:
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
                            return unknown.refusal
                        except VendorRefused as error:
                            refusal = error
                            expired += error.http_status == 401
                        else:
                            return await self.observe(task.external_task_id, report)
                if not refusal.retryable or expired > 1 or (refusal.elsewhere and not waits):
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

    async def _request_or_refusal(self, task: Task, make: MakeRequest, vendor: str) -> HttpRequest:
        try:
            return await make(vendor)
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
        if not vendor.vendor.limits.own_id:
            return await self._unknown(
                task, f"create got no clear answer, and {task.vendor} cannot be asked for a task by your id"
            )
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
            f"{task.external_task_id}: {reason}. It may exist and be billed, so it is not sent again. Its "
            "callback settles it; or you do, when you have looked into the vendor's console: `kling-relay tasks adopt "
            f"{task.external_task_id} TASK_ID`, or, if it is not there, `kling-relay tasks retry "
            f"{task.external_task_id} --absent`"
        )

    async def observe(self, external_task_id: str, observation: Observation) -> Task:
        """Apply an observation to a task, and return the task as it is now."""
        return await observe(self._ledger, external_task_id, observation, self._clock.now_ms(), source="create")

    @asynccontextmanager
    async def _keep_sending(self, task: Task) -> AsyncIterator[None]:
        """Hold the right to send while the block runs."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease_ms / 3000)
                await self.observe(task.external_task_id, self.sending(task.sender or "", renews=True))

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
        elsewhere=True,
    )


def _full(vendor: str, parallel: int) -> VendorRefused:
    return VendorRefused(
        vendor,
        http_status=0,
        code="parallel",
        message=f"our own limit of {parallel} parallel tasks is reached",
        remedy="It is tried again by itself.",
        retryable=True,
        elsewhere=True,
    )
