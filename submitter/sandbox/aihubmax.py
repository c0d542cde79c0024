"""AIHubMax's stand-in (mock server). Its callbacks follow the documentation of its sister platform."""

import uuid
from typing import Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.base import Job, Sandbox
from submitter.sandbox.studio import MediaRules, Refusal, RenderRequest

STATUS = {"submitted": "pending", "processing": "processing", "succeeded": "completed", "failed": "failed"}
ERRORS = {
    "key": (401, "authentication_error"),
    "invalid": (400, "invalid_request_error"),
    "absent": (404, "invalid_request_error"),
    "balance": (402, "insufficient_quota"),
    "permission": (403, "permission_error"),
    "capacity": (429, "rate_limit_error"),
    "rate": (429, "rate_limit_error"),
    "maintenance": (503, "service_unavailable"),
    "outage": (500, "server_error"),
}
MODELS = {"kling-v3-motion-control": "3.0", "kling-v2-6-motion-control": "2.6"}
RULES = MediaRules(image_mb=10, image_inline=False)
PROGRESS = {"submitted": 0, "processing": 50, "succeeded": 100, "failed": 50}


class Create(msgspec.Struct):
    """The body of a create."""

    model: Literal["kling-v3-motion-control", "kling-v2-6-motion-control"]
    image_url: str
    video_url: str
    mode: Literal["std", "pro"] = "std"
    prompt: str = ""
    character_orientation: Literal["image", "video"] = "image"
    keep_original_sound: Literal["yes", "no"] = "yes"
    callback_url: str | None = None


class AIHubMaxSandbox(Sandbox):
    """AIHubMax's video generation API, with its task queries and callbacks."""

    name: ClassVar[str] = "aihubmax"
    retry_after_s: ClassVar[tuple[float, ...]] = (1, 2, 4)

    def routes(self) -> list[Route]:
        return [
            self.route("/v1/videos/generations", self._create, "POST"),
            self.route("/v1/tasks/{id}", self._query, "GET"),
        ]

    def new_id(self) -> str:
        return f"task-unified-{uuid.uuid4().hex[:18]}"

    def refuse(self, refusal: Refusal) -> Response:
        status, kind = ERRORS[refusal.kind]
        return JSONResponse({"error": {"message": refusal.message, "type": kind}}, status)

    def callback_body(self, job: Job) -> Any:
        """Return the task once it has ended; no other status is reported."""
        return None if job.is_open else self._task(job)

    async def _create(self, request: Request) -> dict[str, Any]:
        body = await self.body(request, Create)
        job = await self.create(
            RenderRequest(
                model=MODELS[body.model],
                prompt=body.prompt,
                image=body.image_url,
                video=body.video_url,
                orientation=body.character_orientation,
                sound=body.keep_original_sound == "yes",
                resolution="720p" if body.mode == "std" else "1080p",
                callback_url=body.callback_url,
                limit_s=30 if body.character_orientation == "video" else 10,
            ),
            RULES,
        )
        return self._task(job)

    async def _query(self, request: Request) -> dict[str, Any]:
        return self._task(self.queried_job(request.path_params["id"]))

    def _task(self, job: Job) -> dict[str, Any]:
        task: dict[str, Any] = {
            "created": job.created_ms // 1000,
            "id": job.id,
            "model": next(name for name, model in MODELS.items() if model == job.request.model),
            "object": "video.generation.task",
            "progress": PROGRESS[job.status],
            "status": STATUS[job.status],
            "task_info": {"can_cancel": False},
            "type": "video",
            "usage": {"credits_reserved": job.request.limit_s * 4},
        }
        if job.status == "succeeded":
            task["results"] = [{"url": self.result_url(job)}] if job.has_url else []
        if job.status == "failed":
            task["error"] = {"code": "generation_failed", "message": job.message, "type": "server_error"}
        return task
