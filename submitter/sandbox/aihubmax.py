"""AIHubMax's stand-in (mock server). Its callbacks follow the documentation of its sister platform."""

import uuid
from typing import Any, ClassVar

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
        body = await self.json(request)
        model, mode = MODELS.get(str(body.get("model"))), body.get("mode", "std")
        sound = body.get("keep_original_sound", "yes")
        if model is None or mode not in ("std", "pro") or sound not in ("yes", "no"):
            raise Refusal("invalid", "model, mode or keep_original_sound is not valid")
        orientation = body.get("character_orientation", "image")
        job = await self.create(
            RenderRequest(
                model=model,
                prompt=body.get("prompt", ""),
                image=body.get("image_url"),
                video=body.get("video_url"),
                orientation=orientation,
                sound=sound == "yes",
                resolution="720p" if mode == "std" else "1080p",
                callback_url=body.get("callback_url"),
                limit_s=30 if orientation == "video" else 10,
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
            "model": "kling-v3-motion-control",
            "object": "video.generation.task",
            "progress": 0 if job.is_open else 100,
            "status": STATUS[job.status],
            "task_info": {"can_cancel": False},
            "type": "video",
        }
        if job.status == "succeeded":
            task["results"] = [{"url": self.result_url(job)}] if job.has_url else []
            task["usage"] = {"credits_used": round(job.duration_s * 10, 1)}
        if job.status == "failed":
            task["error"] = {"code": "generation_failed", "message": job.message, "type": "server_error"}
        return task
