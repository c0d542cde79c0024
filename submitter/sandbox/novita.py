"""The stand-ins (mock servers) of Novita and of Highway, which is the same API under another name."""

import uuid
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.base import Job, Sandbox
from submitter.sandbox.studio import MediaRules, Refusal, RenderRequest

STATUS = {
    "submitted": "TASK_STATUS_QUEUED",
    "processing": "TASK_STATUS_PROCESSING",
    "succeeded": "TASK_STATUS_SUCCEED",
    "failed": "TASK_STATUS_FAILED",
}
ERRORS = {
    "key": (401, "INVALID_API_KEY"),
    "invalid": (400, "INVALID_REQUEST_BODY"),
    "absent": (404, "TASK_NOT_FOUND"),
    "balance": (403, "BILLING_BALANCE_NOT_ENOUGH"),
    "permission": (403, "API_NOT_ALLOWED"),
    "capacity": (429, "RATE_LIMIT_EXCEEDED"),
    "rate": (429, "RATE_LIMIT_EXCEEDED"),
    "maintenance": (503, "SERVICE_UNAVAILABLE"),
    "outage": (500, "CREATE_TASK_FAILED"),
}
RULES = MediaRules(
    image_mb=10, video_mb=10, video_min=300, video_max=None, video_aspect=2.5, longest_by_image_s=30
)  # fmt: skip


class NovitaSandbox(Sandbox):
    """Novita's asynchronous API, with its task queries and webhooks."""

    name: ClassVar[str] = "novita"
    retry_after_s: ClassVar[tuple[float, ...]] = (1, 2, 4, 8, 16)

    def routes(self) -> list[Route]:
        return [
            self.route("/v3/async/kling-v3.0-motion-control", self._create, "POST"),
            self.route("/v3/async/task-result", self._result, "GET"),
        ]

    def new_id(self) -> str:
        return str(uuid.uuid4())

    def refuse(self, refusal: Refusal) -> Response:
        status, reason = ERRORS[refusal.kind]
        return JSONResponse({"code": status, "reason": reason, "message": refusal.message}, status)

    def callback_body(self, job: Job) -> Any:
        """Return the webhook's body once the task has ended; no other status is reported."""
        return None if job.is_open else {"event_type": "ASYNC_TASK_RESULT", "payload": self._result_of(job)}

    async def _create(self, request: Request) -> dict[str, Any]:
        body = await self.json(request)
        mode = {"kling-v3-0-std": "720p", "kling-v3-0-pro": "1080p"}.get(body.get("model_name"))  # type: ignore[arg-type]
        if mode is None:
            raise Refusal("invalid", "model_name is not valid")
        if not isinstance(body.get("keep_original_sound", True), bool):
            raise Refusal("invalid", "keep_original_sound must be a boolean")
        if len(str(body.get("negative_prompt", ""))) > 2500:
            raise Refusal("invalid", "negative_prompt is longer than 2500 characters")
        orientation = body.get("character_orientation")
        job = await self.create(
            RenderRequest(
                prompt=body.get("prompt", ""),
                image=body.get("image"),
                video=body.get("video"),
                orientation=orientation,
                sound=body.get("keep_original_sound", True),
                resolution=mode,
                callback_url=((body.get("extra") or {}).get("webhook") or {}).get("url"),
                limit_s=5 if orientation == "image" else 30,
            ),
            RULES,
        )
        return {"task_id": job.id}

    async def _result(self, request: Request) -> dict[str, Any]:
        return self._result_of(self.queried_job(request.query_params.get("task_id", "")))

    def _result_of(self, job: Job) -> dict[str, Any]:
        webhook = {"webhook": {"url": job.request.callback_url}} if job.request.callback_url else {}
        videos = []
        if job.status == "succeeded" and job.has_url:
            ttl = str(int(self.faults.expire_s))
            videos = [{"video_url": self.result_url(job), "video_url_ttl": ttl, "video_type": "mp4"}]
        return {
            "extra": webhook,  # echoes the request
            "task": {
                "task_id": job.id,
                "task_type": "KLING_V3_MOTION_CONTROL",
                "status": STATUS[job.status],
                "reason": job.message,
                "eta": 0,
                "progress_percent": 0 if job.is_open else 100,
            },
            "images": [],
            "videos": videos,
            "audios": [],
        }


class HighwaySandbox(NovitaSandbox):
    """Novita's API under the name Highway."""

    name: ClassVar[str] = "highway"
