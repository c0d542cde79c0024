"""AIHubMax. Pure.

Source: AIHubMax's model pages and public client code, and the documentation of its sister
platform EvoLink, as gathered in 2026. Much is inferred and read either way: whether
`callback_url` is honoured (EvoLink documents it: HTTPS only, once at the end, three retries, the
query's answer as the body), where the result's URL stands (`results[0].url`, a bare string there,
or `output.url`), whether `cancelled` occurs, what `usage` holds (any number named for credits, or
an amount with its currency), and whether an answer says when the task ended. Media limits are
not stated: Kling's are taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.callback_url import redact
from submitter.errors import InvalidSettings, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.request import Limits
from submitter.schedule import Backoff, Patience
from submitter.task import Charge, Report, Source, Task, TaskStatus, Video
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
    read_object,
    refusal,
    refused_create,
    rule_of,
    text,
)
from submitter.vendors.kling import LIMITS_V1

BASE_URL = "https://api.aihubmax.com"
CREATE = "/v1/videos/generations"
QUERY = "/v1/tasks"

STATUS = {
    "pending": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "completed": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
    "cancelled": TaskStatus.FAILED,  # EvoLink's
}
MODEL = {"kling-v3": "kling-v3-motion-control", "kling-v2-6": "kling-v2-6-motion-control"}
RESULT_LIVES_S = 86400

ERRORS = {
    "invalid_request_error": Rule("Mend the request."),
    "validation_error": Rule("Mend the request."),
    "authentication_error": Rule("Check AIHUBMAX_API_KEY.", elsewhere=True),
    "permission_error": Rule("This key may not use this model: ask for the permission.", elsewhere=True),
    "insufficient_quota": Rule("The balance is used up: top it up.", elsewhere=True),
    "rate_limit_error": Rule("Requests came too fast: it is tried again by itself.", retryable=True),
}
CREDITS = ("credits", "credits_used", "credits_consumed", "credits_reserved")

LIMITS = Limits(
    source="AIHubMax model pages; media limits as Kling's",
    image=LIMITS_V1.image,
    video=LIMITS_V1.video,
    durations_s=LIMITS_V1.durations_s,
    prompt_chars=2500,
    models=("kling-v3", "kling-v2-6"),
    url_lives="24 h",
    notes=("media limits are not stated: Kling's are taken",),
)
PATIENCE = Patience(
    silence=Backoff(first_s=900, factor=1.5, max_s=3600),
    asking=Backoff(first_s=15, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class AIHubMax(msgspec.Struct, frozen=True):
    """The API."""

    api_key: str
    base_url: str = BASE_URL

    name: ClassVar[str] = "aihubmax"
    limits: ClassVar[Limits] = LIMITS
    patience: ClassVar[Patience] = PATIENCE
    callbacks: ClassVar[CallbackSetting] = "auto"
    signs_callbacks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return "AIHubMax()"

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return `POST /v1/videos/generations`; what is the default there is left out, as it asks."""
        request = job.request
        body: dict[str, Any] = {
            "model": MODEL[request.model],
            "image_url": job.image,
            "video_url": job.video,
            "mode": job.mode,
        }
        if request.prompt:
            body["prompt"] = request.prompt
        if request.character_orientation != "image":
            body["character_orientation"] = request.character_orientation
        if not request.keep_original_sound:
            body["keep_original_sound"] = "no"
        if job.callback_url is not None:
            body["callback_url"] = job.callback_url
        return self._request("POST", CREATE, body)

    def read_create(self, answer: HttpAnswer) -> Report:
        """Read the task that was made."""
        body = object_or_empty(answer.body)
        id = text(body, "id")
        if 200 <= answer.status < 300:
            if id is None:
                raise SubmissionUnknown("aihubmax accepted the task and gave it no id")
            return Report(source="create", status=TaskStatus.SUBMITTED, task_id=id)
        refused, rule = _refused(answer, body)
        raise refused_create(refused, rule)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Ask about each task by its id, and for a fresh look when an answer brought nothing before."""
        return [
            Query(self._request("GET", f"{QUERY}/{quote(task.task_id, safe='')}{_refresh(task)}"), (task,))
            for task in tasks
            if task.task_id is not None
        ]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Read one task; 404 is one that is not known (inferred)."""
        if answer.status == 404:
            return Findings(absent=(query.tasks[0].external_task_id,))
        if not 200 <= answer.status < 300:
            raise _refused(answer, object_or_empty(answer.body))[0]
        return findings_of_one(query, lambda: _read_task(read_object(answer.body), "poll", now_s))

    def read_callback(self, body: bytes, now_s: float) -> Report:
        """Read the query's answer, bare or wrapped in `data` (inferred)."""
        envelope = read_object(body)
        wrapped = inner(envelope, "data")
        return _read_task(wrapped if "status" in wrapped else envelope, "callback", now_s)

    def probe(self, now_s: float) -> HttpRequest:
        """Ask for a task that is not there, which costs nothing and shows whether the key is taken."""
        return self._request("GET", f"{QUERY}/kling-relay-doctor")

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return that the key is taken: the balance is not told."""
        refused, rule = _refused(answer, object_or_empty(answer.body))
        if answer.status in (401, 403) or answer.status >= 500 or rule.elsewhere:
            raise refused
        return "the balance is not told"

    def _request(self, method: str, path: str, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.api_key, body)


def configure(settings: Mapping[str, str]) -> AIHubMax | None:
    """Make the vendor from `api_key`; `base_url` is optional."""
    base_url = settings.get("base_url", BASE_URL)
    problems = check_base_url("aihubmax", base_url, BASE_URL)
    if problems:
        raise InvalidSettings(problems)
    return AIHubMax(settings["api_key"], base_url) if settings.get("api_key") else None


SETUP = VendorSetup(
    names=("api_key", "base_url"),
    credentials_remedy="Set AIHUBMAX_API_KEY.",
    reader=AIHubMax(""),
    configure=configure,
    sandbox="submitter.sandbox.aihubmax:AIHubMaxSandbox",
)


def _refresh(task: Task) -> str:
    return "?sync_upstream=true" if task.polls or task.doubted else ""


def _refused(answer: HttpAnswer, body: Mapping[str, Any]) -> tuple[VendorRefused, Rule]:
    error = inner(body, "error")
    kind = text(error, "type") or text(error, "code") or ""
    rule = ERRORS.get(kind) or rule_of(answer.status, "aihubmax")
    if answer.status >= 500:
        rule = msgspec.structs.replace(rule, ambiguous=True)
    return refusal("aihubmax", answer, rule, code=kind or "none", message=text(error, "message") or ""), rule


def _read_task(row: Mapping[str, Any], source: Source, now_s: float) -> Report:
    """Read a task, as queries and callbacks have it."""
    id, word = text(row, "id"), text(row, "status")
    status = STATUS.get(word or "")
    if id is None:
        raise Unintelligible("it names no task: no `id`")
    if status is None:
        raise Unintelligible(f"its status {word!r} is not one that we know")
    if status is TaskStatus.FAILED:
        error = inner(row, "error")
        message = redact(text(error, "message") or text(row, "error") or text(error, "code") or word or "")
        return Report(source=source, status=status, task_id=id, message=message, cost=_cost(row))
    videos = tuple(_videos(row, now_s)) if status is TaskStatus.SUCCEED else ()
    if status is TaskStatus.SUCCEED and not videos:
        # Seen: `completed` comes before its results do. It is not the end.
        return Report(source=source, status=TaskStatus.PROCESSING, task_id=id, unfinished=True)
    return Report(source=source, status=status, task_id=id, videos=videos, cost=_cost(row))


def _videos(row: Mapping[str, Any], now_s: float) -> Iterator[Video]:
    results = row.get("results")
    for result in [*(results if isinstance(results, list) else [results]), row.get("output")]:
        shown = result if isinstance(result, dict) else {"url": result}
        url = text(shown, "url") if isinstance(shown.get("url"), str) else None
        if url is not None:
            yield Video(url=url, duration=number(shown, "duration"), expires_at_ms=_expires_at_ms(row, now_s))
            return  # one task makes one video: `output` repeats it


def _expires_at_ms(row: Mapping[str, Any], now_s: float) -> int:
    """A result lives 24 h from the end of its task, which is told nowhere for sure: rather too
    early, from the task's beginning, than too late.
    """
    begun_s = number(row, "created")
    is_time = begun_s is not None and 1e9 <= begun_s <= now_s
    return int(((begun_s or 0) if is_time else now_s) * 1000) + RESULT_LIVES_S * 1000


def _cost(row: Mapping[str, Any]) -> tuple[Charge, ...]:
    usage = inner(row, "usage")
    amount = text(usage, "amount") or text(usage, "cost")
    if amount is not None:
        return (Charge(kind="cash", amount=amount, currency=text(usage, "currency")),)
    found = next((text(usage, name) for name in CREDITS if text(usage, name) is not None), None)
    return () if found is None else (Charge(kind="credit", amount=found),)
