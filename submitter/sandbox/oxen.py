"""Oxen.ai's stand-in (mock server): its generation queue and its event stream (Server-Sent Events)."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from submitter.sandbox.base import Job, Notification, Sandbox
from submitter.sandbox.studio import MediaRules, Refusal, RenderRequest

MODEL = "kling-video-v3-pro-motion-control"
STATUS = {"submitted": "queued", "processing": "processing", "succeeded": "succeeded", "failed": "failed"}
ERRORS = {
    "key": 401,
    "invalid": 400,
    "absent": 404,
    "balance": 402,
    "permission": 403,
    "capacity": 429,
    "rate": 429,
    "maintenance": 503,
    "outage": 500,
}
RULES = MediaRules(image_mb=10, image_inline=False)


class Create(msgspec.Struct):
    """The body of a request to the queue. Media are checked only when the generation runs."""

    model: Literal["kling-video-v3-pro-motion-control"]
    prompt: Annotated[str, msgspec.Meta(min_length=1)]
    input_image: str
    input_video: str
    character_orientation: Literal["image", "video"] = "video"
    keep_original_sound: bool = True
    elements: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=1)] = msgspec.field(default_factory=list)
    num_generations: Literal[1] = 1
    target_namespace: str | None = None


class OxenSandbox(Sandbox):
    """Oxen.ai's queue, queries, cancellation and event stream. `keep_alive_s`: seconds between keep-alives."""

    name: ClassVar[str] = "oxen"
    keep_alive_s = 15.0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.subscribers: set[asyncio.Queue[bytes | None]] = set()

    def routes(self) -> list[Route]:
        return [
            self.route("/api/ai/queue", self._create, "POST"),
            self.route("/api/ai/queue", self._list, "GET"),
            self.route("/api/ai/queue/{id}", self._query, "GET"),
            self.route("/api/ai/queue/{id}", self._cancel, "DELETE"),
            self.route("/api/events", self._events, "GET"),
        ]

    def new_id(self) -> str:
        return str(uuid.uuid4())

    def refuse(self, refusal: Refusal) -> Response:
        error = {"error": {"title": refusal.kind, "detail": refusal.message}, "status": "error"}
        return JSONResponse(error, ERRORS[refusal.kind])

    async def close(self) -> None:
        for queue in self.subscribers:
            queue.put_nowait(None)
        await super().close()

    def callback_body(self, job: Job) -> Any:
        """Return the data of a stream event once the task has ended; no other status is reported."""
        if job.is_open:
            return None
        event = {"generation_id": job.id, "status": job.status, "media_type": "video", "model": MODEL}
        if job.status == "failed":
            return event | {"error": job.message}
        return event | ({"url": self.result_url(job)} if job.has_url else {})

    async def notify(self, job: Job, notification: Notification) -> None:
        """Send an event to the current subscribers. Later ones do not get it: the stream has no replay."""
        self.counts["callbacks"] += 1
        job.callbacks.append(f"{notification.status}:{'200' if self.subscribers else 'no subscriber'}")
        for queue in self.subscribers:
            queue.put_nowait(b"event: media_generation_completed\ndata: " + notification.body + b"\n\n")
            if self._dice.happens(self.faults.hang_up):
                queue.put_nowait(None)

    async def _create(self, request: Request) -> dict[str, Any]:
        body = await self.body(request, Create)
        if body.elements and body.character_orientation != "video":
            raise Refusal("invalid", "elements need character_orientation video")
        job = await self.create(
            RenderRequest(
                prompt=body.prompt,
                image=body.input_image,
                video=body.input_video,
                orientation=body.character_orientation,
                sound=body.keep_original_sound,
                resolution="1080p",
                limit_s=30 if body.character_orientation == "video" else 10,
            ),
            RULES,
            checks_late=True,
        )
        return {"generations": [self._generation(job)]}

    async def _list(self, request: Request) -> dict[str, Any]:
        """List the active generations; an ended one is queried by its id."""
        found = [job for job in self.jobs.values() if job.is_open]
        self.count_query(found)
        return {"count": len(found), "generations": [self._generation(job) for job in found]}

    async def _query(self, request: Request) -> dict[str, Any]:
        return self._generation(self.queried_job(request.path_params["id"]))

    async def _cancel(self, request: Request) -> dict[str, Any]:
        """Cancel a task. The stream has no event for it."""
        job = self.queried_job(request.path_params["id"])
        if job.is_open:
            job.status = "cancelled"
        return self._generation(job)

    def _generation(self, job: Job) -> dict[str, Any]:
        return {
            "generation_id": job.id,
            "status": STATUS.get(job.status, job.status),
            "result_url": self.result_url(job) if job.status == "succeeded" and job.has_url else None,
            "error_message": job.message or None,
            "created_at": job.created_ms // 1000,
        }

    async def _events(self, request: Request) -> Response:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def stream() -> AsyncIterator[bytes]:
            self.subscribers.add(queue)
            self.counts["streams"] += 1
            try:
                yield b": welcome\n\n"
                while True:
                    event: bytes | None = b": keep-alive\n\n"
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self.keep_alive_s):
                            event = await queue.get()
                    if event is None:
                        return
                    yield event
            finally:
                self.subscribers.discard(queue)

        return StreamingResponse(stream(), media_type="text/event-stream")
