"""Submits tasks: reserve, create, apply. Decides nothing itself.

The row exists before the request leaves, and says who may send it: killing this process at any
instant and asking again makes no second task.
"""

import asyncio
import base64
from types import TracebackType
from typing import Self

import msgspec
import structlog

from submitter.asked import differences, request_again
from submitter.callback_url import callback_url
from submitter.clock import Clock
from submitter.create import SENDING_LEASE_S, Candidate, Creator
from submitter.egress import guarded_client
from submitter.errors import (
    IdConflict,
    InvalidRequest,
    Problem,
)
from submitter.http import VendorHttp
from submitter.learned import WITNESSES, patience_with
from submitter.ledger import Ledger, open_ledger
from submitter.ledger.base import Reserved
from submitter.media import Medium
from submitter.media_store import MediaStore, open_media_store
from submitter.preflight import Prepared, preflight
from submitter.request import (
    MotionControl,
    mode_of,
)
from submitter.schedule import LOOK_FOR_S
from submitter.settings import Settings, load_settings
from submitter.task import (
    NOT_ANSWERED,
    SETTLED,
    Doubted,
    Report,
    Task,
    TaskStatus,
    Tried,
    may_send,
    transition,
)
from submitter.vendors.base import HttpRequest, Job
from submitter.watch import SubmittedTask, Watch

log = structlog.get_logger("submitter")


