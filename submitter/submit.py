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

from submitter.asked import asked_of, differences, request_again
from submitter.callback_url import callback_url
from submitter.clock import Clock
from submitter.create import SENDING_LEASE_S, Creator
from submitter.egress import guarded_client
from submitter.errors import (
    IdConflict,
    InvalidRequest,
    Problem,
)
from submitter.http import VendorHttp
from submitter.ledger import Ledger, open_ledger
from submitter.ledger.base import Reserved
from submitter.media import Medium, Probe, open_medium, probe
from submitter.media_store import MediaStore, open_media_store
from submitter.request import MotionControl, check_media, check_request
from submitter.schedule import LOOK_FOR_S
from submitter.settings import Settings, VendorSettings, load_settings
from submitter.task import (
    NOT_ANSWERED,
    SETTLED,
    Task,
    TaskStatus,
    may_send,
    transition,
)
from submitter.vendors.base import HttpRequest, Job
from submitter.watch import SubmittedTask, Watch

log = structlog.get_logger("submitter")


class Prepared(msgspec.Struct, frozen=True):
    """A request that passed preflight: its id, its media, what was asked for, and what was not checked."""

    request: MotionControl
    external_task_id: str
    image: Medium
    video: Medium
    video_format: str
    asked: dict[str, str]
    warnings: tuple[str, ...]


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
        if callback:
            self._settings.require_callbacks()
        prepared = await self.prepare(request)
        for warning in prepared.warnings:
            log.warning("request.not_checked", external_task_id=prepared.external_task_id, reason=warning)
        return await self.submit_prepared(prepared, callback=callback)

    async def prepare(self, request: MotionControl) -> Prepared:
        """Check a request and its media against the vendor's limits; raise InvalidRequest with every problem."""
        vendor = self._settings.require_vendor(request.vendor).vendor
        problems = check_request(request, vendor.limits)
        image = open_medium("image", request.image, inline=True)
        video = open_medium("video", request.video, inline=False)
        probes: dict[str, Probe] = {}
        for medium in (image, video):
            if isinstance(medium, Problem):
                problems.append(medium)
            else:
                probes[medium.field] = found = await probe(medium, self._media)
                problems.extend(found.problems)
        facts = {field: found.facts for field, found in probes.items()}
        problems.extend(check_media(request, vendor.limits, facts.get("image"), facts.get("video")))
        if isinstance(video, Medium) and video.path is not None and self._store() is None:
            problems.append(
                Problem(
                    "video",
                    f"the file {video.path.name}",
                    "a URL that the vendor can fetch",
                    "Set KLING_RELAY_MEDIA_STORE (a bucket, or a directory that `serve` publishes), or give a URL.",
                )
            )
        if problems or isinstance(image, Problem) or isinstance(video, Problem):
            raise InvalidRequest(problems)
        video_facts = facts["video"]
        return Prepared(
            request=request,
            external_task_id=request.external_task_id or self._clock.new_id(),
            image=image,
            video=video,
            video_format=(video_facts.format if video_facts else None) or "mp4",
            asked=await asyncio.to_thread(asked_of, request, image, video),
            warnings=tuple(found.warning for found in probes.values() if found.warning),
        )

    async def submit_prepared(self, prepared: Prepared, *, callback: bool = True) -> SubmittedTask:
        """Do as `submit` does with a request that was prepared."""
        if callback:
            self._settings.require_callbacks()
        vendor = self._settings.require_vendor(prepared.request.vendor)
        task, may_exist = await self._reserve(prepared, vendor, callback)
        if task.status in NOT_ANSWERED:
            task = await self.creator.create(
                task, lambda: self.request_of(prepared, callback=task.has_callback), vendor, may_exist=may_exist
            )
        return SubmittedTask(task, self._watch)

    async def request_of(self, prepared: Prepared, *, callback: bool = True, publish: bool = True) -> HttpRequest:
        """Return the request that would be sent; without `publish`, a local video is left where it is."""
        public = self._settings.require_callbacks() if callback else None
        now_s, request, id = self._clock.now_s(), prepared.request, prepared.external_task_id
        job = Job(
            request=request,
            external_task_id=id,
            image=_image_of(prepared.image),
            video=await self._video_of(prepared) if publish else prepared.video.url or str(prepared.video.path),
            callback_url=None if public is None else callback_url(public[0], public[1], request.vendor, id, now_s),
        )
        return self._settings.require_vendor(request.vendor).vendor.create(job, now_s)

    async def retry(self, external_task_id: str, *, new_id: str | None = None) -> SubmittedTask:
        """Submit a task's request again.

        A task that ended (`failed`, `abandoned`) is submitted under a new id. One whose create
        has no answer keeps its id: it is looked for, and sent only if it is surely absent.
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
        return await self.submit(request, callback=task.has_callback)

    async def task(self, external_task_id: str) -> SubmittedTask:
        """Return a task that was submitted before, to wait for it; raise TaskNotFound."""
        return SubmittedTask(await self._ledger.get(external_task_id), self._watch)

    # -- reserving ----------------------------------------------------------------------------

    async def _reserve(self, prepared: Prepared, vendor: VendorSettings, callback: bool) -> tuple[Task, bool]:
        """Return the task with this id, and whether the vendor may know it already.

        It was reserved by us just now, or by another whose right to send has ended.
        """
        now_ms = self._clock.now_ms()
        request = prepared.request
        sender = self._clock.new_id()
        blank = Task(
            external_task_id=prepared.external_task_id,
            vendor=request.vendor,
            status=TaskStatus.CREATED,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            patience=vendor.patience,
            request=prepared.asked,
            metadata=request.metadata,
            has_callback=callback,
        )
        existing = await self._ledger.get_many([prepared.external_task_id])  # needs no slot
        reserved = Reserved(existing[0], is_new=False) if existing else await self._reserve_slot(blank, sender, vendor)
        if reserved.is_new:
            return reserved.task, False
        different = differences(reserved.task, blank)
        if different:
            raise IdConflict(prepared.external_task_id, different)
        return await self._take_over(reserved.task, sender)

    async def _reserve_slot(self, blank: Task, sender: str, vendor: VendorSettings) -> Reserved:
        """Store the task once there is room for it; whoever waits, waits in line."""
        async with self._turn_of(blank.vendor):
            is_queued = False
            while True:
                mark = self._ledger.mark()
                now_ms = self._clock.now_ms()
                born = msgspec.structs.replace(blank, created_at_ms=now_ms, updated_at_ms=now_ms)
                sending = transition(born, self.creator.sending(sender), now_ms)
                assert sending is not None
                reserved = await self._ledger.reserve(sending.task, vendor.parallel)
                if reserved is not None:
                    return reserved
                if not is_queued:
                    is_queued = True
                    log.warning("submission.queued", external_task_id=blank.external_task_id, parallel=vendor.parallel)
                await self._ledger.changed(mark, None)

    async def _take_over(self, task: Task, sender: str) -> tuple[Task, bool]:
        """Return the task once its create was answered, or once the right to send it is ours."""
        is_waiting = False
        while task.status in NOT_ANSWERED:
            mark = self._ledger.mark()
            task = await self._ledger.get(task.external_task_id)
            now_ms = self._clock.now_ms()
            if may_send(task, now_ms):
                applied = await self.creator.observe(task.external_task_id, self.creator.sending(sender))
                if applied.sender == sender:
                    return applied, not task.refused
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

    async def _video_of(self, prepared: Prepared) -> str:
        video = prepared.video
        if video.path is None:
            return video.url or ""
        store = self._store()
        assert store is not None  # preflight refuses a file without one
        sha256 = prepared.asked["video"].removeprefix("sha256:")
        return await store.publish(video.path, sha256, prepared.video_format)


def _image_of(image: Medium) -> str:
    """Return an image as Kling takes it: its URL, or raw base64 without a `data:` prefix."""
    if image.url is not None:
        return image.url
    data = image.inline if image.inline is not None else (image.path.read_bytes() if image.path else b"")
    return base64.b64encode(data).decode()
