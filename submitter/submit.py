"""Submits tasks: reserve, create, apply. Decides nothing itself.

The row exists before the request leaves. A create that got no clear answer is looked for under
its external_task_id, and sent again only when the vendor surely does not have it. The right to
send is a lease in the row, so that a submitter which died is taken over from and one that lives
is waited for: killing this process at any instant and asking again makes no second task.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

import msgspec
import structlog

from submitter.callback_url import callback_url
from submitter.clock import Clock
from submitter.egress import guarded_client
from submitter.errors import (
    IdConflict,
    InvalidRequest,
    Problem,
    SubmissionUnknown,
    Unintelligible,
    VendorRefused,
)
from submitter.http import NotSent, Unanswered, VendorHttp
from submitter.ledger import Ledger, open_ledger
from submitter.media import Medium, Probe, digest, open_medium, probe
from submitter.media_store import MediaStore, open_media_store
from submitter.request import MotionControl, check_media, check_request
from submitter.schedule import LOOK_FOR_S, OUTAGE_BACKOFF, SLOT_BACKOFF
from submitter.settings import Settings, VendorSettings, load_settings
from submitter.task import (
    NOT_ANSWERED,
    SETTLED,
    Observation,
    OutcomeUnknown,
    Refused,
    Sending,
    Task,
    TaskStatus,
    may_send,
    transition,
)
from submitter.vendors.base import HttpRequest, Job

SENDING_LEASE_S = 15.0
CONNECT_TRIES = 5
SEND_TRIES = 3

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


class SubmittedTask:
    """A task that the vendor has: as it was when it was submitted, and a way to wait for its end."""

    def __init__(self, task: Task, watch: "_Watch") -> None:
        self.task = task
        self._watch = watch

    @property
    def external_task_id(self) -> str:
        """The id that the task has here and at the vendor."""
        return self.task.external_task_id

    async def result(self, timeout: float | None = None) -> Task:
        """Wait until the task is `succeed`, `failed` or `abandoned`, and return it.

        Waits for the callback through the ledger and asks the vendor nothing. Raises
        TimeoutError after `timeout` seconds; the task goes on.
        """
        if self.task.status in SETTLED:
            return self.task
        async with asyncio.timeout(timeout):
            return await self._watch.settled(self.external_task_id)


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
        self._http = http or VendorHttp()
        self._media_store = media_store
        self._look_for_s = look_for_s
        self._lease_ms = int(sending_lease_s * 1000)
        self._media = guarded_client(settings.allow_hosts, timeout_s=15)
        self._turn: dict[str, asyncio.Lock] = {}  # whose turn it is to reserve
        self._line: dict[str, asyncio.Lock] = {}  # who, told that all slots are taken, asks next
        self._watch = _Watch(ledger)

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
        await self._http.close()
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
            asked=await asyncio.to_thread(_asked, request, image, video),
            warnings=tuple(found.warning for found in probes.values() if found.warning),
        )

    async def submit_prepared(self, prepared: Prepared, *, callback: bool = True) -> SubmittedTask:
        """Do as `submit` does with a request that was prepared."""
        if callback:
            self._settings.require_callbacks()
        vendor = self._settings.require_vendor(prepared.request.vendor)
        task, may_exist = await self._reserve(prepared, vendor, callback)
        if task.status in NOT_ANSWERED:
            task = await self._create(task, prepared, vendor, may_exist=may_exist)
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
            request = _request_again(task, new_id or self._clock.new_id(), metadata)
        elif task.status in NOT_ANSWERED:
            request = _request_again(task, external_task_id, task.metadata)
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
        async with self._turn_of(request.vendor):  # whoever waits for a slot waits in line
            while True:
                mark = self._ledger.mark()
                now_ms = self._clock.now_ms()
                blank = msgspec.structs.replace(blank, created_at_ms=now_ms, updated_at_ms=now_ms)
                sending = transition(blank, self._sending(sender), now_ms)
                assert sending is not None
                reserved = await self._ledger.reserve(sending.task, vendor.parallel)
                if reserved is not None:
                    break
                log.info("submission.queued", external_task_id=prepared.external_task_id, parallel=vendor.parallel)
                await self._ledger.changed(mark, None)
        if reserved.is_new:
            return reserved.task, False
        different = _differences(reserved.task, blank)
        if different:
            raise IdConflict(prepared.external_task_id, different)
        return await self._take_over(reserved.task, sender)

    async def _take_over(self, task: Task, sender: str) -> tuple[Task, bool]:
        """Return the task once its create was answered, or once the right to send it is ours."""
        while task.status in NOT_ANSWERED:
            mark = self._ledger.mark()
            task = await self._ledger.get(task.external_task_id)
            now_ms = self._clock.now_ms()
            if may_send(task, now_ms):
                applied = await self._observe(task.external_task_id, self._sending(sender))
                if applied.sender == sender:
                    return applied, not task.refused
                task = applied
            else:
                log.info("submission.waiting", external_task_id=task.external_task_id, until_ms=task.sending_until_ms)
                await self._ledger.changed(mark, max(0.05, (task.sending_until_ms - now_ms) / 1000))
        return task, True

    def _sending(self, sender: str) -> Sending:
        return Sending(sender, self._clock.now_ms() + self._lease_ms)

    def _turn_of(self, vendor: str) -> asyncio.Lock:
        return self._turn.setdefault(vendor, asyncio.Lock())

    # -- creating -----------------------------------------------------------------------------

    async def _create(self, task: Task, prepared: Prepared, vendor: VendorSettings, *, may_exist: bool) -> Task:
        """Send the create request until its outcome is known, and return the task that it made."""
        async with self._keep_sending(task):
            if may_exist:
                found = await self._look(task, vendor)
                if found is not None:
                    return found
            for _ in range(SEND_TRIES):
                created = await self._send(task, prepared, vendor)
                if created is not None:
                    return created
                found = await self._look(task, vendor)
                if found is not None:
                    return found
            return await self._unknown(
                task, f"{task.vendor} answered none of {SEND_TRIES} creates, and has no such task"
            )

    async def _send(self, task: Task, prepared: Prepared, vendor: VendorSettings) -> Task | None:
        """Return the created task, or None when nobody knows whether there is one; wait out what passes."""
        attempt = unreached = expired = 0
        line = self._line.setdefault(task.vendor, asyncio.Lock())
        async with AsyncExitStack() as place:
            in_line = line.locked()  # others were told to come back later: nobody overtakes them
            if in_line:
                await place.enter_async_context(line)
            while True:
                outcome = await self._http.run(await self._request_or_refusal(task, prepared), fresh=True)
                match outcome:
                    case Unanswered(reason):
                        log.warning("create.unanswered", external_task_id=task.external_task_id, reason=reason)
                        return None
                    case NotSent(reason):
                        unreached += 1
                        refusal = _unreachable(task.vendor, reason, retryable=unreached < CONNECT_TRIES)
                    case _:
                        try:
                            report = vendor.vendor.read_create(outcome, self._clock.now_ms())
                        except SubmissionUnknown as unknown:
                            log.warning("create.ambiguous", external_task_id=task.external_task_id, reason=str(unknown))
                            return None
                        except VendorRefused as error:
                            refusal = error
                            expired += error.http_status == 401
                        else:
                            return await self._observe(task.external_task_id, report)
                if not refusal.retryable or expired > 1:
                    await self._observe(task.external_task_id, Refused(str(refusal)))
                    raise refusal
                if refusal.http_status == 429 and not in_line:
                    in_line = True
                    await place.enter_async_context(line)
                backoff = SLOT_BACKOFF if refusal.http_status == 429 else OUTAGE_BACKOFF
                delay_s = refusal.retry_after_s or backoff.delay_s(attempt, self._clock.chance())
                attempt += 1
                log.info("create.waits", external_task_id=task.external_task_id, delay_s=delay_s, reason=str(refusal))
                await self._slot_or_delay(task.vendor, delay_s)

    async def _request_or_refusal(self, task: Task, prepared: Prepared) -> HttpRequest:
        try:
            return await self.request_of(prepared, callback=task.has_callback)
        except Exception as error:  # media that could not be read or uploaded: nothing was sent
            await self._observe(task.external_task_id, Refused(f"it was not sent: {error}"))
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
                outcome = await self._http.run(query.request)
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
                    return await self._observe(task.external_task_id, report)
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
        observed = await self._observe(task.external_task_id, OutcomeUnknown(reason))
        if observed.status not in NOT_ANSWERED:
            return observed
        raise SubmissionUnknown(
            f"{task.external_task_id}: {reason}. It may exist and be billed, so it is not sent again: its callback, "
            f"or a poll, settles it; or run the same command with --external-task-id {task.external_task_id} later"
        )

    async def _observe(self, external_task_id: str, observation: Observation) -> Task:
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
                await self._observe(task.external_task_id, self._sending(task.sender or ""))

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()
            with suppress(asyncio.CancelledError):
                await renewing

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
        video, store = prepared.video, self._store()
        if video.path is None or store is None:
            return video.url or ""
        sha256 = prepared.asked["video"].removeprefix("sha256:")
        return await store.publish(video.path, sha256, prepared.video_format)


class _Watch:
    """Waits for many tasks with one question to the ledger at each of its changes."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[str, list[asyncio.Future[Task]]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def settled(self, external_task_id: str) -> Task:
        """Return the task once it is settled; raise TaskNotFound."""
        await self._ledger.get(external_task_id)
        future: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(external_task_id, []).append(future)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                mark = self._ledger.mark()
                self._settle(await self._ledger.get_many(list(self._waiting)))
                if self._waiting:
                    await self._ledger.changed(mark, 1.0)
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            for futures in self._waiting.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            self._waiting.clear()

    def _settle(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            futures = self._waiting[task.external_task_id]
            if task.status in SETTLED:
                for future in futures:
                    if not future.done():
                        future.set_result(task)
            if task.status in SETTLED or all(future.done() for future in futures):
                del self._waiting[task.external_task_id]

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop


def _unreachable(vendor: str, reason: str, *, retryable: bool) -> VendorRefused:
    return VendorRefused(
        vendor,
        http_status=0,
        code="unreachable",
        message=reason,
        remedy="Nothing was sent. Check the network and the base URL, and submit again.",
        retryable=retryable,
    )


# What is stored of a request, so that it can be compared and repeated.
_WORDS = ("character_orientation", "mode", "model", "prompt", "negative_prompt")


def _asked(request: MotionControl, image: Medium, video: Medium) -> dict[str, str]:
    asked = {name: str(getattr(request, name)) for name in _WORDS}
    asked |= {
        "keep_original_sound": "yes" if request.keep_original_sound else "no",
        "element_id": request.element_id or "",
        "watermark": "yes" if request.watermark else "no",
    }
    for medium in (image, video):
        asked[medium.field] = digest(medium)
        if medium.path is not None:
            asked[f"{medium.field}_file"] = str(medium.path)
    return asked


def _differences(stored: Task, asked: Task) -> list[str]:
    names = {*stored.request, *asked.request} - {"image_file", "video_file"}
    different = sorted(name for name in names if stored.request.get(name, "") != asked.request.get(name, ""))
    for name in ("vendor", "metadata"):
        if getattr(stored, name) != getattr(asked, name):
            different.append(name)
    return different


def _request_again(task: Task, external_task_id: str, metadata: dict[str, str]) -> MotionControl:
    asked = task.request
    media: dict[str, Any] = {}
    for field in ("image", "video"):
        media[field] = asked.get(f"{field}_file") or asked.get(field, "")
        if media[field].startswith("sha256:"):
            raise InvalidRequest(
                [Problem(field, "given as base64", "a URL or a file", "It was not kept: submit the request again.")]
            )
    return MotionControl(
        **media,
        **{name: asked[name] for name in _WORDS},
        keep_original_sound=asked["keep_original_sound"] == "yes",
        element_id=asked["element_id"] or None,
        watermark=asked["watermark"] == "yes",
        external_task_id=external_task_id,
        metadata=metadata,
        vendor=task.vendor,
    )


def _image_of(image: Medium) -> str:
    """Return an image as Kling takes it: its URL, or raw base64 without a `data:` prefix."""
    if image.url is not None:
        return image.url
    data = image.inline if image.inline is not None else (image.path.read_bytes() if image.path else b"")
    return base64.b64encode(data).decode()
