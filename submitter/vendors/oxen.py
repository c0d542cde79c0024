"""Oxen.ai, by its queue and its event stream; never by the form that blocks for minutes. Pure.

Source: Oxen.ai's documentation of its queue, its events and this model, as gathered in 2026.
Inferred, and read either way: how errors look (`error` as text or object, `error_message`,
`message`, `title`, `detail`), whether an element of this model can be one of Kling's element
library (taken as no), whether `input_image` takes anything but a URL (taken as no), and media
limits (Kling's are taken). It calls nobody back: the stream tells of ends, and nothing of
`cancelled`; it repeats nothing, so polling stands behind it. Older deployments answer 404 for a
generation that ended: then the stream is the only report. Nobody documents an answer that says
what a task cost; results are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import quote

import msgspec

from submitter.callback_url import redact
from submitter.errors import InvalidSettings, SubmissionUnknown, Unintelligible, VendorRefused
from submitter.request import Limits
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
    inner,
    json_request,
    object_or_empty,
    objects,
    read_object,
    refusal,
    refused_create,
    rule_of,
    text,
)
from submitter.vendors.kling import LIMITS_V1

BASE_URL = "https://hub.oxen.ai"
QUEUE = "/api/ai/queue"
EVENTS = "/api/events"
MODEL = "kling-video-v3-pro-motion-control"
ENDED = "media_generation_completed"  # other event types share the stream

STATUS = {
    "queued": TaskStatus.SUBMITTED,
    "processing": TaskStatus.PROCESSING,
    "succeeded": TaskStatus.SUCCEED,
    "failed": TaskStatus.FAILED,
    "cancelled": TaskStatus.FAILED,
}

LIMITS = Limits(
    source="Oxen.ai documentation, queue and Kling V3 Pro motion control; media limits as Kling's",
    image=LIMITS_V1.image,
    video=LIMITS_V1.video,
    durations_s=LIMITS_V1.durations_s,
    prompt_chars=2500,
    prompt_required=True,
    models=("kling-v3",),
    modes=("pro",),
    ids_per_query=None,
    url_lives="kept",
    notes=("media limits are not stated: Kling's are taken", "parameters are checked only when the job runs"),
)
# The stream tells of an end at once; who listens to none is asked about soon enough.
PATIENCE = Patience(
    silence=Backoff(first_s=600, factor=1.5, max_s=3600),
    asking=Backoff(first_s=15, factor=1.5, max_s=60),
    abandon_after_s=86400,
)


class Oxen(msgspec.Struct, frozen=True):
    """The API. Results go to `namespace`, where one is set."""

    api_key: str
    base_url: str = BASE_URL
    namespace: str = ""

    name: ClassVar[str] = "oxen"
    limits: ClassVar[Limits] = LIMITS
    patience: ClassVar[Patience] = PATIENCE
    callbacks: ClassVar[CallbackSetting] = False
    signs_callbacks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return "Oxen()"

    def create(self, job: Job, now_s: float) -> HttpRequest:
        """Return `POST /api/ai/queue`."""
        request = job.request
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": request.prompt,
            "input_image": job.image,
            "input_video": job.video,
            "character_orientation": request.character_orientation,
            "keep_original_sound": request.keep_original_sound,
            "num_generations": 1,
        }
        if self.namespace:
            body["target_namespace"] = self.namespace
        return self._request("POST", QUEUE, body)

    def read_create(self, answer: HttpAnswer) -> Report:
        """Read `{"generations": [{"generation_id", "status"}]}`."""
        body = object_or_empty(answer.body)
        if not 200 <= answer.status < 300:
            refused, rule = _refused(answer, body)
            raise refused_create(refused, rule)
        ids = [text(row, "generation_id") for row in (*objects(body, "generations"), body)]
        id = next(filter(None, ids), None)
        if id is None:
            raise SubmissionUnknown("oxen accepted the task and gave it no id")
        return Report(source="create", status=TaskStatus.SUBMITTED, task_id=id)

    def queries(self, tasks: Sequence[Task], now_s: float) -> list[Query]:
        """Ask about one task by its id, about several by the list."""
        known = tuple(task for task in tasks if task.task_id is not None)
        if len(known) > 1:
            return [Query(self._request("GET", QUEUE), known)]
        return [self._one(task) for task in known]

    def read_query(self, query: Query, answer: HttpAnswer, now_s: float) -> Findings:
        """Read one generation, or the list; those that the list leaves out are asked about one by one."""
        body = object_or_empty(answer.body)
        is_list = len(query.tasks) > 1
        if answer.status == 404 and not is_list:
            return Findings(absent=(query.tasks[0].external_task_id,))
        if not 200 <= answer.status < 300:
            raise _refused(answer, body)[0]
        rows = objects(body, "generations") if is_list else [body]
        by_id = {text(row, "generation_id"): row for row in rows}
        reports: dict[str, Report] = {}
        unreadable: dict[str, str] = {}
        left: list[Task] = []
        for task in query.tasks:
            id = task.external_task_id
            row = by_id.get(task.task_id)
            if row is None and is_list:
                left.append(task)
                continue
            try:
                reports[id] = _read_generation(row or {}, "poll")
            except Unintelligible as reason:
                unreadable[id] = str(reason)
        return Findings(reports, unreadable, more=tuple(self._one(task) for task in left))

    def read_callback(self, body: bytes, now_s: float) -> Report:
        """Refuse to understand: Oxen.ai calls nobody back."""
        raise Unintelligible("oxen sends no callbacks")

    def stream(self, now_s: float) -> HttpRequest:
        """Return `GET /api/events`."""
        return self._request("GET", EVENTS)

    def read_event(self, name: str, data: str, now_s: float) -> Report | None:
        """Read one event of the stream: the end of a generation, or none of ours."""
        return _read_generation(read_object(data), "stream") if name == ENDED else None

    def probe(self, now_s: float) -> HttpRequest:
        """Ask for the queue, which costs nothing."""
        return self._request("GET", QUEUE)

    def read_probe(self, answer: HttpAnswer) -> str:
        """Return how many generations the queue lists."""
        body = object_or_empty(answer.body)
        if not 200 <= answer.status < 300:
            raise _refused(answer, body)[0]
        return f"{len(objects(body, 'generations'))} generations in the queue"

    def _one(self, task: Task) -> Query:
        return Query(self._request("GET", f"{QUEUE}/{quote(task.task_id or '', safe='')}"), (task,))

    def _request(self, method: str, path: str, body: Any = None) -> HttpRequest:
        return json_request(method, self.base_url.rstrip("/") + path, self.api_key, body)


def configure(settings: Mapping[str, str]) -> Oxen | None:
    """Make the vendor from `api_key`; `base_url` and `target_namespace` are optional."""
    base_url = settings.get("base_url", BASE_URL)
    problems = check_base_url("oxen", base_url, BASE_URL)
    if problems:
        raise InvalidSettings(problems)
    api_key, namespace = settings.get("api_key"), settings.get("target_namespace", "")
    return Oxen(api_key, base_url, namespace) if api_key else None


SETUP = VendorSetup(
    names=("api_key", "base_url", "target_namespace"),
    credentials_remedy="Set OXEN_API_KEY.",
    reader=Oxen(""),
    configure=configure,
    sandbox="submitter.sandbox.oxen:OxenSandbox",
)


def _refused(answer: HttpAnswer, body: Mapping[str, Any]) -> tuple[VendorRefused, Rule]:
    rule = rule_of(answer.status, "oxen")
    return refusal("oxen", answer, rule, code=text(inner(body, "error"), "type") or "none", message=_why(body)), rule


def _why(body: Mapping[str, Any]) -> str:
    """Return the reason of an error, wherever it stands."""
    for row in (body, inner(body, "error")):
        for name in ("error_message", "error", "message", "detail", "title", "status_message"):
            if isinstance(row.get(name), str) and row[name]:
                return str(row[name])
    return ""


def _read_generation(row: Mapping[str, Any], source: Source) -> Report:
    """Read a generation, as the queue and the stream have it."""
    id, word = text(row, "generation_id"), text(row, "status")
    status = STATUS.get(word or "")
    if id is None:
        raise Unintelligible("it names no task: no `generation_id`")
    if status is None:
        raise Unintelligible(f"its status {word!r} is not one that we know")
    if status is TaskStatus.FAILED:
        return Report(source=source, status=status, task_id=id, message=redact(_why(row) or word or ""))
    url = next((row[name] for name in ("result_url", "url") if isinstance(row.get(name), str) and row[name]), None)
    if status is TaskStatus.SUCCEED and url is None:
        raise Unintelligible("it says succeed and has no video URL")
    videos = (Video(url),) if status is TaskStatus.SUCCEED and url else ()
    return Report(source=source, status=status, task_id=id, videos=videos)
