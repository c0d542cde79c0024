"""The stand-ins (mock servers) of Novita and of Highway, which is the same API under another name."""

import uuid
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from submitter.sandbox.base import Job, Notification, Sandbox
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
RULES = MediaRules(image_mb=10, video_mb=10, video_min=300, video_max=None, longest_by_image_s=30)
EVENT = "ASYNC_TASK_RESULT"


class TestMode(msgspec.Struct):
    """A request for a mock event with this status, instead of a task."""

    enabled: bool = False
    return_task_status: Literal[
        "TASK_STATUS_QUEUED", "TASK_STATUS_PROCESSING", "TASK_STATUS_SUCCEED", "TASK_STATUS_FAILED"
    ] = "TASK_STATUS_SUCCEED"


class Webhook(msgspec.Struct):
    """Where to send the event of the task's end."""

    url: str | None = None
    test_mode: TestMode | None = None


class Extra(msgspec.Struct):
    """The options of a create that are the same for all models."""

    webhook: Webhook | None = None


class Create(msgspec.Struct):
    """The body of a create."""

    image: str
    video: str
    model_name: Literal["kling-v3-0-std", "kling-v3-0-pro"]
    character_orientation: Literal["image", "video"]
    prompt: str = ""
    negative_prompt: Annotated[str, msgspec.Meta(max_length=2500)] = ""
    keep_original_sound: bool = True
    extra: Extra | None = None


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
        return None if job.is_open else {"event_type": EVENT, "payload": self._result_of(job)}

    async def _create(self, request: Request) -> dict[str, Any]:
        body = await self.body(request, Create)
        webhook = (body.extra or Extra()).webhook or Webhook()
        if webhook.test_mode is not None and webhook.test_mode.enabled:
            return await self._test(webhook.url, webhook.test_mode.return_task_status)
        job = await self.create(
            RenderRequest(
                prompt=body.prompt,
                image=body.image,
                video=body.video,
                orientation=body.character_orientation,
                sound=body.keep_original_sound,
                resolution={"kling-v3-0-std": "720p", "kling-v3-0-pro": "1080p"}[body.model_name],
                callback_url=webhook.url,
                limit_s=5 if body.character_orientation == "image" else 30,
            ),
            RULES,
        )
        return {"task_id": job.id}

    async def _test(self, url: str | None, status: str) -> dict[str, Any]:
        """Send a mock event about a task that does not exist, and render nothing."""
        job = Job(self.new_id(), RenderRequest(image="", video="", orientation="video", callback_url=url), 1, 0)
        job.status = next(name for name, word in STATUS.items() if word == status)
        body = msgspec.json.encode({"event_type": EVENT, "payload": self._result_of(job)})
        await self.notify(job, Notification(job.status, body))
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
