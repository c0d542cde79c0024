"""The adapter for AIHubMax. Pure.

Source: AIHubMax's model pages and public client code, and the documentation of its sister platform
EvoLink, as gathered in 2026. Much is inferred, so either form is accepted: whether `callback_url` is
honoured (EvoLink documents it: HTTPS only, once at the end, three retries, the query's answer as
the body), which field holds the result's URL (`results[0].url`, a bare string there, or `output.url`),
whether `cancelled` occurs, what `usage` holds (a number of credits in one of several fields, or an
amount with its currency), and whether an answer states when the task ended. Media limits are not
documented; Kling's are used.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from submitter.callback_url import redact
from submitter.errors import Unintelligible
from submitter.observation import Report, Source
from submitter.request import Limits
from submitter.task import Charge, TaskStatus, Video
from submitter.vendors.base import CreateRequest
from submitter.vendors.kling.v1 import LIMITS as KLING_LIMITS
from submitter.vendors.reading import inner, number, text, url
from submitter.vendors.refusals import Rule
from submitter.vendors.rest import Api, read_status, setup

STATUS = {
    "pending": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "completed": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
    "cancelled": TaskStatus.FAILED,  # as EvoLink documents
}
MODEL = {"kling-v3": "kling-v3-motion-control", "kling-v2-6": "kling-v2-6-motion-control"}
RESULT_TTL_S = 86400

ERRORS = {
    "invalid_request_error": Rule("Correct the request, and submit it with a new id."),
    "validation_error": Rule("Correct the request, and submit it with a new id."),
    "authentication_error": Rule("Check AIHUBMAX_API_KEY.", failover=True),
    "permission_error": Rule("This key has no permission for this model. Request it.", failover=True),
    "insufficient_quota": Rule("The balance is used up. Top it up.", failover=True),
    "rate_limit_error": Rule("Too many requests. It is retried automatically.", retryable=True),
}
CREDITS = ("credits", "credits_used", "credits_consumed")  # `credits_reserved` is a reservation, not a cost

LIMITS = Limits(
    source="AIHubMax model pages; media limits as Kling's",
    image=KLING_LIMITS.image,
    video=KLING_LIMITS.video,
    durations_s=KLING_LIMITS.durations_s,
    prompt_chars=2500,
    models=("kling-v3", "kling-v2-6"),
    url_lives="24 h",
    notes=("media limits are not documented; Kling's are used",),
)


def create_body(create: CreateRequest) -> dict[str, Any]:
    """Return the body of `POST /v1/videos/generations`. The API asks to omit fields with default values."""
    request = create.request
    body: dict[str, Any] = {
        "model": MODEL[request.model],
        "image_url": create.image,
        "video_url": create.video,
        "mode": create.mode,
    }
    if request.prompt:
        body["prompt"] = request.prompt
    if request.character_orientation != "image":
        body["character_orientation"] = request.character_orientation
    if not request.keep_original_sound:
        body["keep_original_sound"] = "no"
    if create.callback_url is not None:
        body["callback_url"] = create.callback_url
    return body


def read_error(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return the type and the message of `{"error": {"type", "code", "message"}}`."""
    error = inner(body, "error")
    return text(error, "type") or text(error, "code") or "", text(error, "message") or ""


def read_task(row: Mapping[str, Any], source: Source, now_s: float) -> Report:
    """Parse a task, in the form of queries and callbacks."""
    id, value = text(row, "id"), text(row, "status")
    status = read_status(STATUS, value)
    if id is None:
        raise Unintelligible("no task id: `id` is missing")
    if status is TaskStatus.FAILED:
        error = inner(row, "error")
        message = redact(text(error, "message") or text(row, "error") or text(error, "code") or value or "")
        return Report(source=source, status=status, task_id=id, message=message, cost=_cost(row))
    videos = tuple(_videos(row, now_s)) if status is TaskStatus.SUCCEED else ()
    if status is TaskStatus.SUCCEED and not videos:
        # Seen live: `completed` is reported before the results are available.
        return Report(source=source, status=TaskStatus.PROCESSING, task_id=id, unfinished=True)
    return Report(source=source, status=status, task_id=id, videos=videos, cost=_cost(row))


def unwrap(callback: dict[str, Any]) -> dict[str, Any]:
    """Return the query's answer, bare or in `data` (inferred)."""
    data = inner(callback, "data")
    return data if "status" in data else callback


def _videos(row: Mapping[str, Any], now_s: float) -> Iterator[Video]:
    results = row.get("results")
    for result in [*(results if isinstance(results, list) else [results]), row.get("output")]:
        item = result if isinstance(result, dict) else {"url": result}
        found = url(item, "url")
        if found is not None:
            yield Video(url=found, duration=number(item, "duration"), expires_at_ms=_expires_at_ms(row, now_s))
            return  # a task has one video; `output` repeats it


def _expires_at_ms(row: Mapping[str, Any], now_s: float) -> int:
    """Return when the result's URL expires, estimated as 24 h after the task's creation.

    The vendor counts from the end of the task, which no answer reliably states; too early is safe.
    """
    created_s = number(row, "created")
    is_time = created_s is not None and 1e9 <= created_s <= now_s
    return int(((created_s or 0) if is_time else now_s) * 1000) + RESULT_TTL_S * 1000


def _cost(row: Mapping[str, Any]) -> tuple[Charge, ...]:
    usage = inner(row, "usage")
    amount = text(usage, "amount") or text(usage, "cost")
    if amount is not None:
        return (Charge(kind="cash", amount=amount, currency=text(usage, "currency")),)
    found = next((text(usage, name) for name in CREDITS if text(usage, name) is not None), None)
    return () if found is None else (Charge(kind="credit", amount=found),)


API = Api(
    name="aihubmax",
    base_url="https://api.aihubmax.com",
    create_path="/v1/videos/generations",
    query_path="/v1/tasks/{}".format,
    fresh_query="?sync_upstream=true",
    errors=ERRORS,
    limits=LIMITS,
    create_body=create_body,
    read_id=lambda body: text(body, "id"),
    read_error=read_error,
    read_task=read_task,
    unwrap=unwrap,
)
SETUP = setup(API, sandbox="submitter.sandbox.aihubmax:AIHubMaxSandbox")
