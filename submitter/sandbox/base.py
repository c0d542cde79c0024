"""Base class of the vendors' stand-ins (mock servers): task lifecycle, real media, callbacks, fault injection.

A stand-in is written from the vendor's documentation and shares no code with the adapter that it
tests. It subclasses `Sandbox` with the vendor's routes, statuses and error codes; the rest is here.
"""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import httpx
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.clock import Clock
from submitter.log import Logger
from submitter.sandbox.faults import Dice, Faults
from submitter.sandbox.studio import MediaRules, Refusal, RenderRequest, Studio

API_KEY = "sandbox-key"
Body = TypeVar("Body", bound=msgspec.Struct)
log = Logger("sandbox")


class Job:
    """One task of a stand-in: `submitted`, `processing`, then `succeeded` or `failed`.

    `api_version` is the generation of the API that created it. `callbacks` lists the callbacks that
    were sent, each as `status:HTTP status` or `status:error`.
    """

    def __init__(self, id: str, request: RenderRequest, api_version: int, created_ms: int) -> None:
        self.id = id
        self.request = request
        self.api_version = api_version
        self.status = "submitted"
        self.message = ""
        self.created_ms = self.updated_ms = created_ms
        self.duration_s = 0.0
        self.result = b""
        self.has_url = True
        self.is_forgotten = False
        self.queries = 0
        self.callbacks: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether it has not ended, and so occupies a slot."""
        return self.status in ("submitted", "processing")


class Notification(NamedTuple):
    """A callback (or stream event) to send: the task's status at that time, and the encoded body."""

    status: str
    body: bytes