class Submitter:
    """Sends Motion Control requests. Use it as an async context manager; one serves a whole application."""

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
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._clock = clock or Clock()
        self.creator = Creator(
            ledger, http or VendorHttp(), self._clock, look_for_s=look_for_s, sending_lease_s=sending_lease_s
        )
        self._media_store = media_store
        self._media = guarded_client(settings.allow_hosts, timeout_s=15)
        self._turn: dict[str, asyncio.Lock] = {}  # whose turn it is to reserve
        self._watch = Watch(ledger)

    @classmethod
    def from_settings(cls, settings: Settings | None = None) -> "Submitter":
        """Make a submitter from the environment and relay.toml; raise InvalidSettings."""
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
        await self.creator.http.close()
        await self._media.aclose()
        await self._ledger.close()

    # -- what a user calls --------------------------------------------------------------------

    async def submit(self, request: MotionControl, *, callback: bool = True) -> SubmittedTask:
        """Make `request` a task, once, and return it; wait for a free slot before.

        With the external_task_id of a task that exists, and the same request, that task is
        returned. Raises InvalidRequest, InvalidSettings, IdConflict (nothing was sent),
        VendorRefused (surely not created) and SubmissionUnknown (perhaps created: it is looked
        for, and never simply sent again).
        """
        prepared = await self.prepare(request)
        for warning in prepared.warnings:
            log.warning("request.not_checked", external_task_id=prepared.external_task_id, reason=warning)
        return await self.submit_prepared(prepared, callback=callback)

    async def prepare(self, request: MotionControl) -> Prepared:
        """Check a request and its media; raise InvalidRequest with every problem."""
        return await preflight(request, self._settings, self._media, self._clock)

    async def submit_prepared(
        self, prepared: Prepared, *, callback: bool = True, surely_absent: bool = False
    ) -> SubmittedTask:
        """Do as `submit` does with a request that was prepared.

        `surely_absent`: somebody looked, and no vendor has a task of it.
        """
        candidates = [await self._candidate(name) for name in prepared.vendors]
        if callback and any(candidate.settings.callbacks for candidate in candidates):
            self._settings.require_callbacks()
        task, may_exist = await self._reserve(prepared, candidates, callback)
        if task.status in NOT_ANSWERED:
            names = [candidate.name for candidate in candidates]
            if task.vendor not in names:  # it was begun where it cannot be done any more
                begun = f"its create was begun there, and now {' and '.join(names)} can do it"
                raise InvalidRequest([Problem("vendor", task.vendor, begun, "Submit it under a new id.")])
            rest = candidates[names.index(task.vendor) :]
            if task.status is TaskStatus.SUBMISSION_UNKNOWN:  # what is ambiguous goes nowhere else
                rest = rest[:1]
            task = await self.creator.create(
                task,
                lambda vendor: self.request_of(prepared, vendor, callback=task.is_told),
                rest,
                may_exist=may_exist and not surely_absent,
            )
        return SubmittedTask(task, self._watch)

    async def _candidate(self, name: str) -> Candidate:
        settings = self._settings.require_vendor(name)
        successes: list[Task] = []
        if settings.callbacks == "auto":
            successes = await self._ledger.tasks(status=TaskStatus.SUCCEED, vendor=name, limit=WITNESSES)
        return Candidate(settings, patience_with(settings, successes))

    async def request_of(
        self, prepared: Prepared, vendor: str | None = None, *, callback: bool = True, publish: bool = True
    ) -> HttpRequest:
        """Return the request that would be sent to `vendor` (the first that can do it); without
        `publish`, local media are left where they are.
        """
        settings = self._settings.require_vendor(vendor or prepared.vendors[0])
        public = self._settings.require_callbacks() if callback and settings.callbacks else None
        now_s, request, id = self._clock.now_s(), prepared.request, prepared.external_task_id
        name, limits = settings.vendor.name, settings.vendor.limits
        job = Job(
            request=request,
            mode=mode_of(request, limits),
            external_task_id=id,
            image=await self._given(prepared, prepared.image, inline=limits.inline_image, publish=publish),
            video=await self._given(prepared, prepared.video, inline=False, publish=publish),
            callback_url=None if public is None else callback_url(public[0], public[1], name, id, now_s),
        )
        return settings.vendor.create(job, now_s)

    async def retry(
        self, external_task_id: str, *, new_id: str | None = None, surely_absent: bool = False
    ) -> SubmittedTask:
        """Submit a task's request again.

        A task that ended (`failed`, `abandoned`) is submitted under a new id. One whose create
        has no answer keeps its id: it is looked for, and sent only if it is surely absent, or if
        somebody who looked says so.
        """
        task = await self._ledger.get(external_task_id)
        if task.status in SETTLED and task.status is not TaskStatus.SUCCEED:
            metadata = task.metadata | {"retry_of": external_task_id}
            request = request_again(task, new_id or self._clock.new_id(), metadata)
        elif task.status in NOT_ANSWERED:
            request = request_again(task, external_task_id, task.metadata)
        else:
            raise InvalidRequest(
                [
                    Problem(
                        "external_task_id",
                        f"{external_task_id} is {task.status.value}",
                        "failed, abandoned, created or submission_unknown",
                        "Only what did not work out is retried; submit a new task for another result.",
                    )
                ]
            )
        prepared = await self.prepare(request)
        return await self.submit_prepared(prepared, callback=task.is_told, surely_absent=surely_absent)

    async def adopt(self, external_task_id: str, task_id: str) -> SubmittedTask:
        """Record that the vendor's task `task_id` is the one whose create had no answer.

        It is asked about from then on. Raises InvalidRequest when the task has an answer already.
        """
        task = await self._ledger.get(external_task_id)
        if task.status not in NOT_ANSWERED:
            raise InvalidRequest(
                [
                    Problem(
                        "external_task_id",
                        f"{external_task_id} is {task.status.value}",
                        "created or submission_unknown",
                        f"It is the vendor's task {task.task_id} already: nothing is to be adopted.",
                    )
                ]
            )
        report = Report(source="create", status=TaskStatus.SUBMITTED, task_id=task_id)
        await self.creator.observe(external_task_id, report)
        return SubmittedTask(await self.creator.observe(external_task_id, Doubted(by_vendor=False)), self._watch)

    async def task(self, external_task_id: str) -> SubmittedTask:
        """Return a task that was submitted before, to wait for it; raise TaskNotFound."""
        return SubmittedTask(await self._ledger.get(external_task_id), self._watch)

    # -- reserving ----------------------------------------------------------------------------

    async def _reserve(self, prepared: Prepared, candidates: list[Candidate], callback: bool) -> tuple[Task, bool]:
        """Return the task with this id, and whether its vendor may know it already.

        It was reserved by us just now, or by another whose right to send has ended.
        """
        now_ms = self._clock.now_ms()
        sender = self._clock.new_id()
        blank = Task(
            external_task_id=prepared.external_task_id,
            vendor=candidates[0].name,
            status=TaskStatus.CREATED,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            patience=candidates[0].patience,
            request=prepared.asked,
            metadata=prepared.request.metadata,
            is_told=callback,
        )
        existing = await self._ledger.get_many([prepared.external_task_id])  # needs no slot
        if existing:
            reserved = Reserved(existing[0], is_new=False)
        else:
            reserved = await self._reserve_slot(blank, sender, candidates)
        if reserved.is_new:
            return reserved.task, False
        different = differences(reserved.task, blank)
        if different:
            raise IdConflict(prepared.external_task_id, different)
        return await self._take_over(reserved.task, sender, candidates[0])

    async def _reserve_slot(self, blank: Task, sender: str, candidates: list[Candidate]) -> Reserved:
        """Store the task once there is room for it at one of the vendors; whoever waits, waits in line."""
        async with self._turn_of(blank.vendor):
            is_queued = False
            while True:
                mark = self._ledger.mark()
                tried: tuple[Tried, ...] = ()
                for candidate in candidates:
                    now_ms = self._clock.now_ms()
                    born = msgspec.structs.replace(
                        blank,
                        vendor=candidate.name,
                        patience=candidate.patience,
                        tried=tried,
                        created_at_ms=now_ms,
                        updated_at_ms=now_ms,
                    )
                    sending = transition(born, self.creator.sending(sender), now_ms)
                    assert sending is not None
                    parallel = candidate.settings.parallel
                    reserved = await self._ledger.reserve(sending.task, parallel)
                    if reserved is not None:
                        return reserved
                    tried = (*tried, Tried(candidate.name, f"our own limit of {parallel} parallel tasks is reached"))
                if not is_queued:
                    is_queued = True
                    log.warning("submission.queued", external_task_id=blank.external_task_id, reason=tried[-1].reason)
                await self._ledger.changed(mark, None)

    async def _take_over(self, task: Task, sender: str, first: Candidate) -> tuple[Task, bool]:
        """Return the task once its create was answered, or once the right to send it is ours, and
        whether its vendor may know it. What was refused begins anew, at the first vendor.
        """
        is_waiting = False
        while task.status in NOT_ANSWERED:
            mark = self._ledger.mark()
            task = await self._ledger.get(task.external_task_id)
            now_ms = self._clock.now_ms()
            if may_send(task, now_ms):
                applied = await self.creator.observe(task.external_task_id, self.creator.sending(sender))
                if applied.sender == sender:
                    return await self.creator.divert(applied, first, None) if task.refused else applied, task.begun
                task = applied
            else:
                if not is_waiting:
                    is_waiting = True
                    log.warning(
                        "submission.waiting",
                        external_task_id=task.external_task_id,
                        reason="another submitter holds this id; when it ends, or falls silent, this one goes on",
                    )
                await self._ledger.changed(mark, max(0.05, (task.sending_until_ms - now_ms) / 1000))
        return task, True

    def _turn_of(self, vendor: str) -> asyncio.Lock:
        return self._turn.setdefault(vendor, asyncio.Lock())

    # -- media --------------------------------------------------------------------------------

    def _store(self) -> MediaStore | None:
        if self._media_store is None and self._settings.media_store is not None:
            self._media_store = open_media_store(
                self._settings.media_store,
                public_url=self._settings.public_url,
                ring=self._settings.ring,
                clock=self._clock,
            )
        return self._media_store

    async def _given(self, prepared: Prepared, medium: Medium, *, inline: bool, publish: bool) -> str:
        """Return a medium as the vendor takes it: its URL, or (an image, `inline`) raw base64 without a prefix."""
        if medium.url is not None:
            return medium.url
        if inline:
            data = medium.inline if medium.inline is not None else (medium.path.read_bytes() if medium.path else b"")
            return base64.b64encode(data).decode()
        store = self._store() if publish else None
        if store is None or medium.path is None:
            return str(medium.path)
        sha256 = prepared.asked[medium.field].removeprefix("sha256:")
        return await store.publish(medium.path, sha256, prepared.formats.get(medium.field, "mp4"))
