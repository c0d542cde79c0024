"""Novita and Highway: one API under two names. Pure.

Source: Novita's API reference (Kling V3.0 motion control, task result, webhook, error codes), as
gathered in 2026. Not documented, so either form is accepted: whether this model honours
`extra.webhook.url` (documented for v3 async in general), whether Highway behaves as Novita does,
whether a callback is wrapped in `payload` or bare, whether `video_url_ttl` is a string or a number,
whether `code` or `reason` holds the error code, and how an unknown task is refused. No documented
answer reports the cost of a task.
"""

from collections.abc import Mapping
from typing import Any

from submitter.callback_url import redact
from submitter.errors import Unintelligible
from submitter.observation import Report, Source
from submitter.request import Limits, MediaLimits
from submitter.task import TaskStatus, Video
from submitter.vendors.base import CreateRequest
from submitter.vendors.reading import inner, number, objects, text, url
from submitter.vendors.refusals import Rule
from submitter.vendors.rest import Api, read_status, setup

STATUS = {
    "TASK_STATUS_QUEUED": TaskStatus.SUBMITTED,
    "TASK_STATUS_PROCESSING": TaskStatus.PROCESSING,
    "TASK_STATUS_SUCCEED": TaskStatus.SUCCEED,
    "TASK_STATUS_FAILED": TaskStatus.FAILED,
}
MODEL = {"std": "kling-v3-0-std", "pro": "kling-v3-0-pro"}
EVENT = "ASYNC_TASK_RESULT"  # callbacks of other types are ignored

ERRORS = {
    "INVALID_REQUEST_BODY": Rule("Correct the request, and submit it with a new id."),
    "ILLEGAL_PROMPT": Rule("The content policy rejects this prompt. Change it."),
    "ILLEGAL_IMAGE_CONTENT": Rule("The content policy rejects this image. Use another one."),
    "INVALID_API_KEY": Rule("Check the API key.", failover=True),
    "BILLING_BALANCE_NOT_ENOUGH": Rule("The balance is used up. Top it up.", failover=True),
    "API_NOT_ALLOWED": Rule("This account has no permission for this model. Request it.", failover=True),
    "RATE_LIMIT_EXCEEDED": Rule("Too many requests. It is retried automatically.", retryable=True),
    "CREATE_TASK_FAILED": Rule("Check the vendor's console before you send it again.", ambiguous=True),
}

LIMITS = Limits(
    source="Novita API reference, Kling V3.0 motion control",
    image=MediaLimits(
        formats=("png", "jpeg"), max_bytes=10 * 1024 * 1024, min_side=300, min_aspect=(2, 5), max_aspect=(5, 2)
    ),
    video=MediaLimits(formats=("mp4", "mov"), max_bytes=10 * 1024 * 1024, min_side=300),  # no aspect limit is stated
    durations_s={"video": (3, 30), "image": (3, 30)},
    prompt_chars=2500,
    negative_prompt_chars=2500,
    models=("kling-v3",),
    inline_image=True,
    url_lives="as `video_url_ttl` states",
    notes=("orientation `image` always returns 5 s of video",),
)


def create_body(create: CreateRequest) -> dict[str, Any]:
    """Return the body of `POST /v3/async/kling-v3.0-motion-control`."""
    request = create.request
    body: dict[str, Any] = {
        "image": create.image,
        "video": create.video,
        "model_name": MODEL[create.mode],
        "character_orientation": request.character_orientation,
        "keep_original_sound": request.keep_original_sound,
    }
    for name in ("prompt", "negative_prompt"):
        if getattr(request, name):
            body[name] = getattr(request, name)
    if create.callback_url is not None:
        body["extra"] = {"webhook": {"url": create.callback_url}}
    return body


def read_error(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return an error's code, from either field that may hold it, and its message."""
    codes = [text(body, "reason") or "", text(body, "code") or ""]
    code = next((code for code in codes if code in ERRORS), next(filter(None, codes), ""))
    return code, text(body, "message") or text(body, "reason") or ""


def read_task(body: Mapping[str, Any], source: Source, now_s: float) -> Report:
    """Parse a task, in the form of queries and callbacks."""
    task = inner(body, "task")
    id, status = text(task, "task_id"), read_status(STATUS, text(task, "status"))
    if id is None:
        raise Unintelligible("no task id: `task.task_id` is missing")
    rows = objects(body, "videos") if status is TaskStatus.SUCCEED else []
    videos = tuple(_video(row, now_s) for row in rows if url(row, "video_url"))
    if status is TaskStatus.SUCCEED and not videos:
        raise Unintelligible("succeed without a video URL")
    message = redact(text(task, "reason") or "") if status is TaskStatus.FAILED else ""
    return Report(source=source, status=status, task_id=id, message=message, videos=videos)


def unwrap(callback: dict[str, Any]) -> dict[str, Any] | None:
    """Return `payload` of `{"event_type": "ASYNC_TASK_RESULT", "payload": {...}}`, or a bare body itself."""
    if text(callback, "event_type") not in (None, EVENT):
        return None
    return inner(callback, "payload") or callback


def _video(row: Mapping[str, Any], now_s: float) -> Video:
    ttl_s = number(row, "video_url_ttl")
    is_known = ttl_s is not None and 0 <= ttl_s < 1e9
    return Video(
        url=url(row, "video_url") or "",
        duration=number(row, "duration"),
        expires_at_ms=int((now_s + (ttl_s or 0)) * 1000) if is_known else None,
    )


def _api(name: str, base_url: str) -> Api:
    return Api(
        name=name,
        base_url=base_url,
        create_path="/v3/async/kling-v3.0-motion-control",
        query_path="/v3/async/task-result?task_id={}".format,
        errors=ERRORS,
        limits=LIMITS,
        create_body=create_body,
        read_id=lambda body: text(body, "task_id"),
        read_error=read_error,
        read_task=read_task,
        unwrap=unwrap,
    )


NOVITA_API = _api("novita", "https://api.novita.ai")
HIGHWAY_API = _api("highway", "https://api.highwayapi.ai")
NOVITA = setup(NOVITA_API, sandbox="submitter.sandbox.novita:NovitaSandbox")
HIGHWAY = setup(HIGHWAY_API, sandbox="submitter.sandbox.novita:HighwaySandbox")
