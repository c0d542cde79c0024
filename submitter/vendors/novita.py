"""Novita and Highway: one API under two names. Pure.

Source: Novita's API reference (Kling V3.0 motion control, task result, webhook, error codes), as
gathered in 2026. What is not documented is read either way: whether this model honours
`extra.webhook.url` (documented for v3 async in general) and whether Highway does as Novita does,
whether a callback is wrapped in `payload` or bare, whether `video_url_ttl` is a string or a
number, whether `code` or `reason` holds an error's name, and how an unknown task is refused. No
documented answer says what a task cost.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.callback_url import redact
from submitter.errors import InvalidSettings, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.request import Limits, MediaLimits
from submitter.schedule import Backoff, Patience
from submitter.task import Report, Source, Task, TaskStatus, Video
from submitter.vendors.base import (
    CallbackSetting,
    Findings,
    HttpAnswer,
    HttpRequest,
    Job,
    Query,
    Rule,
    VendorSetup,
    check_base_url,
    findings_of_one,
    inner,
    json_request,
    number,
    object_or_empty,
    objects,
    read_object,
    refusal,
    refused_create,
    rule_of,
    text,
)

BASE_URL = {"novita": "https://api.novita.ai", "highway": "https://api.highwayapi.ai"}
CREATE = "/v3/async/kling-v3.0-motion-control"
RESULT = "/v3/async/task-result"

STATUS = {
    "TASK_STATUS_QUEUED": TaskStatus.SUBMITTED,
    "TASK_STATUS_PROCESSING": TaskStatus.PROCESSING,
    "TASK_STATUS_SUCCEED": TaskStatus.SUCCEED,
    "TASK_STATUS_FAILED": TaskStatus.FAILED,
}
MODEL = {"std": "kling-v3-0-std", "pro": "kling-v3-0-pro"}
EVENT = "ASYNC_TASK_RESULT"  # other event types are none of ours

ERRORS = {
    "INVALID_REQUEST_BODY": Rule("Mend the request."),
    "ILLEGAL_PROMPT": Rule("The content policy refuses this prompt: change it."),
    "ILLEGAL_IMAGE_CONTENT": Rule("The content policy refuses this image: change it."),
    "INVALID_API_KEY": Rule("Check the API key.", elsewhere=True),
    "BILLING_BALANCE_NOT_ENOUGH": Rule("The balance is used up: top it up.", elsewhere=True),
    "API_NOT_ALLOWED": Rule("This account may not use this model: ask for the permission.", elsewhere=True),
    "RATE_LIMIT_EXCEEDED": Rule("Requests came too fast: it is tried again by itself.", retryable=True),
    "CREATE_TASK_FAILED": Rule("Look into the vendor's console before it is sent again.", ambiguous=True),
}

_IMAGE = MediaLimits(
    formats=("png", "jpeg"),
    max_bytes=10 * 1024 * 1024,
    min_side=300,
    min_aspect=(2, 5),
    max_aspect=(5, 2),
)
LIMITS = Limits(
    source="Novita API reference, Kling V3.0 motion control",
    image=_IMAGE,
    video=msgspec.structs.replace(_IMAGE, formats=("mp4", "mov")),
    durations_s={"video": (3, 30), "image": (3, 30)},
    prompt_chars=2500,
    negative_prompt_chars=2500,
    models=("kling-v3",),
    inline_image=True,
    url_lives="as `video_url_ttl` says",
    notes=("orientation `image` gives 5 s, whatever the reference",),
)

# One callback, at the end. A task cannot be asked about together with others.
PATIENCE = Patience(
    silence=Backoff(first_s=900, factor=1.5, max_s=3600),
    asking=Backoff(first_s=15, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class Novita(msgspec.Struct, frozen=True):
    """The API, under the name `novita` or `highway`."""

    name: str
    api_key: str
    base_url: str

    limits: ClassVar[Limits] = LIMITS
    patience: ClassVar[Patience] = PATIENCE
    callbacks: ClassVar[CallbackSetting] = "auto"
    signs_callbacks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"Novita({self.name!r})"

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return `POST /v3/async/kling-v3.0-motion-control`."""
        request = job.request
        body: dict[str, Any] = {
            "image": job.image,
            "video": job.video,
            "model_name": MODEL[job.mode],
            "character_orientation": request.character_orientation,
            "keep_original_sound": request.keep_original_sound,
        }
        for name in ("prompt", "negative_prompt"):
            if getattr(request, name):
                body[name] = getattr(request, name)
        if job.callback_url is not None:
            body["extra"] = {"webhook": {"url": job.callback_url}}
        return self._request("POST", CREATE, body)

    def read_create(self, answer: HttpAnswer) -> Report:
        """Read `{"task_id": ...}`."""
        body = object_or_empty(answer.body)
        id = text(body, "task_id") if 200 <= answer.status < 300 else None
        if id is not None:
            return Report(source="create", status=TaskStatus.SUBMITTED, task_id=id)
        if 200 <= answer.status < 300 and _word(body) not in ERRORS:
            raise SubmissionUnknown(f"{self.name} accepted the task and gave it no id")
        rule = self._rule(answer, body)
        raise refused_create(self._refused(answer, body, rule), rule)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Ask about each task by its id; one that has none cannot be asked about."""
        return [
            Query(self._request("GET", f"{RESULT}?task_id={quote(task.task_id, safe='')}"), (task,))
            for task in tasks
            if task.task_id is not None
        ]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Read one task's result; 404 is a task that is not known (inferred)."""
        body = object_or_empty(answer.body)
        if answer.status == 404 and _word(body) not in ERRORS:
            return Findings(absent=(query.tasks[0].external_task_id,))
        if not 200 <= answer.status < 300:
            raise self._refused(answer, body, self._rule(answer, body))
        return findings_of_one(query, lambda: _read_result(read_object(answer.body), "poll", now_s))

    def read_callback(self, body: bytes, now_s: float) -> Report | None:
        """Read `{"event_type": "ASYNC_TASK_RESULT", "payload": {...}}`, or its payload alone."""
        envelope = read_object(body)
        kind = text(envelope, "event_type")
        if kind not in (None, EVENT):
            return None
        return _read_result(inner(envelope, "payload") or envelope, "callback", now_s)

    def probe(self, now_s: float) -> HttpRequest:
        """Ask for a task that is not there, which costs nothing and shows whether the key is taken."""
        return self._request("GET", f"{RESULT}?task_id=kling-relay-doctor")

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return that the key is taken: the balance is not told."""
        body = object_or_empty(answer.body)
        rule = self._rule(answer, body)
        if answer.status in (401, 403) or answer.status >= 500 or rule.elsewhere:
            raise self._refused(answer, body, rule)
        return "the balance is not told"

    def _request(self, method: str, path: str, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.api_key, body)

    def _rule(self, answer: HttpAnswer, body: Mapping[str, Any]) -> Rule:
        rule = ERRORS.get(_word(body)) or rule_of(answer.status, self.name)
        return msgspec.structs.replace(rule, ambiguous=True) if answer.status >= 500 else rule

    def _refused(self, answer: HttpAnswer, body: Mapping[str, Any], rule: Rule) -> VendorRefused:
        message = text(body, "message") or text(body, "reason") or ""
        return refusal(self.name, answer, rule, code=_word(body) or "none", message=message)


def setup(name: str) -> VendorSetup:
    """Return how the vendor is made that has this API and this name."""
    variable = f"{name.upper()}_API_KEY"

    def configure(settings: Mapping[str, str]) -> Novita | None:
        base_url = settings.get("base_url", BASE_URL[name])
        problems = check_base_url(name, base_url, BASE_URL[name])
        if problems:
            raise InvalidSettings(problems)
        return Novita(name, settings["api_key"], base_url) if settings.get("api_key") else None

    made: Callable[[Mapping[str, str]], Novita | None] = configure
    return VendorSetup(
        names=("api_key", "base_url"),
        credentials_remedy=f"Set {variable}.",
        reader=Novita(name, "", BASE_URL[name]),
        configure=made,
        sandbox=f"submitter.sandbox.novita:{name.capitalize()}Sandbox",
    )


NOVITA, HIGHWAY = setup("novita"), setup("highway")


def _word(body: Mapping[str, Any]) -> str:
    """Return an error's name, wherever it stands."""
    words = [text(body, "reason") or "", text(body, "code") or ""]
    return next((word for word in words if word in ERRORS), next(filter(None, words), ""))


def _read_result(body: Mapping[str, Any], source: Source, now_s: float) -> Report:
    """Read a task's result, as queries and callbacks have it."""
    task = inner(body, "task")
    id, word = text(task, "task_id"), text(task, "status")
    status = STATUS.get(word or "")
    if id is None:
        raise Unintelligible("it names no task: no `task.task_id`")
    if status is None:
        raise Unintelligible(f"its status {word!r} is not one that we know")
    videos = tuple(
        _video(row, now_s) for row in objects(body, "videos") if status is TaskStatus.SUCCEED and text(row, "video_url")
    )
    if status is TaskStatus.SUCCEED and not videos:
        raise Unintelligible("it says succeed and has no video URL")
    message = redact(text(task, "reason") or "") if status is TaskStatus.FAILED else ""
    return Report(source=source, status=status, task_id=id, message=message, videos=videos)


def _video(row: Mapping[str, Any], now_s: float) -> Video:
    lives_s = number(row, "video_url_ttl")
    known = lives_s is not None and 0 <= lives_s < 1e9
    return Video(
        url=text(row, "video_url") or "",
        duration=number(row, "duration"),
        expires_at_ms=int((now_s + (lives_s or 0)) * 1000) if known else None,
    )