class Sandbox(ABC):
    """One vendor's stand-in: its tasks, its faults and its counts.

    A subclass defines `name`, `routes`, `refuse` and `callback_body`, and overrides the rest where
    its vendor differs.
    """

    name: ClassVar[str]
    retry_after_s: ClassVar[tuple[float, ...]] = ()
    """Backoff of a callback that was not answered 2xx: the pause before each retry, in multiples of `pace_s`."""

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        pace_s: float = 1.0,
        slots: int = 5,
        secret: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.faults = faults or Faults()
        self.pace_s = pace_s
        self.slots = slots
        self.secret = secret
        self.base_url = ""
        self.jobs: dict[str, Job] = {}
        self.by_external_id: dict[str, Job] = {}
        self.counts: Counter[str] = Counter()
        self._dice = Dice(self.faults.seed)
        self._numbers = itertools.count(self.clock.now_ms() * 100_000)
        self._running: set[asyncio.Task[None]] = set()
        self._studio = Studio()
        self._client = httpx.AsyncClient(timeout=15, trust_env=False)

    # -- the vendor's API: to implement or override --------------------------------------------

    @abstractmethod
    def routes(self) -> list[Route]:
        """Return the routes of the vendor's API."""

    def new_id(self) -> str:
        """Return the id of a new task."""
        return str(next(self._numbers))  # 18 digits, more than 2^53, like Kling's ids

    @abstractmethod
    def refuse(self, refusal: Refusal) -> Response:
        """Return the vendor's error response for a refusal."""

    @abstractmethod
    def callback_body(self, job: Job) -> Any:
        """Return the body of a callback (or stream event) about the task now, or None when the vendor sends none."""

    def sign(self, content: bytes) -> dict[str, str]:
        """Return the headers of a callback with this body, with a signature where the vendor signs."""
        return {"content-type": "application/json"}

    def authenticate(self, request: Request) -> None:
        """Raise Refusal unless the request has the right API key."""
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            raise Refusal("key", "invalid api key")

    async def notify(self, job: Job, notification: Notification) -> None:
        """Send a callback, with retries. A vendor with an event stream overrides this."""
        url = job.request.callback_url
        if not url:
            return
        body = notification.body
        for pause in (0.0, *self.retry_after_s):
            await self.clock.sleep(pause * self.pace_s)
            if 200 <= await self.post(job, notification.status, url, body, self.sign(body)) < 300:
                break
        if self._dice.happens(self.faults.forge):
            await self.send_forged(job, notification, url)

    # -- settings ------------------------------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """Return the environment variables that point kling-relay to this stand-in."""
        prefix = self.name.upper()
        return {f"{prefix}_API_KEY": API_KEY, f"{prefix}_BASE_URL": self.base_url}

    def set_faults(self, faults: Faults) -> None:
        """Replace the active faults, and reset the random draws to their seed."""
        self.faults, self._dice = faults, Dice(faults.seed)

    async def close(self) -> None:
        """Cancel every running task, and close the connections."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.aclose()
        await self._studio.close()

    # -- requests -----------------------------------------------------------------------------

    def route(self, path: str, handler: Callable[[Request], Awaitable[Any]], method: str) -> Route:
        """Return an authenticated route; its handler returns JSON or a Response, or raises Refusal."""

        async def guarded(request: Request) -> Response:
            try:
                self.authenticate(request)
                answer = await handler(request)
                return answer if isinstance(answer, Response) else JSONResponse(answer)
            except Refusal as refusal:
                return self._refused(refusal)

        return Route(path, guarded, methods=[method])

    def _refused(self, refusal: Refusal) -> Response:
        self.counts[f"refused_{refusal.kind}"] += 1
        return self.refuse(refusal)

    def fallback_route(self) -> Route:
        """Return the route of every other path and method: an error in the vendor's form."""

        async def unknown(request: Request) -> Response:
            path = f"/{request.path_params['path']}"
            others = [route for route in self.routes() if route.path_regex.match(path)]
            return self._refused(self.unknown(request.method, path, is_path_known=bool(others)))

        return Route("/{path:path}", unknown, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])

    def unknown(self, method: str, path: str, *, is_path_known: bool) -> Refusal:
        """Return the refusal of an unknown path, or of a known path's unknown method."""
        return Refusal("absent", f"{method} {path} is not part of this API")

    def result_route(self) -> Route:
        """Return the route that serves result videos."""

        async def result(request: Request) -> Response:
            job = self.jobs.get(request.path_params["id"])
            if job is None or not job.result:
                return JSONResponse({"code": "NoSuchKey"}, 404)
            if self.clock.now_ms() - job.updated_ms > self.faults.expire_s * 1000:
                return JSONResponse({"code": "AccessDenied", "message": "Request has expired"}, 403)
            return Response(job.result, media_type="video/mp4")

        return Route("/results/{id}.mp4", result, methods=["GET"])

    def result_url(self, job: Job) -> str:
        """Return the URL of a task's result video."""
        return f"{self.base_url}/results/{job.id}.mp4"

    async def body(self, request: Request, kind: type[Body]) -> Body:
        """Return a request's JSON body as a struct; raise Refusal, which names the field, for any other shape."""
        try:
            return msgspec.json.decode(await request.body() or b"{}", type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, ClientDisconnect, RecursionError) as error:
            raise Refusal("invalid", str(error)) from error

    def queried_job(self, id: str) -> Job:
        """Return the task of a query, and count the query; raise Refusal when there is no such task."""
        job = self.jobs.get(id)
        if job is None or job.is_forgotten:
            raise Refusal("absent", f"task {id} not found")
        self.count_query([job])
        return job

    def count_query(self, jobs: list[Job]) -> None:
        """Count one query of these tasks."""
        self.counts["queries"] += 1
        for job in jobs:
            job.queries += 1

    # -- create -------------------------------------------------------------------------------

    async def create(
        self, request: RenderRequest, rules: MediaRules, *, api_version: int = 1, checks_late: bool = False
    ) -> Job:
        """Validate a create request and start its task; raise Refusal. An external id creates at most one task.

        With `checks_late`, media are validated when the task runs: it fails then.
        """
        if self.faults.refuse:
            raise Refusal(self.faults.refuse, f"no {self.faults.refuse} (injected fault)")
        checked = None if checks_late else await self._studio.check(request, rules)
        # No await from this check until the job is registered: of two creates with one id only one may pass.
        if request.external_id in self.by_external_id:
            raise Refusal("invalid", f"External_task_id {request.external_id} already exists")
        if sum(job.is_open for job in self.jobs.values()) >= self.slots:
            raise Refusal("capacity", "parallel task over resource pack limit")
        job = Job(self.new_id(), request, api_version, self.clock.now_ms())
        self.jobs[job.id] = job
        if request.external_id:
            self.by_external_id[request.external_id] = job
        self.counts["created"] += 1
        log.info("sandbox.created", vendor=self.name, task_id=job.id, external_task_id=request.external_id)
        if self._dice.happens(self.faults.create_failed):
            job.status, job.message = "failed", self.faults.fail_reason
            return job
        running = asyncio.create_task(self._run(job, rules, checked))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        await self._inject_create_faults()
        return job

    async def _inject_create_faults(self) -> None:
        """Delay or lose the answer to a create that was accepted."""
        if self._dice.happens(self.faults.create_never):
            await self.clock.sleep(3600)
        if self._dice.happens(self.faults.create_late):
            await self.clock.sleep(self.faults.late_s)
        if self._dice.happens(self.faults.create_5xx):
            raise Refusal("outage", "internal server error")

    # -- task lifecycle -----------------------------------------------------------------------

    async def _run(self, job: Job, rules: MediaRules, checked: tuple[bytes, bytes] | None) -> None:
        held: list[Notification] = []
        reordered = self._dice.happens(self.faults.reorder)
        rendering = asyncio.create_task(self._render(job, rules, checked))
        await self._notify(job, held, hold=False)
        await self.clock.sleep(self.pace_s)
        self._set_status(job, "processing")
        await self._notify(job, held, hold=reordered)
        await self.clock.sleep(2 * self.pace_s)
        unusable = await rendering
        if not job.is_open:  # cancelled meanwhile
            return
        if unusable is not None:
            job.message = unusable
            self._set_status(job, "failed")
        elif self._dice.happens(self.faults.fail):
            job.message = self.faults.fail_reason
            self._set_status(job, "failed")
        else:
            job.has_url = not self._dice.happens(self.faults.no_url)
            self._set_status(job, "succeeded")
        job.is_forgotten = self._dice.happens(self.faults.forget)
        await self._notify(job, held, hold=False)

    async def _render(self, job: Job, rules: MediaRules, checked: tuple[bytes, bytes] | None) -> str | None:
        """Render a task's result; return why its media cannot be used, or None."""
        try:
            image, video = checked or await self._studio.check(job.request, rules)
        except Refusal as refusal:
            return refusal.message
        job.result, job.duration_s = await self._studio.render(job.request, image, video)
        return None

    def _set_status(self, job: Job, status: str) -> None:
        job.status = status
        job.updated_ms = max(self.clock.now_ms(), job.updated_ms + 1)
        notifies = self.callback_body(job) is not None
        log.info("sandbox.task", vendor=self.name, task_id=job.id, status=status, notifies=notifies)

    async def _notify(self, job: Job, held: list[Notification], *, hold: bool) -> None:
        """Send the notification of the current status, then the held ones; with `hold`, hold it back instead."""
        body = self.callback_body(job)
        if body is None:
            return
        current = Notification(job.status, msgspec.json.encode(body))
        if hold:
            held.append(current)
            return
        for notification in (current, *held):
            if self._dice.happens(self.faults.drop):
                self.counts["callbacks_dropped"] += 1
                continue
            for _ in range(2 if self._dice.happens(self.faults.repeat) else 1):
                if self.faults.delay_s:
                    await self.clock.sleep(self.faults.delay_s)
                await self.notify(job, notification)
        held.clear()

    async def send_forged(self, job: Job, notification: Notification, url: str) -> None:
        """Send a forged callback to a URL with a wrong token."""
        last = "A" if url[-1] != "A" else "B"
        forged = notification.body.replace(notification.status.encode(), b"failed")
        await self.post(job, "forged", url[:-1] + last, forged, self.sign(forged))

    async def post(self, job: Job, status: str, url: str, content: bytes, headers: dict[str, str]) -> int:
        """Send one callback, record its outcome, and return the HTTP status (0: no response)."""
        self.counts["callbacks"] += 1
        try:
            answer = await self._client.post(url, content=content, headers=headers)
        except httpx.HTTPError as error:
            job.callbacks.append(f"{status}:{type(error).__name__}")
            return 0
        job.callbacks.append(f"{status}:{answer.status_code}")
        return answer.status_code
