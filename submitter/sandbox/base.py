"""What every vendor's stand-in is made of: tasks and their lives, real media, faults, callbacks.

A stand-in is written from the vendor's documentation and shares no code with the adapter that it
tests. It subclasses `Sandbox` with the vendor's routes and words; everything else is here.
"""

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, NamedTuple

import httpx
import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.faults import Dice, Faults
from submitter.sandbox.studio import Asked, MediaRules, Refusal, Studio

API_KEY = "sandbox-key"
log = structlog.get_logger("sandbox")


class Job:
    """One task of a stand-in: `submitted`, `processing`, then `succeeded` or `failed`."""

    def __init__(self, id: str, asked: Asked, wire: int) -> None:
        self.id = id
        self.asked = asked
        self.wire = wire
        self.status = "submitted"
        self.message = ""
        self.created_ms = self.updated_ms = now_ms()
        self.duration_s = 0.0
        self.result = b""
        self.has_url = True
        self.is_forgotten = False
        self.queries = 0
        self.callbacks: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether it holds a slot."""
        return self.status in ("submitted", "processing")


class Told(NamedTuple):
    """What is told of a task at one status."""

    status: str
    body: bytes


class Sandbox(ABC):
    """The state of one vendor's stand-in. A subclass gives its routes and its words."""

    name: ClassVar[str]
    retry_after_s: ClassVar[tuple[float, ...]] = ()
    """The pauses before a callback that got no 2xx is sent again, in paces of the sandbox."""

    def __init__(
        self, *, faults: Faults | None = None, pace_s: float = 1.0, slots: int = 5, secret: str | None = None
    ) -> None:
        self.faults = faults or Faults()
        self.pace_s = pace_s
        self.slots = slots
        self.secret = secret
        self.base_url = ""
        self.jobs: dict[str, Job] = {}
        self.by_external: dict[str, Job] = {}
        self.counts: Counter[str] = Counter()
        self._dice = Dice(self.faults.seed)
        self._numbers = itertools.count(time.time_ns() // 10)
        self._running: set[asyncio.Task[None]] = set()
        self._studio = Studio()
        self._client = httpx.AsyncClient(timeout=15, trust_env=False)

    # -- what a vendor's own file says ---------------------------------------------------------

    @abstractmethod
    def routes(self) -> list[Route]:
        """Return the API's routes."""

    def new_id(self) -> str:
        """Return the id of a new task."""
        return str(next(self._numbers))  # 18 digits, longer than 2^53, as Kling's are

    @abstractmethod
    def refuse(self, refusal: Refusal) -> Response:
        """Return the answer that refuses a request, in the vendor's words."""

    @abstractmethod
    def tells(self, job: Job) -> Any:
        """Return what the vendor tells by itself of a task as it is now, or None when it tells nothing."""

    def sign(self, content: bytes) -> dict[str, str]:
        """Return the headers of a callback."""
        return {"content-type": "application/json"}

    def authenticate(self, request: Request) -> None:
        """Raise the Refusal of a request that brings no right key."""
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            raise Refusal("key", "invalid api key")

    async def tell(self, job: Job, told: Told) -> None:
        """Tell one thing: by a callback, unless the vendor has another way."""
        url = job.asked.callback_url
        if not url:
            return
        for pause in (0.0, *self.retry_after_s):
            await asyncio.sleep(pause * self.pace_s)
            if 200 <= await self.post(job, told.status, url, told.body, self.sign(told.body)) < 300:
                break
        if self._dice.falls(self.faults.forge):
            await self.forge(job, told, url)

    # -- the settings that lead here -----------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """Return the environment that makes a relay use this stand-in."""
        prefix = self.name.upper()
        return {f"{prefix}_API_KEY": API_KEY, f"{prefix}_BASE_URL": self.base_url}

    def set_faults(self, faults: Faults) -> None:
        """Turn these faults on, and begin their dice anew."""
        self.faults, self._dice = faults, Dice(faults.seed)

    async def close(self) -> None:
        """Stop every task."""
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._client.aclose()
        await self._studio.close()

    # -- the door -----------------------------------------------------------------------------

    def route(self, path: str, handler: Callable[[Request], Awaitable[Any]], method: str) -> Route:
        """Return a route whose handler gives JSON, or raises Refusal."""

        async def guarded(request: Request) -> Response:
            try:
                self.authenticate(request)
                answer = await handler(request)
                return answer if isinstance(answer, Response) else JSONResponse(answer)
            except Refusal as refusal:
                self.counts[f"refused_{refusal.kind}"] += 1
                return self.refuse(refusal)

        return Route(path, guarded, methods=[method])

    def result_route(self) -> Route:
        """Return the route of the results."""

        async def result(request: Request) -> Response:
            job = self.jobs.get(request.path_params["id"])
            if job is None or not job.result:
                return JSONResponse({"code": "NoSuchKey"}, 404)
            if now_ms() - job.updated_ms > self.faults.expire_s * 1000:
                return JSONResponse({"code": "AccessDenied", "message": "Request has expired"}, 403)
            return Response(job.result, media_type="video/mp4")

        return Route("/results/{id}.mp4", result, methods=["GET"])

    def result_url(self, job: Job) -> str:
        """Return where a task's result can be fetched."""
        return f"{self.base_url}/results/{job.id}.mp4"

    async def json(self, request: Request) -> dict[str, Any]:
        """Return a request's body; raise Refusal when it is no object."""
        try:
            body = await request.json()
        except (ValueError, ClientDisconnect) as error:
            raise Refusal("invalid", "the body is not JSON") from error
        if not isinstance(body, dict):
            raise Refusal("invalid", "the body is not an object")
        return body

    def asked_about(self, id: str) -> Job:
        """Return the task that a query asks about; raise Refusal when it is not there."""
        job = self.jobs.get(id)
        if job is None or job.is_forgotten:
            raise Refusal("absent", f"task {id} not found")
        self.count_query([job])
        return job

    def count_query(self, jobs: list[Job]) -> None:
        """Note that one query asked about these tasks."""
        self.counts["queries"] += 1
        for job in jobs:
            job.queries += 1

    # -- create -------------------------------------------------------------------------------

    async def create(self, asked: Asked, rules: MediaRules, *, wire: int = 1) -> Job:
        """Check what is asked for, and begin the task; raise Refusal. An own id makes one task at the most."""
        if self.faults.refuse:
            raise Refusal(self.faults.refuse, f"no {self.faults.refuse} (a fault that is on)")
        image, video = await self._studio.check(asked, rules)
        # No await from here to the job's birth: two creates with one id must not both pass.
        if asked.external_id in self.by_external:
            raise Refusal("invalid", f"External_task_id {asked.external_id} already exists")
        if sum(job.is_open for job in self.jobs.values()) >= self.slots:
            raise Refusal("capacity", "parallel task over resource pack limit")
        job = Job(self.new_id(), asked, wire)
        self.jobs[job.id] = job
        if asked.external_id:
            self.by_external[asked.external_id] = job
        self.counts["created"] += 1
        log.info("sandbox.created", vendor=self.name, task_id=job.id, external_task_id=asked.external_id)
        running = asyncio.create_task(self._run(job, image, video))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        await self._answer_badly()
        return job

    async def _answer_badly(self) -> None:
        if self._dice.falls(self.faults.create_never):
            await asyncio.sleep(3600)
        if self._dice.falls(self.faults.create_late):
            await asyncio.sleep(self.faults.late_s)
        if self._dice.falls(self.faults.create_5xx):
            raise Refusal("outage", "internal server error")

    # -- the life of a task -------------------------------------------------------------------

    async def _run(self, job: Job, image: bytes, video: bytes) -> None:
        held: list[Told] = []
        reordered = self._dice.falls(self.faults.reorder)
        rendering = asyncio.create_task(self._studio.render(job.asked, image, video))
        await self._tell(job, held, hold=False)
        await asyncio.sleep(self.pace_s)
        self._turn(job, "processing")
        await self._tell(job, held, hold=reordered)
        await asyncio.sleep(2 * self.pace_s)
        job.result, job.duration_s = await rendering
        if not job.is_open:  # it was cancelled
            return
        if self._dice.falls(self.faults.fail):
            job.message = self.faults.fail_reason
            self._turn(job, "failed")
        else:
            job.has_url = not self._dice.falls(self.faults.no_url)
            self._turn(job, "succeeded")
        job.is_forgotten = self._dice.falls(self.faults.forget)
        await self._tell(job, held, hold=False)

    def _turn(self, job: Job, status: str) -> None:
        job.status = status
        job.updated_ms = max(now_ms(), job.updated_ms + 1)
        log.info("sandbox.task", vendor=self.name, task_id=job.id, status=status, tells=self.tells(job) is not None)

    async def _tell(self, job: Job, held: list[Told], *, hold: bool) -> None:
        """Tell of the task's present status, and of those that were held back for it."""
        value = self.tells(job)
        if value is None:
            return
        told = Told(job.status, msgspec.json.encode(value))
        if hold:
            held.append(told)
            return
        for one in (told, *held):
            if self._dice.falls(self.faults.drop):
                self.counts["callbacks_dropped"] += 1
                continue
            for _ in range(2 if self._dice.falls(self.faults.repeat) else 1):
                if self.faults.delay_s:
                    await asyncio.sleep(self.faults.delay_s)
                await self.tell(job, one)
        held.clear()

    async def forge(self, job: Job, told: Told, url: str) -> None:
        """Send a false callback to a wrong URL."""
        last = "A" if url[-1] != "A" else "B"
        false = told.body.replace(told.status.encode(), b"failed")
        await self.post(job, "forged", url[:-1] + last, false, self.sign(false))

    async def post(self, job: Job, status: str, url: str, content: bytes, headers: dict[str, str]) -> int:
        """Send one callback, note its answer, and return its status (0: none)."""
        self.counts["callbacks"] += 1
        try:
            answer = await self._client.post(url, content=content, headers=headers)
        except httpx.HTTPError as error:
            job.callbacks.append(f"{status}:{type(error).__name__}")
            return 0
        job.callbacks.append(f"{status}:{answer.status_code}")
        return answer.status_code


def now_ms() -> int:
    """Return Unix milliseconds."""
    return time.time_ns() // 1_000_000
